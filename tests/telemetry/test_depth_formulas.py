"""Every figure of depth telemetry, against the formula written out over whole tensors in FP64."""

from math import acos, pi, sqrt

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megaresnorm.data.loader import Batch, StepBatch
from megaresnorm.engines.native import NativeEngine
from megaresnorm.engines.tensor_norms import TensorNorms
from megaresnorm.model.dropout import DropoutKey
from megaresnorm.model.topology import TOPOLOGIES, beside_others
from megaresnorm.parallel.branch_input import BranchInput
from megaresnorm.recipe import Recipe
from megaresnorm.recipe.load import build_recipe
from megaresnorm.telemetry.depth import rows as rows_module
from megaresnorm.telemetry.depth.tensors import CLASSES
from megaresnorm.telemetry.depth.watch import DepthWatch

SEQ, VOCAB, BLOCKS, LR = 8, 32, 3, 1e-2
OF_STREAM = ("stream_rms", "sum_rms", "branch_rms", "branch_ratio", "branch_cosine", "kurtosis")


def recipe_of(topology: str, **sections) -> Recipe:
    model = {"dim": 16, "num_blocks": BLOCKS, "num_heads": 4, "num_kv_heads": 2, "ffn_dim": 24, "seq_len": SEQ}
    model |= {"vocab_size": VOCAB, "topology": topology, "dropout": 0.2} | beside_others(topology)
    model |= sections.pop("model", {})
    values = {"model": model, "data": {"path": "none", "mask_documents": True}, "precision": {"compute": "fp64"}}
    return build_recipe(values | {"train": {"output": "none", "steps": 9}, "optim": {"clip": "none"}} | sections)


def batch() -> StepBatch:
    tokens = torch.randint(VOCAB, (4, SEQ + 1))
    documents = torch.randint(2, (4, SEQ)).cumsum(1).clamp(max=2)
    return StepBatch.of([Batch(tokens[i, :-1], tokens[i, 1:], i, documents[i]) for i in torch.arange(4).split(2)])


def normalized(norm, x: Tensor) -> Tensor:
    if norm is None:
        return x
    weight = norm.weight + 1 if norm.zero_centered else norm.weight
    if norm.kind == "layernorm":
        return F.layer_norm(x, x.shape[-1:], weight, norm.bias, norm.eps)
    return F.rms_norm(x, x.shape[-1:], weight, norm.eps)


def pass_of(engine: NativeEngine, recipe: Recipe, part: Batch, tokens: int) -> list[tuple[Tensor, Tensor, float]]:
    """(x, contribution, alpha) of every sub-layer, then the last stream; gradients of the mean loss are in ``grad``."""
    model, found = engine.model, []
    rows = model.rows(part.tokens, part.documents)
    masks = DropoutKey.of_samples(recipe.train.seed, part.samples, SEQ).of_stream(model.layout, 16, 2 * BLOCKS)
    x = model.embed(part.tokens, rows, masks).x
    for number, block in enumerate(model.blocks.values()):
        for site, residual in enumerate(block.sublayers):
            x.retain_grad()
            drop = masks.of_blocks(number, 1).at(site, 0.2)
            u = residual.spec.norm_in_scale * normalized(residual.norm_in, x)
            y = drop(normalized(residual.norm_branch, residual.branch(BranchInput(u), rows)))
            if residual.token_gate is not None:
                share = torch.sigmoid(u @ residual.token_gate.weight.T + residual.token_gate.bias)
                c = share * y - share * x
            else:
                c = y * (residual.spec.gate if residual.gate is None else residual.gate)
            found.append((x, c, residual.spec.alpha))
            x = normalized(residual.norm_out, residual.spec.alpha * x + c)
    x.retain_grad()
    found.append((x, torch.zeros_like(x), 1.0))
    hidden = normalized(model.final_norm, x)
    model.head(BranchInput(hidden), part.labels.flatten(), 0.0, 1 / tokens)[1].backward()
    return found


