"""The models that bench_train.py compares us with, built with our weights: Hugging Face Transformers and megatron-core.

``weights`` is always a dict of our own parameters by global name (see megaresnorm/model/parameters.py). Nothing of the
package imports this file, and its imports are optional: ``pip install transformers megatron-core==0.16.1``.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    """The model that is trained, and on how much.

    Attributes:
        architecture: gpt2 (LayerNorm, learned positions, GELU, biases) or llama (RMSNorm, RoPE, SwiGLU).
    """

    architecture: str
    num_blocks: int
    dim: int
    num_heads: int
    seq_len: int
    batch: int
    vocab_size: int
    ffn_dim: int
    microbatches: int = 1  # of ``batch`` samples, in a step


@dataclass(frozen=True)
class Place:
    """A rank of tp or of pp; not of both."""

    rank: int = 0
    tp: int = 1
    pp: int = 1

    @property
    def num_ranks(self) -> int:
        return self.tp * self.pp


class Peer:
    """A model that is trained the plain way: cross entropy in FP32, clipping by the global norm, fused AdamW.

    Args:
        mode: fp32, autocast (FP32 weights, BF16 products) or bf16 (weights and optimizer state in BF16).
        loss: the model's own mean loss of (tokens, labels), where it has a faster one.
        gradients: takes the place of logits and loss: does the backward pass for the tokens and labels of all
            microbatches and returns the mean loss.
        divided: whether a parameter is sharded over ranks.
        batch: samples of a microbatch.
    """

    def __init__(
        self,
        model: nn.Module,
        logits: Callable[[Tensor], Tensor],
        mode: str,
        loss: Callable[[Tensor, Tensor], Tensor] | None = None,
        gradients: Callable[[Tensor, Tensor], float] | None = None,
        divided: Callable[[nn.Parameter], bool] | None = None,
        batch: int | None = None,
    ) -> None:
        self._gradients, self._divided, self._batch = gradients or self._accumulate, divided, batch
        self.model, self._logits, self._loss, self.mode = model.train(), logits, loss, mode
        if mode == "bf16":
            model.to(torch.bfloat16)
        parameters = list(model.parameters())
        groups = [
            {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.1},
            {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, fused=True)

    def logits(self, tokens: Tensor) -> Tensor:
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=self.mode == "autocast"):
            return self._logits(tokens)

    def step(self, tokens: Tensor, labels: Tensor) -> float:
        loss = self._gradients(tokens, labels)
        if self._divided is None:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0, foreach=True)
        else:
            self._clip_over_ranks(self._divided)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss

    def _accumulate(self, tokens: Tensor, labels: Tensor) -> float:
        batch, total = self._batch or len(tokens), torch.zeros((), device=tokens.device)
        for some, wanted in zip(tokens.split(batch), labels.split(batch), strict=True):
            if self._loss is None:
                loss = F.cross_entropy(self.logits(some).float().flatten(0, 1), wanted.flatten())
            else:
                with torch.autocast(tokens.device.type, torch.bfloat16, enabled=self.mode == "autocast"):
                    loss = self._loss(some, wanted)
            if batch < len(tokens):
                loss = loss * (batch / len(tokens))
            loss.backward()
            total += loss.detach()
        return total.item()

    def _clip_over_ranks(self, divided: Callable[[nn.Parameter], bool]) -> None:
        """By the norm of all ranks' gradients; what is not divided counts once."""
        first = torch.distributed.get_rank() == 0
        kinds: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
        for p in self.model.parameters():
            kinds[divided(p)].append(p)
        whole, parts = (torch.nn.utils.get_total_norm([p.grad for p in kind], foreach=True) for kind in kinds)
        square = parts.square() + (whole.square() if first else 0.0)
        torch.distributed.all_reduce(square)
        torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), 1.0, square.sqrt(), foreach=True)


def hf_gpt2(shape: Shape, weights: dict[str, Tensor], mode: str, place: Place) -> Peer:
    """transformers.GPT2LMHeadModel with scaled_dot_product_attention, the exact GELU and an untied head."""
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=shape.vocab_size,
            n_positions=shape.seq_len,
            n_embd=shape.dim,
            n_layer=shape.num_blocks,
            n_head=shape.num_heads,
            n_inner=shape.ffn_dim,
            activation_function="gelu",
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            tie_word_embeddings=False,
            use_cache=False,
            attn_implementation="sdpa",
        )
    )
    names = {
        "attention.norm_in": "ln_1",
        "attention.branch.qkv": "attn.c_attn",
        "attention.branch.out": "attn.c_proj",
        "ffn.norm_in": "ln_2",
        "ffn.branch.up": "mlp.c_fc",
        "ffn.branch.down": "mlp.c_proj",
    }
    top = {
        "embedding": "transformer.wte",
        "positions": "transformer.wpe",
        "final_norm": "transformer.ln_f",
        "head": "lm_head",
    }
    state = {}
    for name, value in weights.items():
        block, module, kind = _split(name)
        # GPT-2's Conv1D holds its matrices the other way round.
        turned = value.t() if block is not None and value.dim() == 2 else value
        state[f"transformer.h.{block}.{names[module]}.{kind}" if block is not None else f"{top[module]}.{kind}"] = (
            turned
        )
    model.load_state_dict(state)
    return Peer(model, lambda tokens: model(input_ids=tokens).logits, mode, batch=shape.batch)


