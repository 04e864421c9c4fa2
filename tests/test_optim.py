"""Parameter groups, clipping and schedules."""

from math import cos, inf, pi, sqrt

import pytest
import torch

from megaresnorm.assemble import build_model
from megaresnorm.clipping import GradientClipper
from megaresnorm.engines.step_vector import gradient_norms
from megaresnorm.errors import ConfigError
from megaresnorm.model.parameters import parameter_table
from megaresnorm.model.specs import ParameterSpec, Part
from megaresnorm.optim import Optimizer, check_eps
from megaresnorm.recipe import ModelRecipe, OptimRecipe, TopologyOptions
from megaresnorm.schedule import batch_size, learning_rate, lr_jump


def groups_by_name(recipe: ModelRecipe, optim: OptimRecipe):
    """The group that updates each parameter: a step with a gradient of ones moves its weights by that group's rule."""
    model = build_model(recipe).model
    parameters = dict(model.named_parameters())
    optimizer = Optimizer(parameters, parameter_table(recipe), optim)
    by_tensor = {tensor: group for group in optimizer.groups for tensor in group.tensors}
    return {name: by_tensor[optimizer.updated_as(p)] for name, p in parameters.items()}


def test_matrices_decay_and_nothing_else_does():
    recipe = ModelRecipe(
        dim=16, num_blocks=2, num_heads=2, seq_len=8, vocab_size=64, norm="layernorm", bias=True, topology="layerscale"
    )
    groups = groups_by_name(recipe, OptimRecipe(weight_decay=0.3))
    for name, group in groups.items():
        matrix = name.endswith(
            ("embedding.weight", "head.weight", "qkv.weight", "out.weight", "gate_up.weight", "down.weight")
        )
        assert group.weight_decay == (0.3 if matrix else 0.0), name


def test_completep_multipliers_reach_the_optimizer():
    recipe = ModelRecipe(
        dim=64, num_blocks=8, num_heads=2, seq_len=8, vocab_size=64, topology="completep",
        topology_options=TopologyOptions(base_dim=16, base_num_blocks=2),
    )  # fmt: skip
    groups = groups_by_name(recipe, OptimRecipe(lr=0.01, weight_decay=0.1, eps=1e-6))
    for name, (lr, decay, eps) in {
        "blocks.3.ffn.branch.down.weight": (0.0025, 0.4, 1e-6 / 16),
        "blocks.3.ffn.norm_in.weight": (0.01, 0.0, 1e-6 / 16),
        "embedding.weight": (0.01, 0.1, 1e-6 / 4),
        "head.weight": (0.01, 0.1, 1e-6 / 4),
        "final_norm.weight": (0.01, 0.0, 1e-6),
    }.items():
        group = groups[name]
        assert (0.01 * group.lr_multiplier, group.weight_decay, group.eps) == pytest.approx((lr, decay, eps)), name


def clip(clipper, *gradients, refused=None):
    tensors = [torch.tensor(g) for g in gradients]
    norms = gradient_norms(tensors)
    total = torch.linalg.vector_norm(norms)
    if (divisor := clipper.divisor(total)) is not None:
        torch._foreach_div_(tensors, divisor)
    if clipper.clips_each:
        clipper.clip_each(tensors, norms, total, refused)
        clipper.steps += refused is None
    return [t.tolist() for t in tensors]


def test_global_clipping():
    clipper = GradientClipper(OptimRecipe(clip_norm=1.0), 2)
    assert clip(clipper, [3.0, 0.0], [0.0, 4.0]) == [pytest.approx([0.6, 0.0]), pytest.approx([0.0, 0.8])]
    assert clip(clipper, [0.3, 0.0], [0.0, 0.4]) == [pytest.approx([0.3, 0.0]), pytest.approx([0.0, 0.4])]
    assert clip(clipper, [0.0], [0.0]) == [[0.0], [0.0]]
    assert clip(GradientClipper(OptimRecipe(clip="none"), 1), [30.0, 40.0]) == [[30.0, 40.0]]


