#!/usr/bin/env python3
"""Memory and time of recompute policies beside none: the same weights and batch, one thread, in turn.

python tools/bench_recompute.py --save runs/recompute
python tools/bench_recompute.py --device cuda --dim 1024 --seq-len 2048 --deterministic --save runs/recompute
python tools/bench_recompute.py --auto --topologies deepnorm --compute fp32
python tools/bench_recompute.py --thousand

A row says what tensors take after the forward pass ("kept") and at most during a step ("peak"), beyond weights and
gradients, which are there before; what share of that none takes is saved; the time of a step, forward and backward of
one sequence, over that of none; and whether losses and gradients are those of none bit for bit. Bytes are counted
allocation by allocation: on a CPU by the profiler, on a GPU by its allocator. Times are taken in pairs, none and the
policy in turn, by the process's CPU time or the GPU's events; a ratio is the median of the pairs' ratios, its quartiles
behind it, and that of none to itself shows how much they vary. User time is without the system's, which maps memory
again that an allocator or a system short of memory has taken from the larger step of two. "B" are kept bytes a token,
block and column.

With --auto policy auto gets five budgets between the least and the most memory that a policy needs, and is timed beside
every other policy that is within the budget; "planned" is what a dry run tells, "measured" the peak, both without
weights and gradients. With --thousand 500 blocks, 1,000 sub-layers, train for 20 steps under each policy.

On a GPU some kernels add in any order unless --deterministic is given, and numbers are then not the same bit for bit,
none's with itself either.
"""

import argparse
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import recompute_runs as runs  # before torch
import torch
from bench_train import machine
from recompute_runs import Case, Trained, equal, race, recipe_of, section

from megaresnorm.data.loader import StepBatch
from megaresnorm.errors import ConfigError, UserError
from megaresnorm.kernels.deterministic import set_deterministic
from megaresnorm.memory import MemoryPerRank, memory_of_stages
from megaresnorm.model.topology import TOPOLOGIES
from megaresnorm.parallel.mesh import Sizes
from megaresnorm.recompute_auto import plan_recompute

POLICIES = ("none", "norm", "attention", "ffn", "branch", "block", "every")
MIB = 2**20
BUDGETS = 5
STEPS, LR = 20, 1e-3  # of --thousand


class Parser(argparse.ArgumentParser):
    """One whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def main() -> None:
    a = parse()
    torch.set_num_threads(1)
    try:
        if a.deterministic:
            set_deterministic(torch.device(a.device))
        report = {"machine": where(a.device), "command": shlex.join(["tools/bench_recompute.py", *sys.argv[1:]])}
        print(f"{report['machine']}; {a.blocks} blocks x {a.dim}, sequence {a.seq_len}")
        measure = print_thousand if a.thousand else print_auto if a.auto else print_policies
        results: list[dict] = []
        for topology in a.topologies:
            for compute in a.compute:
                case = Case(topology, compute, a.blocks, a.dim, a.seq_len, a.device, a.deterministic)
                results += [case._asdict() | row for row in measure(case, a)]
                if a.save:
                    (a.save / "recompute.json").write_text(json.dumps(report | {"results": results}, indent=1) + "\n")
        if a.save and not (a.auto or a.thousand):
            draw(results, report["machine"], a.save / "recompute.png")
    except UserError as e:
        print(f"bench_recompute.py: error: {e}", file=sys.stderr)
        sys.exit(e.exit_code)


def parse() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--auto", action="store_true", help="policy auto beside the others, at five budgets")
    what.add_argument("--thousand", action="store_true", help="20 steps of 1,000 sub-layers under each policy")
    add("--topologies", type=words(TOPOLOGIES), help="A,B [pre,deepnorm,keel,peri; of --thousand deepnorm]")
    add("--compute", type=words(("fp32", "bf16")), help="A,B [fp32,bf16; of --thousand fp32]")
    add("--policies", type=words(POLICIES), help=f"A,B [{','.join(POLICIES)}; of --thousand branch,every,block]")
    add("--every", type=count, help="blocks of policy every [10; of --thousand 22]")
    add("--offload", action="store_true", help="block and every once more with recompute.offload")
    add("--blocks", type=count, help="[100; of --thousand 500]")
    add("--dim", type=count, default=256, help="[256]")
    add("--seq-len", type=count, help="[512; of --thousand 256]")
    add("--rounds", type=count, default=7, help="pairs of steps for each ratio [7]")
    add("--none", action="store_true", help="of --thousand: policy none, too, which keeps 2 GiB of activations")
    add("--device", choices=["cpu", "cuda"], default="cpu", help="[cpu]")
    add("--deterministic", action="store_true", help="on a GPU: kernels that add in one order, as train.deterministic")
    add("--save", type=Path, metavar="FOLDER", help="write recompute.json and, of policies, recompute.png there")
    a = parser.parse_args()
    a.topologies = a.topologies or (["deepnorm"] if a.thousand else ["pre", "deepnorm", "keel", "peri"])
    a.compute = a.compute or (["fp32"] if a.thousand else ["fp32", "bf16"])
    a.policies = a.policies or (["branch", "every", "block"] if a.thousand else list(POLICIES))
    for name, usual, of_thousand in (("every", 10, 22), ("blocks", 100, 500), ("seq_len", 512, 256)):
        setattr(a, name, getattr(a, name) or (of_thousand if a.thousand else usual))
    a.policies = [f"every {a.every}" if name == "every" else name for name in a.policies]
    a.policies += [f"{name}, offload" for name in a.policies if a.offload and name.split()[0] in ("block", "every")]
    if a.none and not a.thousand:
        parser.error("--none is of --thousand; elsewhere it is one of --policies")
    if a.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here")
    if a.save:
        try:
            a.save.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            parser.error(f"--save {a.save}: {e.strerror}")
    return a


def words(known: Any) -> Callable[[str], list[str]]:
    """Words with commas between them, each one of ``known``."""

    def read(text: str) -> list[str]:
        for word in text.split(","):
            if word not in known:
                raise argparse.ArgumentTypeError(f"{word!r} is none of {', '.join(known)}")
        return text.split(",")

    return read


def count(text: str) -> int:
    """A number of 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted a whole number of 1 or more")
    return int(text)