def formulas(passes: list[list[tuple[Tensor, Tensor, float]]]) -> tuple[dict, dict, float]:
    """By sub-layer, by block, and the RMS of the last stream, of whole tensors over all microbatches."""
    trunks, added, sums, gradients = [], [], [], []
    for same in zip(*passes, strict=True):
        trunks.append(torch.cat([x for x, _, _ in same]).detach())
        added.append(torch.cat([c for _, c, _ in same]).detach())
        gradients.append(torch.cat([x.grad for x, _, _ in same]))
        sums.append(same[0][2] * trunks[-1] + added[-1])
    alphas = [alpha for _, _, alpha in passes[0]]

    def rms(x: Tensor) -> float:
        return x.pow(2).mean().sqrt().item()

    by_sublayer: dict[str, list] = {name: [] for name in OF_STREAM}
    for x, c, z, alpha in list(zip(trunks, added, sums, alphas, strict=True))[:-1]:
        ratio = c.norm() / (alpha * x).norm()
        cosine = (c * x).sum() / (c.norm() * x.norm())
        fourth = x.pow(4).mean() / x.pow(2).mean() ** 2 - 3
        numbers = (rms(x), rms(z), rms(c), ratio.item(), cosine.item() if c.any() else None, fourth.item())
        for name, number in zip(OF_STREAM, numbers, strict=True):
            by_sublayer[name].append(number)
    by_block: dict[str, list] = {"cosine": [], "angular_distance": [], "stream_gradient": []}
    for block in range(BLOCKS):
        cosines = F.cosine_similarity(trunks[2 * block], trunks[2 * block + 2], eps=0.0).clamp(-1, 1)
        by_block["cosine"].append(cosines.mean().item())
        by_block["angular_distance"].append(sum(acos(c) / pi for c in cosines.tolist()) / len(cosines))
        by_block["stream_gradient"].append(gradients[2 * block].norm().item())
    return by_sublayer, by_block, rms(trunks[-1]), gradients[-1].norm().item()


def watched(recipe: Recipe) -> tuple[DepthWatch, NativeEngine, StepBatch, dict, dict]:
    """After a step, with the weights before it and its gradients."""
    torch.manual_seed(1)
    engine, parts = NativeEngine(recipe), batch()
    with torch.no_grad():  # gates that start at 0, or all alike, would leave something unseen
        for name, p in engine.assembled.parameters().items():
            if "gate" in name.split(".")[-1] or "token_gate" in name:
                p.uniform_(-0.5, 0.5)
    engine.step(batch(), LR)  # moments that are not those of a first step
    engine.weights_changed()
    parameters = engine.assembled.parameters()
    before = {name: p.detach().clone() for name, p in parameters.items()}
    direct = formulas([pass_of(engine, recipe, part, parts.num_valid) for part in parts.microbatches])
    gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in parameters.items()}
    for p in parameters.values():
        p.grad = None
    watch = DepthWatch(recipe.model, engine.assembled, TensorNorms(engine, recipe.optim))
    with watch.watching(LR):
        engine.step(parts, LR)
    return watch, engine, parts, {"streams": direct, "before": before, "gradients": gradients}


def near(number, abs_=1e-12):
    return None if number is None else pytest.approx(number, rel=1e-6, abs=abs_)


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_sums_over_the_stream_are_the_formulas(topology):
    """Dropout, documents, and gates of all kinds; two microbatches count as one."""
    options = {"model": {"num_blocks": BLOCKS, "norm": "layernorm" if topology in ("peri", "keel") else "rmsnorm"}}
    watch, *_, wanted = watched(recipe_of(topology, **options))
    by_sublayer, by_block, end_rms, end_gradient = wanted["streams"]
    found = watch.figures
    for name in OF_STREAM:
        assert found.by_sublayer[name] == [near(number) for number in by_sublayer[name]], name
    for name, numbers in by_block.items():
        assert found.by_block[name] == [near(number, 1e-9) for number in numbers], name
    assert found.end_rms == near(end_rms)
    assert found.whole["gradient_ratio"] == near(by_block["stream_gradient"][0] / end_gradient)
    ratios = [r**2 for r in by_sublayer["branch_ratio"]]
    assert found.whole["effective_depth"] == near(sum(ratios) ** 2 / sum(r**2 for r in ratios))
    assert found.whole["sublayers_above"] == sum(r > 0.01**2 for r in ratios)