def test_adagc_follows_its_algorithm_by_hand():
    """Warm-up: global clipping, gamma is the smallest clipped norm. Then each tensor against 1.05 gamma, an average."""
    clipper = GradientClipper(
        OptimRecipe(clip="adagc", adagc_warmup=2, clip_norm=5.0, adagc_ratio=1.05, adagc_beta=0.9), 2
    )
    assert clip(clipper, [3.0], [4.0]) == [[3.0], [4.0]]
    assert clip(clipper, [6.0], [8.0]) == [pytest.approx([3.0]), pytest.approx([4.0])]
    assert clipper.averages.tolist() == pytest.approx([3.0, 4.0])
    assert clip(clipper, [30.0], [4.1]) == [pytest.approx([3.15]), pytest.approx([4.1])]
    assert clipper.averages.tolist() == pytest.approx([0.9 * 3 + 0.1 * 3.15, 0.9 * 4 + 0.1 * 4.1])


def test_adagc_is_not_pinned_by_gradients_of_zero():
    """Behind a gate that starts at 0 the first gradients are 0; their norm says nothing of later ones."""
    clipper = GradientClipper(OptimRecipe(clip="adagc", adagc_warmup=1), 2)
    clip(clipper, [0.0], [0.5])
    assert clipper.averages.tolist() == [inf, 0.5]
    assert clip(clipper, [0.25], [0.5]) == [[0.25], [0.5]]
    assert clipper.averages.tolist() == pytest.approx([0.25, 0.5])


def test_adagc_remembers_nothing_of_a_refused_step():
    clipper = GradientClipper(OptimRecipe(clip="adagc", adagc_warmup=1), 2)
    clip(clipper, [0.3], [0.4])
    before = clipper.averages.clone()
    clip(clipper, [float("nan")], [0.1], refused=torch.tensor(1.0))
    assert torch.equal(clipper.averages, before) and clipper.steps == 1


