"""What stands out in a profile, said with its name: a slow block, a slow rank, a slow loader, a slow collective."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import Any

# Above what is usual for its like by this factor, and by this share of the step, something stands out: a row of many
# hundreds, or a rank.
FACTOR, ROW_SHARE, SHARE = 1.5, 0.002, 0.01
NOISES = 4.0  # standard errors of the median
RANK_FACTOR = 1.1  # of a rank's own work over the median of the ranks that do the same
DATA_SHARE, HOST_SHARE = 0.05, 0.05
BUBBLE_FACTOR = 1.25
OVERHEAD = 0.03
UNACCOUNTED = 0.03
_WORDS = {
    "forward": "forward pass", "backward": "backward pass", "recompute": "recomputation",
    "exposed": "exposed communication",
}  # fmt: skip
MOST = 12  # findings of one kind


def findings_of(profile: Mapping[str, Any], ranks: Sequence[Mapping[str, Any]]) -> list[str]:
    """Sentences, the worst first within each kind; none of so few steps that their noise is not known.

    Args:
        profile: with rows and whole.
        ranks: what each rank has measured.
    """
    slow = list(_slow_ranks(ranks))
    return [*slow, *_slow_rows(profile, {rank for rank, _ in _slower(ranks)}), *_slow_parts(profile, ranks)]


def _slow_rows(profile: Mapping[str, Any], slow_ranks: set[int]) -> Iterator[str]:
    """Rows that take longer than others of their kind. Rows of a rank that is slow as a whole are not named again."""
    step = profile["step_ms"]["p50"]
    like: dict[tuple[str, str], list[tuple[float, dict[str, Any]]]] = defaultdict(list)
    for row in profile["rows"]:
        for column in _WORDS if row["block"] is not None else ():
            time = row[column] or {"p50": 0.0, "noise": 0.0, "rank": -1}
            if column == "exposed" or time["rank"] not in slow_ranks:
                like[row["part"], column].append((time["p50"], row))
    found = []
    for (_, column), times in like.items():
        usual = median(t for t, _ in times) if len(times) > 2 else min(t for t, _ in times)
        for time, row in times:
            noise = row[column]["noise"] if time else None
            if noise is None:
                continue
            if time > FACTOR * usual and time - usual > max(ROW_SHARE * step, NOISES * noise) and len(times) > 1:
                found.append((time - usual, row, column, time, usual))
    for _, row, column, time, usual in sorted(found, key=lambda one: -one[0])[:MOST]:
        who = f" on rank {row[column]['rank']}" if len(profile["ranks"]) > 1 else ""
        yield (
            f"{row['name']}: its {_WORDS[column]} takes {time:.2f} ms{who}, where that of others of its kind takes "
            f"{usual:.2f} ms"
        )


def _slower(ranks: Sequence[Mapping[str, Any]]) -> Iterator[tuple[int, tuple[float, float]]]:
    """Ranks whose own work takes longer than that of the ranks of the same stage: (rank, (ms, usual ms))."""
    stages: dict[int, list[Mapping[str, Any]]] = defaultdict(list)
    for rank in ranks:
        stages[rank["pp"]].append(rank)
    for alike in stages.values():
        for rank in alike:
            others = [one["totals"]["own_p50"] for one in alike if one is not rank]
            usual = median(others) if others else 0.0
            own = rank["totals"]["own_p50"]
            noise = rank["totals"]["own_noise"]
            if noise is None:
                continue
            least = max(SHARE * rank["totals"]["step"], NOISES * noise)
            if others and own > RANK_FACTOR * usual and own - usual > least:
                yield rank["rank"], (own, usual)


def _slow_ranks(ranks: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    by_rank = {rank["rank"]: rank for rank in ranks}
    for number, (own, usual) in sorted(_slower(ranks), key=lambda one: one[1][1] - one[1][0])[:MOST]:
        rank = by_rank[number]
        yield (
            f"rank {number} on {rank['host']}: its own work takes {own:.1f} ms a step, where that of the other ranks "
            f"takes {usual:.1f} ms; {_where(rank, [r for r in ranks if r['pp'] == rank['pp'] and r is not rank])}"
        )


def _where(rank: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> str:
    """In which row most of the difference lies, or that it is in all of them."""
    own_columns = ("forward", "backward", "recompute")

    def by_row(one: Mapping[str, Any]) -> dict[str, float]:
        return {r["name"]: sum(r["times"][c][0] for c in own_columns if c in r["times"]) for r in one["rows"]}

    mine, usual = by_row(rank), [by_row(one) for one in others]
    more = {name: time - median(one.get(name, 0.0) for one in usual) for name, time in mine.items()}
    total = sum(max(0.0, each) for each in more.values())
    worst = max(more, key=lambda name: more[name])
    if total and more[worst] > 0.5 * total:
        return f"most of it in {worst}"
    return "all of its parts are slower, which a slower or shared processor explains"


def _slow_parts(profile: Mapping[str, Any], ranks: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    step, whole = profile["step_ms"]["p50"], profile["whole"]
    data, host, other = whole["data"], whole["host"], whole["unaccounted"]
    if _stands_out(data, DATA_SHARE * step):
        yield (
            f"data: rank {data['rank']} waits {data['p50']:.1f} ms of each step for its samples "
            f"({data['p50'] / step:.1%}); put them on a faster disk, or give the loader a core"
        )
    if _stands_out(host, HOST_SHARE * step):
        yield f"host: {host['p50']:.1f} ms of each step pass between the step's end and its vector on the host"
    yield from _bubble(profile, ranks)
    noise = whole.get("overhead_noise")
    if noise is not None and whole["overhead"] - NOISES * noise > OVERHEAD:
        yield f"profiling itself: steps with marks take {whole['overhead']:.1%} longer than steps without"
    if _stands_out(other, UNACCOUNTED * step):
        yield (
            f"unaccounted: {other['p50']:.1f} ms of each step ({other['p50'] / step:.1%}) are in no row: telemetry, or "
            "what else the training loop does"
        )


def _stands_out(time: Mapping[str, Any] | None, least: float) -> bool:
    return time is not None and time["noise"] is not None and time["p50"] - NOISES * time["noise"] > least


def _bubble(profile: Mapping[str, Any], ranks: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    ideal = profile["whole"].get("ideal_bubble")
    if not ideal:
        return
    shares = {r["rank"]: r["totals"]["bubble"] / r["totals"]["step"] for r in ranks}
    worst, by_rank = max(shares, key=lambda rank: shares[rank]), {r["rank"]: r for r in ranks}
    if shares[worst] > BUBBLE_FACTOR * ideal:
        busiest = max(ranks, key=lambda r: r["totals"]["own"])
        others = median(r["totals"]["own"] for r in ranks if r["pp"] != busiest["pp"])
        most = busiest["totals"]["own"]
        why = "the work of all stages is alike, so that it is sending, or the machine; use more microbatches"
        if busiest["pp"] != by_rank[worst]["pp"] and most > RANK_FACTOR * others:
            why = (
                f"rank {busiest['rank']} has the most work, {most:.1f} ms where others have {others:.1f}: move blocks "
                "away from its stages (parallel.stage_blocks), or use more microbatches"
            )
        yield (
            f"bubble: rank {worst} waits {shares[worst]:.1%} of a step for other stages, where equal stages would wait "
            f"{ideal:.1%}; {why}"
        )