def kind_of(name: str) -> str:
    for kind, words in {"norm": ("norm",), "qkv": ("qkv",), "out": (".out.",), "ffn_in": ("gate_up", ".up.")}.items():
        if any(word in name for word in words):
            return kind
    return "ffn_out" if ".down." in name else "other"


@pytest.mark.parametrize("topology", ["completep", "gated", "layerscale", "peri"])
def test_norms_of_gradients_and_updates_are_those_of_the_tensors(topology):
    """Multipliers of lr, decay and epsilon; the update is theta after less theta before."""
    options = {"base_dim": 8, "base_num_blocks": 2} if topology == "completep" else {}
    recipe = recipe_of(
        topology, model={"topology_options": options, "init": {"distribution": "xavier"}, "positions": "learned"},
        optim={"clip": "none", "weight_decay": 0.3},
    )  # fmt: skip
    watch, engine, _, wanted = watched(recipe)
    after, found = engine.assembled.parameters(), watch.figures

    def norm(tensors: list[Tensor]) -> float:
        return sqrt(sum(t.pow(2).sum().item() for t in tensors))

    def check(gradient: float | None, update: float | None, names: list[str]) -> None:
        if not names:
            assert gradient is None and update is None
            return
        before = norm([wanted["before"][n] for n in names])
        assert gradient == near(norm([wanted["gradients"][n] for n in names]))
        assert update == near(norm([after[n] - wanted["before"][n] for n in names]) / before, 1e-9)

    for block in range(BLOCKS):
        names = [name for name in after if name.startswith(f"blocks.{block}.")]
        check(found.by_block["gradient_norm"][block], found.by_block["update_ratio"][block], names)
        for kind in CLASSES:
            of_kind = [n for n in names if kind_of(n) == kind]
            numbers = (found.by_block[f"{what}/{kind}"][block] for what in ("gradient_norm", "update_ratio"))
            check(*numbers, of_kind)
    for outer, names in {"embedding": ["embedding.weight", "positions.weight"], "head": ["head.weight"]}.items():
        check(found.whole[f"gradient_norm/{outer}"], found.whole[f"update_ratio/{outer}"], names)