@pytest.mark.parametrize("size", [5, 1 << 17])  # packed with others, and by itself
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_refused_update_changes_nothing_and_is_not_counted(dtype, size):
    """Weights, state and bias correction: the step after it is the one that it would have been without."""
    found = []
    for steps in (["good", "good"], ["good", "refused", "good"]):
        p = torch.nn.Parameter(torch.linspace(-1, 1, size, dtype=dtype))
        optimizer = Optimizer(
            {"w": p}, {"w": ParameterSpec("w", (size,), (Part("norm", size),), decay=True)}, OptimRecipe()
        )
        for kind in steps:
            bad = kind == "refused"
            p.grad = torch.full_like(p, float("nan")) if bad else torch.linspace(1, 2, size, dtype=dtype)
            optimizer.collect()
            before = p.detach().clone()
            divisor = torch.tensor(float("nan") if bad else 1.25, dtype=torch.float64)
            optimizer.step(0.1, divisor=divisor, refused=torch.tensor(float(bad)))
            assert torch.equal(before, p.detach()) == bad
        found.append([p.detach(), *optimizer.state(p).values()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def rates(tiny, steps, lr=1.0, **schedule):
    recipe = tiny(train={"steps": steps}, optim={"lr": lr}, schedule=schedule)
    return [learning_rate(s, recipe) for s in range(steps)], recipe


def test_schedules(tiny):
    got, _ = rates(tiny, 5, kind="constant")
    assert got == [1.0] * 5
    got, _ = rates(tiny, 6, kind="linear", warmup_steps=2, min_ratio=0.1)
    assert got == pytest.approx([0.5, 1.0, 1.0, 0.7, 0.4, 0.1])
    got, _ = rates(tiny, 5, kind="cosine", min_ratio=0.2)
    assert got == pytest.approx([0.2 + 0.8 * (1 + cos(pi * s / 4)) / 2 for s in range(5)])
    got, _ = rates(tiny, 8, kind="wsd", warmup_steps=2, decay_steps=4, min_ratio=0.0)
    assert got == pytest.approx([0.5, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0])
    got, _ = rates(tiny, 8, kind="linear", warmup_steps=2, decay_steps=4, min_lr=0.1)
    assert got == pytest.approx([0.5, 1.0, 1.0, 0.7, 0.4, 0.1, 0.1, 0.1])
    longer, _ = rates(tiny, 20, kind="linear", warmup_steps=2, decay_steps=4, min_lr=0.1)
    assert longer[:8] == got, "independent of train.steps"
    got, _ = rates(tiny, 10, kind="cosine", warmup_ratio=0.2, min_lr=0.2)
    assert got == rates(tiny, 10, kind="cosine", warmup_steps=2, min_ratio=0.2)[0]
    got, _ = rates(tiny, 9, kind="inverse_sqrt", warmup_steps=4)
    assert got == pytest.approx([0.25, 0.5, 0.75, 1.0, sqrt(4 / 5), sqrt(4 / 6), sqrt(4 / 7), sqrt(4 / 8), sqrt(4 / 9)])


def test_a_jump_of_the_rate_is_said_and_nothing_else(tiny):
    def jump(step, before, now, steps=(100, 100)):
        return lr_jump(step, *(rates(tiny, n, **s)[1] for n, s in zip(steps, (before, now), strict=True)))

    cosine, wsd = {"kind": "cosine"}, {"kind": "wsd"}
    assert "cosine follows train.steps; schedule.decay_steps, or wsd, does not" in jump(100, cosine, cosine, (100, 200))
    assert "extended before its decay begins" in jump(100, wsd, wsd, (100, 200))
    assert jump(80, wsd, wsd, (100, 200)) is None, "its decay had not begun"
    assert jump(50, {**cosine, "decay_steps": 100}, {**cosine, "decay_steps": 100}, (100, 200)) is None
    assert jump(5, {"warmup_steps": 100}, {"warmup_steps": 101}, (1000, 1000)) is None, "as it would have grown anyway"
    assert jump(50, cosine, cosine) is None and jump(0, cosine, wsd) is None
    changed = jump(50, {"kind": "constant"}, {"kind": "constant", "lr": 2.0})
    assert changed == "the learning rate goes from 1.00e+00 at step 50 to 2.00e+00 at step 51"


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine", "wsd", "inverse_sqrt"])
@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (1, 1), (2, 1), (10, 10), (10, 9), (1000, 30)])
def test_rates_are_positive_peak_once_and_never_exceed_the_peak(tiny, kind, steps, warmup):
    got, _ = rates(tiny, steps, lr=0.3, kind=kind, warmup_steps=warmup)
    assert all(0 < rate <= 0.3 * (1 + 1e-12) for rate in got)
    assert max(got) == pytest.approx(0.3) or (kind == "wsd" and warmup == 0 and steps == 1)


def test_batch_ramp_grows_in_whole_microbatches_to_the_global_batch(tiny):
    train = tiny(train={"global_batch": 32, "micro_batch": 4, "batch_ramp": {"start": 8, "steps": 6}}).train
    sizes = [batch_size(s, train) for s in range(8)]
    assert sizes == [8, 12, 16, 20, 24, 28, 32, 32]
    assert batch_size(0, tiny().train) == 4


def test_wsd_decays_over_a_tenth_unless_told_and_within_what_the_warmup_leaves(tiny):
    got, _ = rates(tiny, 100, kind="wsd")
    assert sum(rate < 1.0 for rate in got) == 10
    got, _ = rates(tiny, 20, kind="wsd", warmup_steps=19)
    assert got[18] == pytest.approx(1.0) and got[19] == pytest.approx(0.1)


