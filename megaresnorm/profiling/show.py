"""A profile as tables for a terminal, and what has changed since another one."""

from collections.abc import Iterator, Mapping
from math import hypot
from typing import Any

from megaresnorm.checkpoint.format import human_bytes
from megaresnorm.profiling.measures import ENOUGH
from megaresnorm.profiling.profile import COLUMNS, time_of, total_of
from megaresnorm.telemetry.log import Table

SIGMAS = 4.0  # of a difference of medians, from where on it is one: hundreds are looked at
LEAST = 0.05  # of the older time
_HEADINGS = {"input_grad": "(input", "weight_grad": "weight)"}  # within backward; the others' are their names


def summary_lines(profile: Mapping[str, Any]) -> list[str]:
    """The profile as a whole in a few lines, and what stands out."""
    step, whole, count = profile["step_ms"], profile["whole"], profile["num_steps"]
    lines = [
        f"profile   {count} step{'s' * (count != 1)} from step {profile['first_step']} on; {profile['device']}; "
        f"{profile['layout']}",
        f"step      {step['p50']:.1f} ms (p95 {step['p95']:.1f}, rank {step['rank']} is the slowest), "
        f"{profile['tokens_per_second']:,.0f} tokens/s, {_flops(profile)}",
    ]
    parts = [f"{name} {_share(whole[name], step)}" for name in ("data", "host", "unaccounted") if whole[name]]
    if whole["bubble"] is not None:
        ideal = f" (equal stages: {whole['ideal_bubble']:.1%})" if whole.get("ideal_bubble") else ""
        parts.insert(0, f"bubble {_share(whole['bubble'], step)}{ideal}")
    if whole.get("overhead") is not None:
        noise = "" if whole["overhead_noise"] is None else f" +- {whole['overhead_noise']:.1%}"
        parts.append(f"marks cost {whole['overhead']:.1%}{noise}")
    return [
        *lines,
        parts_line(profile),
        f"beside    {', '.join(parts)}",
        *([f"finding   {finding}" for finding in profile["findings"]] or ["finding   nothing stands out"]),
    ]


def _flops(profile: Mapping[str, Any]) -> str:
    text = f"{profile['tflops']:.3g} TFLOP/s a rank"
    if profile["mfu"] is None:
        return text
    hfu = "" if profile["hfu"] == profile["mfu"] else f", HFU {profile['hfu']:.1%}"
    return f"{text}, MFU {profile['mfu']:.1%}{hfu} of {profile['peak_tflops']:.3g}"


def _share(time: Mapping[str, float], step: Mapping[str, float]) -> str:
    return f"{time['p50'] / step['p50']:.1%}"