def hf_llama(shape: Shape, weights: dict[str, Tensor], mode: str, place: Place) -> Peer:
    """transformers.LlamaForCausalLM with scaled_dot_product_attention."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=shape.vocab_size,
            hidden_size=shape.dim,
            intermediate_size=shape.ffn_dim,
            num_hidden_layers=shape.num_blocks,
            num_attention_heads=shape.num_heads,
            max_position_embeddings=shape.seq_len,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            use_cache=False,
            tie_word_embeddings=False,
            attn_implementation="sdpa",
        )
    )
    names = {
        "attention.norm_in": ["input_layernorm"],
        "attention.branch.qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        "attention.branch.out": ["self_attn.o_proj"],
        "ffn.norm_in": ["post_attention_layernorm"],
        "ffn.branch.gate_up": ["mlp.gate_proj", "mlp.up_proj"],
        "ffn.branch.down": ["mlp.down_proj"],
    }
    top = {"embedding": "model.embed_tokens", "final_norm": "model.norm", "head": "lm_head"}
    state = {}
    for name, value in weights.items():
        block, module, kind = _split(name)
        if block is None:
            state[f"{top[module]}.{kind}"] = value
        else:
            parts = names[module]
            for part, rows in zip(parts, value.chunk(len(parts)), strict=True):
                state[f"model.layers.{block}.{part}.{kind}"] = rows
    model.load_state_dict(state)
    return Peer(model, lambda tokens: model(input_ids=tokens).logits, mode, batch=shape.batch)


def megatron(shape: Shape, weights: dict[str, Tensor], mode: str, place: Place) -> Peer:
    """megatron.core's GPTModel of local layers, with scaled_dot_product_attention and its own cross entropy and 1F1B.

    It expects a GPU: its rotary tables and pipeline buffers are made on the current CUDA device, its schedules count
    tokens there, and its linears note autocast for CUDA only. All are turned to the CPU here. Its fused kernels need
    Transformer Engine or Apex and are off.
    """
    torch.cuda.current_device = lambda: torch.device("cpu")
    zeros = torch.zeros
    torch.zeros = lambda *size, device=None, **rest: zeros(*size, device="cpu" if device == "cuda" else device, **rest)
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.tensor_parallel.layers import LinearWithGradAccumulationAndAsyncCommunication as MegatronLinear
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_config import TransformerConfig

    assert 1 in (place.tp, place.pp)
    if place.num_ranks == 1:
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel(place.tp, place.pp)
    for name, wrap in (("forward", torch.amp.custom_fwd), ("backward", torch.amp.custom_bwd)):
        setattr(MegatronLinear, name, staticmethod(wrap(getattr(MegatronLinear, name).__wrapped__, device_type="cpu")))
    llama = shape.architecture == "llama"
    config = TransformerConfig(
        num_layers=shape.num_blocks,
        hidden_size=shape.dim,
        num_attention_heads=shape.num_heads,
        num_query_groups=shape.num_heads,
        ffn_hidden_size=shape.ffn_dim,
        normalization="RMSNorm" if llama else "LayerNorm",
        layernorm_epsilon=1e-5,
        activation_func=F.silu if llama else F.gelu,
        gated_linear_unit=llama,
        add_bias_linear=not llama,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        bf16=mode == "bf16",
        params_dtype=torch.bfloat16 if mode == "bf16" else torch.float32,
        tensor_model_parallel_size=place.tp,
        pipeline_model_parallel_size=place.pp,
        pipeline_dtype=torch.bfloat16 if mode == "bf16" else torch.float32,
        batch_p2p_sync=False,
    )
    spec = get_gpt_layer_local_spec(normalization=config.normalization)
    spec.submodules.self_attention.submodules.core_attention = ModuleSpec(module=_MegatronAttention)
    model = GPTModel(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=shape.vocab_size,
        max_sequence_length=shape.seq_len,
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope" if llama else "learned_absolute",
        rotary_base=10000,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
    )
    _load_megatron(model, weights, shape.num_heads, place)
    positions = torch.arange(shape.seq_len)[None]

    def of_pipeline(tokens: Tensor, labels: Tensor) -> float:
        return _megatron_pipeline(model, positions, shape, tokens, labels)

    return Peer(
        model,
        lambda tokens: model(tokens, positions, None),
        mode,
        lambda tokens, labels: model(tokens, positions, None, labels=labels).mean(),
        of_pipeline if place.pp > 1 else None,
        None if place.num_ranks == 1 else (lambda p: place.pp > 1 or getattr(p, "tensor_model_parallel", False)),
        shape.batch,
    )


def _megatron_pipeline(model: nn.Module, positions: Tensor, shape: Shape, tokens: Tensor, labels: Tensor) -> float:
    """Megatron's own 1F1B over the microbatches of a step; every rank gets the mean loss of the last stage."""
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func

    def forward(microbatches: Iterator[tuple[Tensor, Tensor]], model: nn.Module) -> tuple[Tensor, Callable]:
        some, wanted = next(microbatches)
        return model(some, positions, None, labels=wanted), lambda out: ((loss := out.mean()), loss.detach().clone())

    losses = get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=zip(tokens.split(shape.batch), labels.split(shape.batch), strict=True),
        model=model,
        num_microbatches=shape.microbatches,
        seq_length=shape.seq_len,
        micro_batch_size=shape.batch,
    )
    mean = torch.stack(losses).mean() if parallel_state.is_pipeline_last_stage() else torch.zeros(())
    torch.distributed.all_reduce(mean)
    return mean.item()