def test_packed_parameters_are_updated_as_single_ones_are():
    """Two steps with clipping against torch's AdamW on every tensor alone; values, moments and slices."""
    recipe = ModelRecipe(
        dim=288, num_blocks=2, num_heads=2, seq_len=8, vocab_size=300, topology="layerscale", ffn_dim=48
    )
    optim = OptimRecipe(lr=0.01, weight_decay=0.2)
    ours, theirs = build_model(recipe).model, build_model(recipe).model
    table, parameters = parameter_table(recipe), dict(ours.named_parameters())
    packed = Optimizer(parameters, table, optim)
    assert any(p.numel() > 1 << 16 for p in parameters.values()) and len(packed.tensors) < len(parameters) / 2
    groups = [{"params": [p], "weight_decay": 0.2 if table[n].decay else 0.0} for n, p in theirs.named_parameters()]
    single = torch.optim.AdamW(groups, lr=0.01, betas=(optim.beta1, optim.beta2), eps=optim.eps, fused=True)
    for step in range(2):
        tokens = torch.randint(300, (2, 8), generator=torch.Generator().manual_seed(step))
        for model in (ours, theirs):
            model(tokens).square().sum().backward()
        wanted = {n: p.grad.clone() for n, p in theirs.named_parameters()}
        gradients = [gradient.tensor for gradient in packed.collect()]
        for name, g in wanted.items():
            torch.testing.assert_close(
                packed.gradient(parameters[name]), g, rtol=1e-3, atol=1e-4 * g.abs().max().item() + 1e-7
            )
        total = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        norms = gradient_norms(gradients)
        assert torch.linalg.vector_norm(norms).item() == pytest.approx(total.item(), rel=1e-5)
        packed.step(0.01, divisor=GradientClipper(optim, len(parameters)).divisor(torch.linalg.vector_norm(norms)))
        packed.zero_grad()
        single.step()
        single.zero_grad()
    for name, p in theirs.named_parameters():
        torch.testing.assert_close(parameters[name], p, rtol=1e-4, atol=1e-4)
        moments = packed.state(parameters[name])
        torch.testing.assert_close(moments["exp_avg"], single.state[p]["exp_avg"], rtol=1e-4, atol=1e-7)
    before = parameters["blocks.0.ffn.branch.down.weight"].clone()
    packed.updated_as(parameters["blocks.0.ffn.branch.down.weight"]).data.add_(1.0)
    assert torch.equal(parameters["blocks.0.ffn.branch.down.weight"], before + 1.0), "a slice, not a copy"


@pytest.mark.parametrize("size", [1_000, 65_536, 65_537, 300_000, 2_300_000, 50_000_000])
def test_gradient_norms_keep_six_digits_at_any_size(size):
    """torch's own norm of 5e7 numbers in FP32 on a CPU is 4e-3 too small."""
    gradient = torch.randn(size, generator=torch.Generator().manual_seed(size))
    exact = sum(piece.double().square().sum().item() for piece in gradient.split(1 << 20)) ** 0.5
    (norm,) = gradient_norms([gradient])
    assert norm.dtype == torch.float64 and abs(norm.item() / exact - 1) < 1e-6


def test_gradient_norms_do_not_depend_on_how_tensors_are_packed():
    parts = [torch.randn(n, generator=torch.Generator().manual_seed(n)) for n in (3, 70_000, 400_000, 0, 65_536)]
    apart = torch.linalg.vector_norm(gradient_norms(parts)).item()
    (packed,) = gradient_norms([torch.cat(parts)])
    assert abs(packed.item() / apart - 1) < 1e-6


def test_an_eps_that_a_topology_makes_too_small_is_refused():
    recipe = ModelRecipe(
        dim=64, num_blocks=8, num_heads=2, seq_len=8, vocab_size=64, topology="completep",
        topology_options=TopologyOptions(base_dim=16, base_num_blocks=2),
    )  # fmt: skip
    with pytest.raises(
        ConfigError, match=r"optim.eps=2e-38 times 0.\d+, the topology's multiplier for .*wanted at least"
    ):
        check_eps(OptimRecipe(eps=2e-38), parameter_table(recipe))
    check_eps(OptimRecipe(eps=1e-8), parameter_table(recipe))