@pytest.mark.parametrize("qk_norm", ["none", "head", "full"])
@pytest.mark.parametrize("attention", ["reference", "sdpa"])
def test_the_largest_logit_is_that_of_allowed_pairs_of_rotated_heads(qk_norm, attention, monkeypatch):
    """Queries in chunks of three, grouped keys, documents; weights so large that the softmax is one key."""
    monkeypatch.setattr("megaresnorm.telemetry.depth.scores.SCORES", 3 * 2 * 4 * SEQ)
    settings = {"qk_norm": qk_norm, "attention_multiplier": 0.7, "dropout": 0.0}
    recipe = recipe_of("pre", model=settings, kernels={"attention": attention})
    engine, parts = NativeEngine(recipe), batch()
    seen: list[tuple[int, Tensor, Tensor]] = []
    for number, block in engine.model.blocks.items():
        branch = block.attention.branch
        rotary = branch.rotary

        def rotated(*arguments, number=int(number), rotary=rotary, **options):
            q, k, v = rotary(*arguments, **options)
            seen.append((number, q.detach(), k.detach()))
            return q, k, v

        branch.rotary = rotated
    watch = DepthWatch(recipe.model, engine.assembled)
    with watch.watching():
        engine.step(parts, 0.0)
    wanted = [float("-inf")] * BLOCKS
    for index, (block, q, k) in enumerate(seen):
        documents = parts.microbatches[index // BLOCKS].documents
        for b in range(2):
            for i in range(SEQ):
                for j in range(i + 1):
                    if documents[b, i] == documents[b, j]:
                        for head in range(4):
                            score = 0.7 * (q[b, i, head] @ k[b, j, head // 2]).item()
                            wanted[block] = max(wanted[block], score)
    assert watch.figures.by_block["logit_max"] == [near(w) for w in wanted]
    assert watch.figures.whole["logit_max"] == near(max(wanted))


def test_angles_are_taken_of_every_nth_token_of_each_sequence(monkeypatch):
    recipe = recipe_of("pre")
    whole, *_, wanted = watched(recipe)
    monkeypatch.setattr(rows_module, "ROWS", 4)  # of two sequences of eight tokens: every fourth
    part, engine, parts, again = watched(recipe)
    assert again["streams"] == wanted["streams"]
    passes = [pass_of(engine, recipe, p, 1) for p in parts.microbatches]
    assert part.figures.by_sublayer == whole.figures.by_sublayer
    assert part.figures.by_block["cosine"] != whole.figures.by_block["cosine"]
    assert rows_module.stride_of(2, SEQ, 4) == 4 and len(passes) == 2


def test_a_refused_step_has_no_update():
    recipe = recipe_of("pre")
    engine, parts = NativeEngine(recipe), batch()
    with torch.no_grad():
        engine.assembled.parameters()["head.weight"][0, 0] = torch.inf
    watch = DepthWatch(recipe.model, engine.assembled, TensorNorms(engine, recipe.optim))
    with watch.watching(LR):
        assert not engine.step(parts, LR).applied
    assert (
        watch.figures.by_block["update_ratio"] == [None] * BLOCKS and watch.figures.whole["update_ratio/head"] is None
    )
    assert watch.figures.by_block["gradient_norm"] == [None] * BLOCKS
    assert all(number is not None for number in watch.figures.by_sublayer["stream_rms"])


def test_weights_that_start_at_zero_have_no_relative_update():
    recipe = recipe_of("rezero")
    engine, parts = NativeEngine(recipe), batch()
    watch = DepthWatch(recipe.model, engine.assembled, TensorNorms(engine, recipe.optim))
    found = []
    for _ in range(2):
        with watch.watching(LR):
            engine.step(parts, LR)
        found.append(watch.figures.by_block["update_ratio/other"])
    assert found[0] == [None] * BLOCKS and all(0.1 < ratio < 10 for ratio in found[1])


def test_updates_of_bf16_weights_are_those_before_rounding():
    """Of AdamW's moments and the weights before the step; rounding at random moves a weight by far more."""
    recipe = recipe_of("pre", precision={"compute": "bf16", "weights": "bf16"}, optim={"weight_decay": 0.1})
    engine = NativeEngine(recipe)
    engine.step(batch(), 1e-4)
    before = {one.name: one.weight.double().clone() for one in engine.updated()}
    watch = DepthWatch(recipe.model, engine.assembled, TensorNorms(engine, recipe.optim))
    with watch.watching(1e-4):
        engine.step(batch(), 1e-4)
    beta1, beta2, squares = recipe.optim.beta1, recipe.optim.beta2, [0.0, 0.0]
    for one in engine.updated():
        if one.name.startswith("blocks.1.") and kind_of(one.name) == "ffn_in":
            assert one.weight.dtype == torch.bfloat16
            m, v = (one.state[key].double() for key in ("exp_avg", "exp_avg_sq"))
            direction = m / (1 - beta1**2) / ((v / (1 - beta2**2)).sqrt() + recipe.optim.eps)
            update = 1e-4 * (direction + 0.1 * before[one.name])
            squares = [a + t.pow(2).sum().item() for a, t in zip(squares, (update, before[one.name]), strict=True)]
    wanted = sqrt(squares[0] / squares[1])
    assert watch.figures.by_block["update_ratio/ffn_in"][1] == pytest.approx(wanted, rel=1e-3)
