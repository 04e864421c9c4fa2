"""Topologies trained side by side on equal data, steps and seeds, at several depths; the learning rate each bears."""

import csv
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from io import BytesIO, StringIO
from math import inf, isfinite
from pathlib import Path
from statistics import mean
from typing import Any

from megaresnorm.data.dataset import json_digest
from megaresnorm.data.samples import unigram_entropy
from megaresnorm.data.training_data import open_data
from megaresnorm.errors import ConfigError, NonFiniteError
from megaresnorm.files import replace_file
from megaresnorm.model.topology import beside_others, topology
from megaresnorm.recipe import Recipe
from megaresnorm.recipe.load import apply_override, build_recipe, read_recipe
from megaresnorm.recipe.names import under_first_names
from megaresnorm.resilience.signals import StopSignals
from megaresnorm.run import Run
from megaresnorm.studies.results import Outcome, Result, kept_result
from megaresnorm.trainer import Trainer

log = logging.getLogger(__name__)

# Nats below the unigram entropy that a smoothed loss must reach to have learned more than token frequencies.
LEFT_UNIGRAM = 0.2
SMOOTHING = 0.9
LAST = 10  # steps whose mean is the final loss
HIGHEST_LR = 5e-2  # at the end of a ramp, unless the recipe says otherwise
SET_BY_COMPARISON = ("model.topology=", "model.num_blocks=", "train.seed=", "train.output=")

# A model that a CPU trains in a minute; the figures in the README were made with it.
DEFAULTS: dict[str, Any] = {
    "model": {"dim": 48, "num_heads": 2, "ffn_dim": 96, "seq_len": 64, "ffn": "gelu", "norm": "layernorm",
              "norm_bias": False, "positions": "learned"},
    "train": {"steps": 150, "global_batch": 8, "eval_every": 0, "sample_tokens": 0, "loggers": [],
              "log_every": 50},
    "checkpoint": {"every": 0},
    "optim": {"lr": 1e-3},
    "schedule": {"kind": "constant"},
}  # fmt: skip


@dataclass(frozen=True)
class Comparison:
    """The runs of a comparison: every topology at every depth with every seed.

    Attributes:
        out: folder of the runs and the report.
        depths: numbers of blocks.
        base: sections of a recipe; topology, depth, seed and output are filled in.
        ramp: raise the learning rate linearly from 0 to optim.lr over the run, to see where a topology stops learning.
    """

    out: Path
    topologies: Sequence[str]
    depths: Sequence[int]
    seeds: Sequence[int]
    base: dict[str, Any]
    ramp: bool = False


def base_recipe(path: str | None, data: str | None, overrides: Sequence[str], ramp: bool = False) -> dict[str, Any]:
    """The sections of a recipe that all runs share.

    Args:
        path: a recipe file; None for DEFAULTS.
        data: takes the place of data.path and data.blend; None to leave them.
        overrides: of the form section.key=value.
        ramp: as in ``Comparison``; unless the file sets optim.lr, the ramp ends at HIGHEST_LR.

    Raises:
        ConfigError: an override is of something that every run sets for itself, or the recipe is malformed.
    """
    values = json.loads(json.dumps(DEFAULTS)) if path is None else read_recipe(path)
    values = {name: {} if section is None else section for name, section in values.items()}
    _check_sections(values)
    if ramp and (path is None or "lr" not in values.get("optim", {})):
        values["optim"] = {**values.get("optim", {}), "lr": HIGHEST_LR}
    for override in overrides:
        for own in (*SET_BY_COMPARISON, *(["schedule."] if ramp else [])):
            if override.startswith(own):
                raise ConfigError(
                    f"{override} has no effect here: every run of a comparison sets {own.rstrip('.=')} itself"
                )
        apply_override(values, override)
        _check_sections(values)
    section = values.setdefault("data", {})
    if data is not None:
        values["data"] = {**{k: v for k, v in section.items() if k != "blend"}, "path": data}
    return values


def _check_sections(values: dict[str, Any]) -> None:
    for key, section in values.items():
        if not isinstance(section, dict):
            raise ConfigError(f"{key}: wanted a section with keys, got a {type(section).__name__}")


def recipe_of(comparison: Comparison, name: str, num_blocks: int, seed: int) -> Recipe:
    """The recipe of one run. Settings that a topology needs beside others are added, unless the base says otherwise."""
    values = json.loads(json.dumps(comparison.base))
    sections = {key: values.get(key, {}) for key in ("model", "train")}
    output = str(comparison.out / "runs" / f"{name}-{num_blocks}-seed{seed}")
    values["model"] = {**beside_others(name), **sections["model"], "topology": name, "num_blocks": num_blocks}
    values["train"] = {**sections["train"], "seed": seed, "output": output}
    if comparison.ramp:
        values["schedule"] = {"kind": "constant", "warmup_steps": sections["train"].get("steps", 1)}
    return build_recipe(values)


