"""DeepSpeed's JSON, generated from a recipe. Pure: it imports no DeepSpeed."""

from typing import Any

from megaresnorm.memory.zero import buffer_sizes
from megaresnorm.recipe import Recipe
from megaresnorm.recipe.engine import LOGGED


def deepspeed_config(recipe: Recipe, *, data_ranks: int, pin: bool) -> dict[str, Any]:
    """The configuration that DeepSpeed is given, with what ``engine.deepspeed`` adds.

    Args:
        recipe: whose engine is deepspeed.
        data_ranks: ranks of dp.
        pin: whether memory on the host is pinned, as copies from and to a GPU want it.
    """
    engine = recipe.engine
    micro = recipe.train.micro_batch_of(data_ranks, 1)
    zero: dict[str, Any] = {"stage": engine.zero_stage}
    if engine.zero_stage:
        # Without contiguous gradients stages 1 and 2 of DeepSpeed 0.19.7 have wrong norms and losses.
        zero |= {"contiguous_gradients": True, "overlap_comm": False, **buffer_sizes(recipe)}
    if engine.zero_stage == 3:
        zero["memory_efficient_linear"] = False  # it would replace torch's own F.linear, which needs no help here
        if recipe.recompute.policies & {"every", "auto"}:  # blocks that run again gather by themselves
            zero["stage3_prefetch_bucket_size"] = 0
    if engine.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": pin}
    elif engine.zero_stage in (1, 2):
        zero["compute_grad_norm"] = False  # ours is
    if engine.offload == "parameters":
        zero["offload_param"] = {"device": "cpu", "pin_memory": pin}
    own = {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": 1,  # the engine says which microbatch is a step's last
        "gradient_clipping": 0.0,
        "steps_per_print": 2**31,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "communication_data_type": "fp32",
        "timers": {"throughput": {"enabled": False}},  # it would wait for the GPU in every pass
    }
    if any(engine.passed_on.get(key) for key in LOGGED):
        own["log_level"] = "info"
    return _merged(own, engine.passed_on)


def _merged(own: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """Nested settings, those of ``more`` last."""
    found = dict(own)
    for key, value in more.items():
        found[key] = _merged(found.get(key, {}), value) if isinstance(value, dict) else value
    return found
