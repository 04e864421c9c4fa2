"""megaresnorm quantize: what INT8 and FP8 cost trained runs in validation loss."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megaresnorm.cli.arguments import (
    CHECKPOINT_OR_RUN,
    JsonFile,
    Words,
    check_json,
    count,
    examples,
    path,
    report,
    words,
)
from megaresnorm.errors import ConfigError
from megaresnorm.text import say

if TYPE_CHECKING:
    from megaresnorm.studies.quantize import Figures
    from megaresnorm.telemetry.log import Table

_Runs = Annotated[list[Path], typer.Argument(parser=path, metavar="RUN...", help=CHECKPOINT_OR_RUN)]
_WHICH = "int8-tensor, int8-channel, fp8-tensor, fp8-channel, separated by commas [all]"
_Formats = Annotated[Words | None, typer.Option(parser=words, metavar="A,B", help=_WHICH)]
_All = Annotated[bool, typer.Option("--all", help="embedding and output matrix, too, not the blocks' matrices alone")]
_INPUTS = "evaluate with quantized inputs of the linear layers as well (a scale for each token where rows have one)"
_Activations = Annotated[bool, typer.Option("--activations", help=_INPUTS)]
_Samples = Annotated[
    int | None, typer.Option(parser=count, metavar="N", help="validation samples of each set [train.eval_samples]")
]
_OUTPUT = "write the codes of one run in one format, with their scales"
_Output = Annotated[Path | None, typer.Option(parser=path, metavar="FOLDER", help=_OUTPUT)]


def add_to(app: typer.Typer) -> None:
    """Add the quantize command."""
    app.command(
        epilog=examples(
            "megaresnorm quantize runs/a runs/b --activations --json quantize.json",
            "megaresnorm quantize runs/a --formats fp8-channel --output runs/a-fp8",
        )
    )(quantize)


def quantize(
    runs: _Runs,
    *,
    formats: _Formats = None,
    everything: _All = False,
    activations: _Activations = False,
    samples: _Samples = None,
    output: _Output = None,
    json: JsonFile = None,
) -> None:
    """Evaluate trained runs with matrices as INT8 and FP8 (E4M3): a scale for each matrix, or for each output channel.

    The table has the validation loss as trained, what each format adds to it, and how far the largest element is from
    the RMS of a matrix; with --activations also of a linear layer's inputs, and their excess kurtosis.
    """
    from megaresnorm.convert.files import refuse_existing
    from megaresnorm.studies.quantize import SCHEMES, look, measure, num_evaluations, scheme
    from megaresnorm.studies.quantized_files import write_quantized
    from megaresnorm.telemetry.log import progress_bar

    chosen = list(dict.fromkeys(formats or SCHEMES))
    for name in chosen:
        scheme(name)
    if output is not None:
        if len(runs) > 1 or len(chosen) > 1:
            raise ConfigError(f"--output takes one run in one format, not {len(runs)} in {len(chosen)}: set --formats")
        refuse_existing(output)
    trained = [look(str(run), run) for run in runs]
    check_json(json)
    found = []
    with progress_bar("evaluating", len(runs) * num_evaluations(chosen, inputs=activations)) as bar:
        for run in trained:
            found.append(
                measure(run, chosen, samples=samples, everything=everything, inputs=activations, advance=bar.advance)
            )
    if output is not None:
        write_quantized(output, trained[0], chosen[0], found[0], everything=everything)
    setting = {"formats": chosen, "all": everything, "activations": activations}
    report(json, {"schema_version": 1, "setting": setting, "runs": [one.plain() for one in found]}, _table(found))
    if output is not None and str(json) != "-":
        say(f"written    {output}")


def _table(found: list[Figures]) -> Table:
    from megaresnorm.studies.quantize import INPUTS
    from megaresnorm.telemetry.log import Table

    table = Table(title="validation loss as trained, in nats a token, and its change")
    table.add_column("run", no_wrap=True)
    table.add_column("topology", no_wrap=True)
    headings = ["blocks", "loss", *(name.replace(INPUTS, " + inputs") for name in found[0].losses), "max|w|/rms"]
    headings += ["max|x|/rms", "kurtosis of x"] if found[0].input_peaks else []
    for heading in headings:
        table.add_column(heading.replace("-", "\n"), justify="right")
    for one in found:
        cells = [str(one.num_blocks), f"{one.trained:.5f}", *(f"{v - one.trained:+.5f}" for v in one.losses.values())]
        peaks = [one.weight_peaks, one.input_peaks, one.input_kurtosis]
        cells += [f"{max(figures.values()):.1f}" for figures in peaks if figures]
        table.add_row(one.run, one.topology, *cells)
    return table
