"""Checks of a topology, a depth and a precision, before an accelerator is spent on them.

A setting that cannot work is refused; one that is likely to disappoint is a warning. The estimates assume Xavier-like
matrices, for which a branch with unit input has an output of RMS v * w (v, w: gains of its two matrices relative to
Xavier).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path

from megaresnorm.errors import ConfigError
from megaresnorm.model.lint_precision import precision_warnings
from megaresnorm.model.parameters import default_embedding_std, default_position_std
from megaresnorm.model.specs import matrix_std
from megaresnorm.model.topology import SUBLAYERS, ResidualSpec, residual_at, topology
from megaresnorm.model.transformer import has_embedding_norm
from megaresnorm.recipe import ModelRecipe, PrecisionRecipe, Recipe
from megaresnorm.recipe.load import load_recipe as read

BF16_HALF_ULP = 2.0**-8  # an add smaller than this share of its BF16 sum can vanish in the rounding


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        rule: the name of the check that found it.
        refused: whether it cannot work, so that the run must not start.
    """

    rule: str
    message: str
    refused: bool = False


@dataclass(frozen=True)
class SublayerEstimate:
    """One sub-layer at initialisation.

    Attributes:
        v, w: gains of the branch's two matrices relative to Xavier.
        trunk: RMS of x.
        branch_to_trunk: RMS of gate * y over RMS of alpha * x.
    """

    spec: ResidualSpec
    v: float
    w: float
    trunk: float
    branch_to_trunk: float


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, with overrides of the form section.key=value, and check it as the command line does.

    Raises:
        ConfigError: it cannot be read, or describes a model that cannot be; one line.
    """
    if not isinstance(path, str | Path):
        raise ConfigError(f"load_recipe takes the path of a file, not a {type(path).__name__}")
    if isinstance(overrides, str) or not all(isinstance(one, str) for one in overrides or ()):
        raise ConfigError('load_recipe takes overrides as a list of texts, as in ["model.dim=64"]')
    recipe = read(path, overrides or ())
    check(recipe)
    return recipe


def check(recipe: Recipe) -> list[Finding]:
    """The warnings for a recipe.

    Raises:
        ConfigError: a finding cannot work; the first of these.
    """
    findings = lint(recipe.model, recipe.precision)
    for finding in findings:
        if finding.refused:
            raise ConfigError(finding.message)
    warmup = recipe.schedule.warmup(recipe.train.steps)
    if warmup > recipe.train.steps:
        findings.append(
            Finding(
                "warmup",
                f"the run of train.steps={recipe.train.steps} ends within schedule.warmup_steps="
                f"{warmup}: the learning rate does not reach optim.lr={recipe.optim.lr:g}",
            )
        )
    return findings


def lint(model: ModelRecipe, precision: PrecisionRecipe) -> list[Finding]:
    """Everything that is wrong, refusals first."""
    findings = [*_options_fit(model), *_combinations(model), *_completep_base(model)]
    if not any(f.refused for f in findings):  # the estimates below need a topology that can be evaluated
        findings += [*_tied_self_match(model), *_update_bound(model), *_swallowed_updates(model, precision)]
        findings += [Finding(*warning) for warning in precision_warnings(model, precision, estimates(model))]
    return sorted(findings, key=lambda finding: not finding.refused)


def estimates(model: ModelRecipe) -> list[SublayerEstimate]:
    """Every sub-layer at initialisation, from the input up."""
    trunk = 1.0 if has_embedding_norm(model) else _embedding_rms(model)
    out = []
    for block in range(model.num_blocks):
        for sublayer in SUBLAYERS:
            spec = residual_at(model, block, sublayer)
            v, w = _gains(model, sublayer, spec)
            branch = 1.0 if spec.norm_branch else v * w * (spec.norm_in_scale if spec.norm_in else trunk)
            gate = spec.constant_gate
            ratio = (1.0 if gate is None else gate) * branch / (spec.alpha * trunk)
            out.append(SublayerEstimate(spec, v, w, trunk, ratio))
            trunk = 1.0 if spec.norm_out else spec.alpha * trunk * sqrt(1 + ratio**2)
    return out


def update_bound(model: ModelRecipe) -> float | None:
    """B, the sum of (v^2 + w^2) / alpha^2 over the post-norm sub-layers: 2N (v^2 + w^2) / alpha^2 where all are alike.

    DeepNet (arXiv:2203.00555, theorem 4.2) bounds the change of the model in one SGD step by a multiple of it. None for
    topologies it is not about (no norm after the add, or another before the branch).
    """
    terms = [(e.v**2 + e.w**2) / e.spec.alpha**2 for e in estimates(model) if e.spec.norm_out and not e.spec.norm_in]
    return sum(terms) if terms else None


def swallowed_from(model: ModelRecipe) -> int | None:
    """The number of blocks from which a BF16 stream loses branches of this topology to rounding.

    Returns:
        None where it loses none at model.num_blocks or below.
    """

    def swallowed(num_blocks: int) -> bool:
        deeper = model.model_copy(update={"num_blocks": num_blocks})
        # A learned gate finds its own size.
        constant = (e for e in estimates(deeper) if e.spec.constant_gate is not None)
        return any(e.branch_to_trunk < BF16_HALF_ULP for e in constant)

    low, high = 0, model.num_blocks
    if not swallowed(high):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if swallowed(middle) else (middle, high)
    return high


def _options_fit(model: ModelRecipe) -> Iterator[Finding]:
    wiring, options = topology(model.topology), model.topology_options
    for key, value in options.model_dump(exclude_none=True).items():
        if key not in wiring.options:
            yield Finding(
                "unused-option",
                f"model.topology_options.{key}={value} is not an option of model.topology={model.topology}; remove it",
                refused=True,
            )
    if model.init.distribution == "normal" and options.base_dim not in (None, model.dim):
        yield Finding(
            "completep-init",
            f"model.topology={model.topology} needs a variance that falls with width when base_dim={options.base_dim} "
            f"is not model.dim={model.dim}; set model.init.distribution=xavier",
            refused=True,
        )


def _combinations(model: ModelRecipe) -> Iterator[Finding]:
    wiring = topology(model.topology)
    spec = residual_at(model, model.num_blocks - 1, SUBLAYERS[-1])
    if wiring.requires_qk_norm and model.qk_norm == "none":
        yield Finding(
            "reordered-qk-norm",
            f"model.topology={model.topology} without model.qk_norm explodes with depth; "
            "set model.qk_norm=head or full",
            refused=True,
        )
    if model.init.scale_residual and spec.norm_in_scale != 1.0:
        yield Finding(
            "scaled-twice",
            f"model.init.scale_residual=true and model.topology={model.topology} both scale branches down with depth; "
            "set model.init.scale_residual=false",
            refused=True,
        )
    if model.init.scale_residual and spec.norm_in and "out" in spec.init_gain:
        yield Finding(
            "scaled-twice",
            f"model.init.scale_residual=true is already part of model.topology={model.topology}; remove it",
            refused=True,
        )
    if model.init.scale_residual and spec.norm_branch:
        yield Finding(
            "scaled-in-vain",
            f"model.init.scale_residual=true has no effect with model.topology={model.topology}, which normalises its "
            "branches; set model.init.scale_residual=false",
            refused=True,
        )


def _completep_base(model: ModelRecipe) -> Iterator[Finding]:
    unset = [k for k in ("base_dim", "base_num_blocks") if getattr(model.topology_options, k) is None]
    if "base_num_blocks" in topology(model.topology).options and unset:
        yield Finding(
            "completep-base",
            f"model.topology={model.topology} without model.topology_options.{' and '.join(unset)} scales nothing: "
            "it takes this model as the base whose settings are transferred",
        )


def _tied_self_match(model: ModelRecipe) -> Iterator[Finding]:
    if not model.tied_embeddings:
        return
    std, largest = default_embedding_std(model), model.dim**-0.5
    cosine = 1.0
    for estimate in estimates(model):
        learned = estimate.spec.constant_gate is None
        cosine /= sqrt(1.0 + (0.0 if learned else estimate.branch_to_trunk) ** 2)
    if std > largest * (1 + 1e-9) and cosine > 0.2:
        yield Finding(
            "tied-self-match",
            f"model.init.embedding_std={std:g} with tied embeddings: {model.topology} passes the input almost "
            f"unchanged at the start (cosine about {cosine:.2f}), so every token predicts itself; use at most "
            f"dim^-0.5 = {largest:.4g}, or untie",
            refused=True,
        )


def _update_bound(model: ModelRecipe) -> Iterator[Finding]:
    bound = update_bound(model)
    if bound is not None and not 0.5 <= bound <= 2.0:
        effect = (
            "the model changes faster with depth; warm-up or DeepNorm is needed"
            if bound > 2
            else "deep models learn slowly"
        )
        yield Finding(
            "update-bound",
            f"B = 2N(v^2 + w^2)/alpha^2 = {bound:.3g} for model.topology={model.topology} at {model.num_blocks} blocks "
            f"(DeepNorm keeps it at 1): {effect}",
        )


def _swallowed_updates(model: ModelRecipe, precision: PrecisionRecipe) -> Iterator[Finding]:
    if precision.stream != "bf16":
        return
    depth = swallowed_from(model)
    if depth is not None:
        yield Finding(
            "bf16-swallows",
            f"precision.residual_dtype=bf16 loses branches of model.topology={model.topology} to rounding "
            f"from {depth} blocks on (model.num_blocks={model.num_blocks}); use residual_dtype=fp32",
        )


def _embedding_rms(model: ModelRecipe) -> float:
    positions = default_position_std(model) if model.positions == "learned" else 0.0
    return sqrt((model.embedding_multiplier * default_embedding_std(model)) ** 2 + positions**2)


def _gains(model: ModelRecipe, sublayer: str, spec: ResidualSpec) -> tuple[float, float]:
    """v and w: standard deviations of a branch's two matrices relative to Xavier's."""
    q_dim, kv_dim, ffn = model.num_heads * model.head_width, model.kv_heads * model.head_width, model.ffn_width
    pair = (("v", kv_dim, model.dim), ("out", model.dim, q_dim)) if sublayer == "attention" else (
        ("up", ffn, model.dim), ("down", model.dim, ffn))  # fmt: skip
    v, w = (matrix_std(model, role, out, into, spec) / sqrt(2 / (out + into)) for role, out, into in pair)
    return v, w