def rows_table(profile: Mapping[str, Any], *, worst_first: bool, most: int | None) -> Table:
    """The rows, milliseconds a step. Columns in which nothing happened are left out.

    Args:
        worst_first: by time; otherwise from the embedding to the output matrix.
        most: rows to show; None: all.
    """
    rows: list[dict[str, Any]] = list(profile["rows"])
    if worst_first:
        rows.sort(key=total_of, reverse=True)
    shown, several = rows[:most], len(profile["ranks"]) > 1
    columns = [column for column in COLUMNS if any(row[column] for row in rows)]
    left = "" if len(shown) == len(rows) else f"; {len(rows) - len(shown)} more rows are in profile.csv"
    table = Table(title=f"milliseconds a step, medians{left}")
    table.add_column("row", no_wrap=True)
    for heading in (
        "all",
        *(_HEADINGS.get(column, column) for column in columns),
        "TFLOP/s",
        "of peak",
        "kept",
        "params",
        "|grad|",
        "RMS",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    if several:
        table.add_column("rank", justify="right")
    for row in shown:
        slowest = max((row[column] for column in columns if row[column]), key=lambda time: time["p50"])
        cells = [f"{total_of(row):.2f}", *(_cell(row[column]) for column in columns)]
        cells.append("" if row["tflops"] is None else f"{row['tflops']:.3g}")
        cells.append("" if row["share_of_peak"] is None else f"{row['share_of_peak']:.0%}")
        cells += [_bytes(row[name]) for name in ("activation_bytes", "parameter_bytes")]
        cells += ["" if row[name] is None else f"{row[name]:.3g}" for name in ("gradient_norm", "stream_rms")]
        table.add_row(row["name"], *cells, *([str(slowest["rank"])] if several else []))
    return table


def _bytes(number: int | None) -> str:
    if number is None or number == 0:
        return ""
    return human_bytes(number) if number > 0 else f"-{human_bytes(-number)}"


def _cell(time: Mapping[str, float] | None) -> str:
    return "" if time is None else f"{time['p50']:.2f}"


def changes(new: Mapping[str, Any], old: Mapping[str, Any]) -> Iterator[tuple[str, str, float, float, float]]:
    """Columns of rows that differ by more than the noise of both: (row, column, old ms, new ms, noise ms).

    The noise is SIGMAS times the standard error of the difference of the medians.
    """
    before = {row["name"]: row for row in old["rows"]}
    pairs = [("step", "all", old["step_ms"], new["step_ms"]), ("all rows", "optimizer", _update(old), _update(new))]
    pairs += [
        (row["name"], column, before[row["name"]].get(column), row[column])
        for row in new["rows"]
        if row["name"] in before
        for column in COLUMNS
        if column != "optimizer"  # one time, of which each row has its share
    ]
    for name, column, was, now in pairs:
        if not was or not now or not was["p50"]:
            continue
        if was["noise"] is None or now["noise"] is None:
            continue
        noise = SIGMAS * hypot(was["noise"], now["noise"])
        if abs(now["p50"] - was["p50"]) > max(noise, LEAST * was["p50"]):
            yield name, column, was["p50"], now["p50"], noise


def _update(profile: Mapping[str, Any]) -> dict[str, Any] | None:
    """The time of the update, of all rows."""
    times = [row["optimizer"] for row in profile["rows"] if row.get("optimizer")]
    if not times:
        return None
    noises = [time["noise"] for time in times]
    return {"p50": sum(time["p50"] for time in times), "noise": None if None in noises else sum(noises)}


def comparison(new: Mapping[str, Any], old: Mapping[str, Any], most: int) -> Table:
    """What has changed since an older profile, the largest changes first.

    Args:
        most: rows to show.
    """
    found = sorted(changes(new, old), key=lambda one: -abs(one[3] - one[2]))
    names: tuple[set[str], set[str]] = ({row["name"] for row in new["rows"]}, {row["name"] for row in old["rows"]})
    gone = f"; {len(names[0] ^ names[1])} rows are in one of them alone" if names[0] != names[1] else ""
    title = f"{len(found)} changes beyond {SIGMAS:g} standard errors and {LEAST:.0%}{gone}"
    title = title if found else f"no change beyond the noise{gone}"
    few = [profile["step_ms"]["noise"] is None for profile in (new, old)]
    table = Table(title=f"a profile of fewer than {ENOUGH} steps tells no noise{gone}" if any(few) else title)
    for heading in ("row", "part", "old ms", "new ms", "change", "noise ms"):
        table.add_column(heading, justify="left" if heading in ("row", "part") else "right", no_wrap=True)
    for name, column, was, now, noise in found[:most]:
        table.add_row(name, column, f"{was:.2f}", f"{now:.2f}", f"{now / was - 1:+.1%}", f"{noise:.2f}")
    return table


def parts_line(profile: Mapping[str, Any]) -> str:
    """What norms and residual adds, branches and messages take of all that the rows take."""
    parts: dict[str, float] = {}
    for row in profile["rows"]:
        part = "blocks" if row["part"] == "block" else row["part"]
        own = time_of(row, "forward", "backward", "recompute", "optimizer")
        parts[part] = parts.get(part, 0.0) + own
        parts["exposed communication"] = parts.get("exposed communication", 0.0) + time_of(row, "exposed")
    whole = sum(parts.values())
    largest = sorted(parts.items(), key=lambda one: -one[1])
    return f"parts     {', '.join(f'{part} {time / whole:.1%}' for part, time in largest if time)}"