def where(device: str) -> str:
    return f"{torch.cuda.get_device_name()}, torch {torch.__version__}" if device == "cuda" else machine()


def progress(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


# --- memory and time by policy ----------------------------------------------------------------------------------------


def print_policies(case: Case, a: argparse.Namespace) -> list[dict]:
    """A row for each policy, beside none."""
    progress(f"{case.topology} {case.compute}: none, for comparison")
    none = Trained(case, section("none"))
    numbers, at_none = [tensor.clone() for tensor in none.outcome()], none.memory()
    print(f"\n{'':26}     kept      B   saved      peak   saved   time of none's          user time   equal")
    rows = []
    for policy in a.policies:
        progress(f"{case.topology} {case.compute}: {policy}")
        try:
            trained = Trained(case, section(policy), like=none)
        except ConfigError as e:
            if "offload" not in policy:
                raise
            progress(f"{policy} is left out: {e}")
            continue
        same = equal(trained.outcome(), numbers)
        memory, times = trained.memory(), race(trained, none, a.rounds)
        saved = [1 - of / most for of, most in ((memory.kept, at_none.kept), (memory.peak, at_none.peak))]
        per_token = memory.kept / (case.blocks * case.dim * case.seq_len)
        print(
            f"{case.topology:9} {case.compute} {policy:18} {memory.kept / MIB:7.1f} {per_token:6.2f}  {saved[0]:6.1%} "
            f"{memory.peak / MIB:9.1f}  {saved[1]:6.1%}   {times.ratio:.3f} ({times.low:.3f}-{times.high:.3f})     "
            f"{times.user_ratio:.3f}       {'yes' if same else 'NO'}"
            + (f"  {memory.left:,} bytes are left" if memory.left else ""),
            flush=True,
        )
        row = {"policy": policy, **memory._asdict(), "kept_saved": saved[0], "peak_saved": saved[1]}
        rows.append(row | {"equal": same, **times._asdict()})
    return rows


# --- policy auto ------------------------------------------------------------------------------------------------------


def print_auto(case: Case, a: argparse.Namespace) -> list[dict]:
    """Policy auto at several budgets, and the others that are within each."""
    planned = {policy: plan(case, section(policy)) for policy in a.policies}
    totals = [memory.total for memory in planned.values()]
    least, most = min(totals), max(totals)
    if least == most:
        raise ConfigError(
            f"every policy needs {least:,} bytes in all, so that no budget tells them apart; try a larger --seq-len"
        )
    print(f"\n{'':16}    budget  policy               planned  measured  measured/planned   time of auto's")
    rows: list[dict] = []
    for i in range(BUDGETS):
        budget = least + (most - least) * (i + 1) // (BUDGETS + 1)
        recompute = {"policy": "auto", "budget": budget}
        progress(f"{case.topology} {case.compute}: a budget of {budget:,} bytes")
        auto = Trained(case, recompute)
        rows.append(auto_row(case, "auto", budget, plan(case, recompute), auto, auto, a.rounds))
        for policy, memory in planned.items():
            if memory.total <= budget:
                other = Trained(case, section(policy), like=auto)
                rows.append(auto_row(case, policy, budget, memory, other, auto, a.rounds))
    return rows


def plan(case: Case, recompute: dict[str, Any]) -> MemoryPerRank:
    """What a dry run tells of the one rank."""
    recipe, kind = recipe_of(case, recompute), case.device
    auto = recipe.recompute.policy == "auto"
    segments = plan_recompute(recipe, Sizes(), recompute["budget"], device_type=kind) if auto else None
    (memory,) = memory_of_stages(recipe, Sizes(), device_type=kind, segments=segments)
    return memory


def auto_row(
    case: Case, policy: str, budget: int, planned: MemoryPerRank, trained: Trained, auto: Trained, rounds: int
) -> dict[str, Any]:
    """Print and return the row of a policy within a budget, beside policy auto with that budget."""
    auto.step()
    trained.step()
    times, memory = race(trained, auto, rounds), trained.memory()
    peak = planned.activations + planned.passing
    print(
        f"{case.topology:9} {case.compute}  {budget / MIB:10.1f}  {policy:18} {peak / MIB:9.1f} "
        f"{memory.peak / MIB:9.1f} {memory.peak / peak:17.3f}   {times.ratio:.3f} ({times.low:.3f}-{times.high:.3f})",
        flush=True,
    )
    row = {"policy": policy, "budget": budget, "planned": asdict(planned), "planned_peak": peak}
    return row | memory._asdict() | times._asdict()


# --- a thousand sub-layers --------------------------------------------------------------------------------------------


def print_thousand(case: Case, a: argparse.Namespace) -> list[dict]:
    """Memory, time and losses of steps with the optimizer, under each policy."""
    planned = plan(case, section("none"))
    kept = planned.activations + planned.logits
    print(f"\n{2 * case.blocks:,} sub-layers, {case.topology}, {case.compute}, {STEPS} steps of AdamW each")
    print(f"{'':24}    kept      peak  of none's   seconds a step   losses")
    print(f"{'none, by formula':20} {kept / MIB:11.1f}")
    rows: list[dict] = [{"policy": "none", "by_formula": True, "kept": kept}]
    first: list[float | None] = []
    for policy in [*(["none"] if a.none else []), *a.policies]:
        progress(f"{case.topology} {case.compute}: {policy}")
        trained = Trained(case, section(policy))
        losses, seconds = train(case, trained)
        trained.fresh_gradients()
        memory = trained.memory()
        del trained  # before the next one is built
        first = first or losses
        same = losses == first and None not in losses
        print(
            f"{policy:20} {memory.kept / MIB:11.1f} {memory.peak / MIB:9.1f} {memory.kept / kept:10.1%} "
            f"{statistics.median(seconds):16.2f}   {losses[0]:.6f} -> {losses[-1]:.6f}  "
            f"{'the first' if losses is first else 'the same, bit for bit' if same else 'OTHERS'}",
            flush=True,
        )
        rows.append({"policy": policy, **memory._asdict(), "losses": losses, "equal": same, "seconds": seconds})
    return rows


def train(case: Case, trained: Trained) -> tuple[list[float | None], list[float]]:
    """Losses and seconds of steps with the optimizer, from the initial weights."""
    trained.engine._optimizer.zero_grad()
    losses: list[float | None] = []

    def step(batch: StepBatch) -> None:
        losses.append(trained.engine.step(batch, LR).loss)

    seconds = [trained.seconds(partial(step, batch)).all for batch in runs.random_batches(case, STEPS)]
    return losses, seconds


# --- the figure -------------------------------------------------------------------------------------------------------


def draw(results: list[dict], title: str, path: Path) -> None:
    """Time over memory: a panel for each compute type, a colour for each topology, a marker for each policy."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.lines import Line2D

    computes, topologies, policies = (
        list(dict.fromkeys(row[key] for row in results)) for key in ("compute", "topology", "policy")
    )
    markers = dict(zip(policies, "osv^DPX*hd<>", strict=False))
    figure, axes = pyplot.subplots(1, len(computes), figsize=(5.5 * len(computes), 4.4), squeeze=False, sharey=True)
    for axis, compute in zip(axes[0], computes, strict=True):
        for row in (row for row in results if row["compute"] == compute):
            colour = f"C{topologies.index(row['topology'])}"
            axis.plot(row["kept"] / MIB, row["ratio"], markers[row["policy"]], color=colour, alpha=0.8)
        axis.set(title=compute.upper(), xlabel="kept after the forward pass, MiB", xlim=(0, None))
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("time of a step, none = 1")
    handles = [Line2D([], [], color=f"C{i}", label=name) for i, name in enumerate(topologies)]
    handles += [Line2D([], [], color="grey", ls="", marker=marker, label=name) for name, marker in markers.items()]
    axes[0][-1].legend(handles=handles, fontsize="small", ncols=2)
    figure.suptitle(title, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