def compare(comparison: Comparison, stop: StopSignals, advance: Callable[[], None] = lambda: None) -> Iterator[Result]:
    """Train the runs that are not done yet. A run that was interrupted goes on from its checkpoint.

    Yields:
        Results in the order of topologies, depths and seeds, until ``stop`` has received a signal.

    Raises:
        ConfigError: ``comparison.out`` holds runs with other settings or data.
    """
    for name in comparison.topologies:
        topology(name)
    runs = [(n, d, s) for n in comparison.topologies for d in comparison.depths for s in comparison.seeds]
    recipes = [recipe_of(comparison, *run) for run in runs]
    data = open_data(recipes[0].data).whole_digest
    for run, recipe in zip(runs, recipes, strict=True):
        settings = under_first_names(recipe.model_dump(exclude={"train": {"output", "device"}}))
        request = json_digest({"recipe": settings, "data": data})
        result = kept_result(Path(recipe.train.output), request, run)
        if result is None:
            result = _train(recipe, *run, comparison.ramp, request, stop)
            if result is None:
                return
        advance()
        yield result


def judge(
    losses: Sequence[float], rates: Sequence[float], unigram: float, ramp: bool
) -> tuple[float, float, Outcome, float | None]:
    """Judge a run by the loss and learning rate of every step.

    It has learned if the smoothed loss came LEFT_UNIGRAM below the unigram entropy, and lost it at the last step from
    which on the smoothed loss stayed above half of the way back. Having learned nothing is a failure at a learning rate
    of 0: such a run never diverges. A step with a non-finite loss was refused and changed nothing.

    Returns:
        (least smoothed loss, learning rate there, outcome, max_lr), as in ``Result``.
    """
    smoothed: list[float] = []
    level = inf
    for loss in losses:
        if isfinite(loss):
            level = SMOOTHING * level + (1 - SMOOTHING) * loss if isfinite(level) else loss
        smoothed.append(level if isfinite(loss) else inf)
    best = min(smoothed, default=inf)
    if best > unigram - LEFT_UNIGRAM:
        return best, rates[smoothed.index(best)] if smoothed else 0.0, "unigram level", 0.0 if ramp else None
    lr_at_best, limit = rates[smoothed.index(best)], (best + unigram) / 2
    last_good = max(i for i, value in enumerate(smoothed) if value <= limit)
    if last_good == len(smoothed) - 1:
        return best, lr_at_best, "trains", None
    return best, lr_at_best, "lost", rates[last_good] if ramp else None


def _train(
    recipe: Recipe, name: str, depth: int, seed: int, ramp: bool, request: str, stop: StopSignals
) -> Result | None:
    """Train one run, and keep its result in its folder; None if it was stopped."""
    with Run(recipe) as run:
        replace_file(run.output / "request.json", json.dumps({"request": request}))
        valid_loss, diverged = None, False
        try:
            summary = Trainer(run).train(stop)
            if summary.exit_code:
                return None
            valid_loss = summary.valid_loss
        except NonFiniteError as e:  # refused steps in a row: that is a result
            log.warning("%s, %d blocks, seed %d: %s", name, depth, seed, e)
            diverged = True
    records = [json.loads(line) for line in (run.output / "metrics.jsonl").read_text().splitlines()]
    losses = [inf if r["loss"] is None else r["loss"] for r in records]
    unigram = unigram_entropy(run.samples.token_shares())
    best, lr_at_best, outcome, max_lr = judge(losses, [r["lr"] for r in records], unigram, ramp)
    if diverged and outcome == "trains":
        finite = [r["lr"] for r in records if r["loss"] is not None]
        outcome, max_lr = "lost", finite[-1] if ramp else None
    result = Result(
        topology=name,
        num_blocks=depth,
        seed=seed,
        final_loss=inf if diverged else mean(losses[-LAST:]),
        valid_loss=valid_loss,
        unigram_entropy=unigram,
        best=best,
        lr_at_best=lr_at_best,
        outcome=outcome,
        max_lr=max_lr,
        losses=losses,
    )
    replace_file(run.output / "result.json", json.dumps({"request": request, "result": asdict(result)}))
    return result


@dataclass(frozen=True)
class Summary:
    """One topology at one depth.

    Attributes:
        seeds: number of runs.
        final_loss, valid_loss: means over seeds, as in ``Result``.
        spread: largest less smallest final loss.
        outcome: the different outcomes, joined by commas.
        max_lr: of each seed, as in ``Result``.
    """

    topology: str
    num_blocks: int
    seeds: int
    final_loss: float
    spread: float
    valid_loss: float | None
    outcome: str
    max_lr: list[float | None]


