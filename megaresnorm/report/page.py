"""The page: one HTML file with its style and figures inside. It loads nothing, and needs no script."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from math import isfinite
from typing import Any

from megaresnorm.recipe.load import dump_recipe
from megaresnorm.report import profile
from megaresnorm.report.columns import number
from megaresnorm.report.compare import differing_settings
from megaresnorm.report.drawing import Figure
from megaresnorm.report.facts import COLUMNS, CONVENTION, Card, cards_of, facts_of
from megaresnorm.report.incidents import HEADINGS, incident_rows, spent_rows
from megaresnorm.report.runs import RunFiles
from megaresnorm.report.style import STYLE
from megaresnorm.text import shown

SPIKE = (
    "A spike is a loss above the mean of the 128 steps before it (at least 64) plus 6 of their standard deviations, as "
    "in OLMo-core's SkipStep; guard.spike refuses steps by another rule, their median plus 6 robust deviations."
)


def page_of_run(run: RunFiles, figures: Mapping[str, Sequence[Figure]]) -> str:
    """The page of one run.

    Args:
        figures: by the heading under which they stand.
    """
    body = [
        f'<header><h1>{_text(run.name)}</h1><p class="state {run.state.split()[0]}">{_text(run.state)}</p></header>',
        _problems(run.problems),
        _cards(cards_of(run)),
        _facts(run),
        _incidents(run),
        *(_section(heading, found) for heading, found in figures.items() if heading != "Profile"),
        "" if run.profile is None else _profile(run.profile, figures.get("Profile", ())),
        f"<footer><p>{escape(SPIKE)} {escape(CONVENTION)}</p></footer>",
    ]
    return _page(run.name, body)


def page_of_runs(runs: Sequence[RunFiles], figures: Sequence[Figure]) -> str:
    """The page of several runs beside each other."""
    names = [run.name for run in runs]
    table = [[name, *(cell(run) for cell in COLUMNS.values())] for name, run in zip(names, runs, strict=True)]
    settings = [[key, *values] for key, values in differing_settings(runs).items()]
    body = [
        f"<header><h1>{len(runs)} runs</h1></header>",
        _problems([line for run in runs for line in run.problems]),
        "<section><h2>Side by side</h2>", _table(["run", *COLUMNS], table), "</section>",
        _section("Curves", figures),
        "<section><h2>Settings that differ</h2>",
        _table(["setting", *names], settings) if settings else "<p>None but train.output.</p>", "</section>",
        f"<footer><p>{escape(SPIKE)} {escape(CONVENTION)}</p></footer>",
    ]  # fmt: skip
    return _page(" / ".join(names), body)


def _page(title: str, body: Iterable[str]) -> str:
    head = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(title)}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n<main>\n"
    )
    return head + "\n".join(filter(None, body)) + "\n</main>\n</body>\n</html>\n"


def _text(value: object) -> str:
    """Text of whatever origin: no markup, no control characters."""
    return escape(shown(value))


def _problems(lines: Sequence[str]) -> str:
    return f'<ul class="problems">{"".join(f"<li>{_text(line)}</li>" for line in lines)}</ul>' if lines else ""


def _cards(cards: Sequence[Card]) -> str:
    inner = "".join(
        f'<div class="card"><h3>{_text(card.title)}</h3><p class="value">{_text(card.value)}</p>'
        f'<p class="note">{_text(card.note)}</p></div>'
        for card in cards
    )
    return f'<section class="cards" aria-label="Headline figures">{inner}</section>'


def _facts(run: RunFiles) -> str:
    rows = "".join(f"<div><dt>{_text(key)}</dt><dd>{_text(value)}</dd></div>" for key, value in facts_of(run).items())
    settings = ""
    if run.recipe is not None:
        text = escape(shown(dump_recipe(run.recipe, full=False), lines=True))
        settings = f"<details><summary>Settings that differ from the defaults</summary><pre>{text}</pre></details>"
    return f"<section><h2>The run</h2><dl>{rows}</dl>{settings}</section>"


def _incidents(run: RunFiles) -> str:
    rows, spent = incident_rows(run.incidents), spent_rows(run.metrics)
    found = f"<section><h2>What happened</h2>{_table(HEADINGS, rows)}</section>" if rows else ""
    if spent:
        found += f"<section><h2>Where the time went</h2>{_table(('time', 'seconds', 'share'), spent)}</section>"
    return found


def _section(heading: str, figures: Sequence[Figure]) -> str:
    if not figures:
        return ""
    return f'<section><h2>{_text(heading)}</h2><div class="figures">{"".join(map(_figure, figures))}</div></section>'


def _figure(figure: Figure) -> str:
    return (
        f'<figure id="{_text(figure.name)}"><h3>{_text(figure.title)}</h3>{figure.svg}'
        f"<figcaption>{_text(figure.caption)}</figcaption></figure>"
    )


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{_text(name)}</th>" for name in headings)
    cells = "".join(f"<tr>{''.join(f'<td>{_text(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>{cells}</tbody></table></div>'


def _profile(found: Mapping[str, Any], figures: Sequence[Figure]) -> str:
    rows = [
        [
            str(row.get("name", "")),
            *(_ms(row.get(name)) for name in ("forward", "backward", "recompute", "exposed", "optimizer")),
            f"{profile.total(row):.3g}",
            _figure_of(row.get("tflops"), 1, ""),
            _figure_of(row.get("share_of_peak"), 100, " %"),
            _figure_of(row.get("activation_bytes"), 1e-6, ""),
        ]
        for row in profile.slowest(found)
    ]
    headings = ["row", "forward ms", "backward ms", "recompute ms", "exposed ms", "optimizer ms", "all ms", "TFLOP/s",
                "of peak", "activations MB"]  # fmt: skip
    findings = [line for line in found.get("findings") or [] if isinstance(line, str)][:50]
    parts = [
        "<section><h2>Profile of a step</h2>",
        f"<p>{_text(_made(found))}</p>",
        f'<ul class="findings">{"".join(f"<li>{_text(line)}</li>" for line in findings)}</ul>' if findings else "",
        _cards(_profile_cards(found)),
        f'<div class="figures">{"".join(map(_figure, figures))}</div>',
        f"<h3>The {len(rows)} slowest rows</h3>" + _table(headings, rows) if rows else "",
        "</section>",
    ]
    return "".join(parts)


def _made(found: Mapping[str, Any]) -> str:
    first, num = found.get("first_step"), found.get("num_steps")
    what = ", ".join(str(found[name]) for name in ("layout", "device", "made") if found.get(name))
    convention = str(found.get("convention") or "")
    return f"{num} steps from step {first}: {what}. FLOP/s: {convention}." if convention else f"{num} steps: {what}"


def _profile_cards(found: Mapping[str, Any]) -> list[Card]:
    given = found.get("whole")
    whole: Mapping[str, Any] = given if isinstance(given, dict) else {}
    cards = [Card("Step", f"{_ms(found.get('step_ms'))} ms", _spread(found.get("step_ms")))]
    if isinstance(whole.get("bubble"), dict):
        ideal, step = _figure_of(whole.get("ideal_bubble"), 100, " %"), profile.median(found.get("step_ms"))
        share = _figure_of(profile.median(whole["bubble"]) / step if step else None, 100, " %")
        of = f"of a step; {ideal} with equal stages" if ideal else "of a step"
        cards.append(Card("Pipeline bubble", share or f"{_ms(whole['bubble'])} ms", of if share else ""))
    for title, name in (("Waiting for data", "data"), ("Host", "host"), ("Unaccounted", "unaccounted")):
        if isinstance(whole.get(name), dict):
            cards.append(Card(title, f"{_ms(whole[name])} ms"))
    for title, name, factor, unit in (("TFLOP/s a rank", "tflops", 1, ""), ("MFU", "mfu", 100, " %"),
                                      ("HFU", "hfu", 100, " %")):  # fmt: skip
        if value := _figure_of(found.get(name), factor, unit):
            cards.append(Card(title, value))
    if value := _figure_of(whole.get("overhead"), 100, " %"):
        cards.append(Card("Overhead of profiling", value))
    return cards


def _ms(time: Any) -> str:
    return f"{profile.median(time):.3g}" if isinstance(time, dict) else ""


def _spread(time: Any) -> str:
    return f"95 % below {_figure_of(time.get('p95'), 1, ' ms')}" if isinstance(time, dict) and "p95" in time else ""


def _figure_of(value: Any, factor: float, unit: str) -> str:
    return f"{number(value) * factor:.3g}{unit}" if isfinite(number(value)) else ""