class _MegatronAttention(nn.Module):
    """The interface of Megatron's DotProductAttention over torch's fused causal attention."""

    def __init__(self, *, softmax_scale: float | None = None, **unused: object) -> None:
        super().__init__()
        self.scale = softmax_scale

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *unused: object, **unused_too: object) -> Tensor:
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))  # [S, B, N, H] to [B, N, S, H]
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale)
        return y.permute(2, 0, 1, 3).flatten(2)


@torch.no_grad()
def _load_megatron(model: nn.Module, weights: dict[str, Tensor], num_heads: int, place: Place) -> None:
    """This rank's share of every weight of its stage."""
    names = {
        "attention.norm_in": "input_layernorm",
        "attention.branch.qkv": "self_attention.linear_qkv",
        "attention.branch.out": "self_attention.linear_proj",
        "ffn.norm_in": "pre_mlp_layernorm",
        "ffn.branch.up": "mlp.linear_fc1",
        "ffn.branch.gate_up": "mlp.linear_fc1",
        "ffn.branch.down": "mlp.linear_fc2",
    }
    top = {
        "embedding": "embedding.word_embeddings",
        "positions": "embedding.position_embeddings",
        "final_norm": "decoder.final_layernorm",
        "head": "output_layer",
    }
    parameters = dict(model.named_parameters())
    local = {layer.layer_number - 1: i for i, layer in enumerate(model.decoder.layers)}
    for name, value in weights.items():
        block, module, kind = _split(name)
        if module == "attention.branch.qkv":  # for each head in turn: its query rows, its key rows, its value rows
            value = value.unflatten(0, (3, num_heads, -1)).transpose(0, 1).flatten(0, 2)
        if block is not None and block not in local:
            continue
        path = f"{top[module]}.{kind}" if block is None else f"decoder.layers.{local[block]}.{names[module]}.{kind}"
        if path not in parameters and place.pp > 1:
            continue
        parameter = parameters.pop(path)
        if place.tp > 1 and getattr(parameter, "tensor_model_parallel", False):
            fused = 2 if module == "ffn.branch.gate_up" else 1
            shares = [part.chunk(place.tp, parameter.partition_dim)[place.rank] for part in value.chunk(fused)]
            value = torch.cat(shares)
        parameter.copy_(value)
    assert not parameters, f"not loaded: {sorted(parameters)}"


def _split(name: str) -> tuple[int | None, str, str]:
    """(block or None, module, weight or bias) of a global name."""
    path, kind = name.rsplit(".", 1)
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)", path)
    return (int(match[1]), match[2], kind) if match else (None, path, kind)


MEGATRON = "megatron-core"
PEERS: dict[str, dict[str, Callable[[Shape, dict[str, Tensor], str, Place], Peer]]] = {
    "gpt2": {"transformers GPT-2": hf_gpt2, MEGATRON: megatron},
    "llama": {"transformers Llama": hf_llama, MEGATRON: megatron},
}
