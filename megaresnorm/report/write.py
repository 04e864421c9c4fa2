"""Writing a report: the page, and its figures as PNGs in a folder beside it."""

from collections.abc import Sequence
from pathlib import Path

from megaresnorm.errors import ConfigError
from megaresnorm.files import replace_file
from megaresnorm.report.compare import MOST_RUNS, compared
from megaresnorm.report.curves import curves_of
from megaresnorm.report.depth import depth_figures, numbers_figures
from megaresnorm.report.drawing import Figure, check_matplotlib
from megaresnorm.report.page import page_of_run, page_of_runs
from megaresnorm.report.profile import profile_figures
from megaresnorm.report.runs import RunFiles, read_runs


def write_report(folders: Sequence[Path], out: Path | None = None, now: float | None = None) -> Path:
    """Write the page of one run, or of several beside each other. Runs that go on are read as they are.

    Args:
        folders: output folders of runs.
        out: the page, NAME.html, with its figures in a folder NAME beside it; None: report.html in the first run's
            folder. What stood there is replaced.
        now: as ``read_runs`` takes it.

    Returns:
        The page.

    Raises:
        ConfigError: a folder is no run, matplotlib is missing, or the page cannot be written.
    """
    page = folders[0] / "report.html" if out is None else out
    if page.suffix != ".html":
        raise ConfigError(f"--out {page}: wanted a file NAME.html, beside which the figures are put in a folder NAME")
    if len(folders) > MOST_RUNS:
        raise ConfigError(f"{len(folders)} runs are more than lines of a figure can tell apart; give up to {MOST_RUNS}")
    if any((page.with_suffix("") / name).exists() for name in ("metrics.jsonl", "recipe.yaml")):
        raise ConfigError(f"--out {page}: its figures would lie among the files of the run {page.with_suffix('')}")
    if page.with_suffix("").is_symlink():
        raise ConfigError(
            f"{page.with_suffix('')}: a link stands where the figures are put, which is not followed; remove it"
        )
    check_matplotlib()
    runs = read_runs(list(folders), now)
    if len(runs) == 1:
        by_heading = _figures(runs[0])
        text, figures = page_of_run(runs[0], by_heading), [one for some in by_heading.values() for one in some]
    else:
        figures = [*compared(runs)]
        text = page_of_runs(runs, figures)
    _write(page, text, figures)
    return page


def _figures(run: RunFiles) -> dict[str, list[Figure]]:
    return {
        "Training": [*curves_of(run.metrics, run.marks)],
        "Depth": [*depth_figures(run.depth)],
        "Numbers": [*numbers_figures(run.numbers)],
        "Profile": [] if run.profile is None else [*profile_figures(run.profile)],
    }


def _write(page: Path, text: str, figures: Sequence[Figure]) -> None:
    folder = page.with_suffix("")
    try:
        page.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(exist_ok=True)
        for figure in figures:
            replace_file(folder / f"{figure.name}.png", figure.png)
        replace_file(page, text)
    except OSError as e:
        raise ConfigError(f"{e.filename or page}: the report cannot be written ({e.strerror})") from None