def summarize(results: Sequence[Result]) -> list[Summary]:
    """A row for each topology and depth, in the order of the results."""
    rows = []
    for key in dict.fromkeys((r.topology, r.num_blocks) for r in results):
        same = [r for r in results if (r.topology, r.num_blocks) == key]
        finals, valids = [r.final_loss for r in same], [r.valid_loss for r in same if r.valid_loss is not None]
        rows.append(
            Summary(
                *key,
                seeds=len(same),
                final_loss=mean(finals),
                spread=max(finals) - min(finals) if all(map(isfinite, finals)) else inf,
                valid_loss=mean(valids) if len(valids) == len(same) else None,
                outcome=", ".join(dict.fromkeys(r.outcome for r in same)),
                max_lr=[r.max_lr for r in same],
            )
        )
    return rows


def markdown(comparison: Comparison, results: Sequence[Result]) -> str:
    """The table of the README: a row for each topology, a column for each depth."""
    rows = summarize(results)
    measure = (
        "learning rate at which what was learned was lost, one a seed" if comparison.ramp else "mean loss (spread)"
    )
    lines = [
        f"{measure.capitalize()}; {len(comparison.seeds)} seeds, {len(results[0].losses)} steps, unigram entropy "
        f"{results[0].unigram_entropy:.3f} nats.",
        "",
    ]
    depths = list(dict.fromkeys(row.num_blocks for row in rows))
    lines += [
        "| topology | " + " | ".join(f"{2 * depth} sub-layers" for depth in depths) + " |",
        "| --- " * (1 + len(depths)) + "|",
    ]
    for name in dict.fromkeys(row.topology for row in rows):
        cells = [
            _cell(row, comparison)
            for depth in depths
            for row in rows
            if (row.topology, row.num_blocks) == (name, depth)
        ]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(row: Summary, comparison: Comparison) -> str:
    if comparison.ramp:
        highest = recipe_of(comparison, row.topology, row.num_blocks, 0).optim.lr
        return ", ".join(
            f"> {highest:g}" if lr is None else "never learned" if lr == 0 else f"{lr:.2g}" for lr in row.max_lr
        )
    note = "" if row.outcome == "trains" else f": {row.outcome}"
    return f"{row.final_loss:.3f} ({row.spread:.3f}){note}"


def write_report(comparison: Comparison, results: Sequence[Result]) -> list[Path]:
    """Write comparison.md, comparison.csv (a line a step), and comparison.png where matplotlib is installed.

    Returns:
        The files written.

    Raises:
        ConfigError: ``comparison.out`` cannot be written.
    """
    out = comparison.out
    try:
        replace_file(out / "comparison.md", markdown(comparison, results))
        lines = StringIO()
        table = csv.writer(lines)
        table.writerow(["topology", "num_blocks", "seed", "step", "loss"])
        for r in results:
            table.writerows([r.topology, r.num_blocks, r.seed, step, loss] for step, loss in enumerate(r.losses))
        replace_file(out / "comparison.csv", lines.getvalue())
        written = [out / "comparison.md", out / "comparison.csv"]
        return [*written, out / "comparison.png"] if _draw(results, out / "comparison.png") else written
    except OSError as e:
        raise ConfigError(f"{out}: cannot be written ({e.strerror})") from None


def _draw(results: Sequence[Result], path: Path) -> bool:
    """Draw loss curves: a panel for each depth, a colour for each topology, a line for each seed.

    Returns:
        False where matplotlib is missing.
    """
    try:
        import matplotlib
    except ImportError:
        log.warning("warning: no figure, since matplotlib is missing; pip install matplotlib")
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    depths = list(dict.fromkeys(r.num_blocks for r in results))
    names = list(dict.fromkeys(r.topology for r in results))
    figure, panels = pyplot.subplots(1, len(depths), figsize=(5 * len(depths), 3.8), sharey=True, squeeze=False)
    for panel, depth in zip(panels[0], depths, strict=True):
        for r in (r for r in results if r.num_blocks == depth):
            label = r.topology if r.seed == results[0].seed else None
            panel.plot(_running_mean(r.losses), color=f"C{names.index(r.topology)}", label=label, linewidth=1.2)
        panel.axhline(results[0].unigram_entropy, color="grey", linestyle=":", linewidth=1, label="unigram entropy")
        panel.set(title=f"{2 * depth} sub-layers", xlabel="step")
        panel.grid(alpha=0.3)
    lowest = min(r.best for r in results)  # of short runs above the unigram entropy
    top = max(results[0].unigram_entropy + 0.6, lowest + 1.0)
    panels[0][0].set(ylabel="loss, nats (mean of 10 steps)", ylim=(lowest - 0.1, top))
    panels[0][-1].legend(fontsize="small")
    figure.tight_layout()
    picture = BytesIO()
    figure.savefig(picture, dpi=120, format="png")
    replace_file(path, picture.getvalue())
    pyplot.close(figure)
    return True


def _running_mean(losses: Sequence[float]) -> list[float]:
    return [mean(losses[max(0, i - LAST + 1) : i + 1]) for i in range(len(losses))]
