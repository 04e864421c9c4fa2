"""tools/bench_recompute.py: its table is that of a measurement by hand, and its order of policies the expected one."""

import json
import re
import sys
import weakref
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
import bench_recompute
from recompute_runs import Case, Seconds, Times, Trained, equal, race, section

CASE = Case("deepnorm", "fp32", blocks=6, dim=64, seq_len=64)
SMALL = ["--blocks", "6", "--dim", "64", "--seq-len", "64", "--every", "3", "--rounds", "1"]


class Storages(TorchDispatchMode):
    """Bytes of the storages that operators have made and that are alive."""

    def __init__(self):
        super().__init__()
        self.alive = {}

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        known = {t.untyped_storage()._cdata for t in tree_leaves((arguments, options)) if isinstance(t, torch.Tensor)}
        made = function(*arguments, **(options or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in known:
                storage = tensor.untyped_storage()
                self.alive[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.alive.pop, storage._cdata, None)
        return made


def tool(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["bench_recompute.py", *map(str, arguments)])
    bench_recompute.main()


def test_the_table_is_that_of_a_measurement_by_hand_and_policies_save_in_their_order(monkeypatch, capsys, tmp_path):
    tool(monkeypatch, *SMALL, "--topologies", "deepnorm", "--compute", "fp32", "--save", tmp_path)
    rows = {row["policy"]: row for row in json.loads((tmp_path / "recompute.json").read_text())["results"]}
    assert list(rows) == ["none", "norm", "attention", "ffn", "branch", "block", "every 3"]
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("deepnorm")]
    assert len(lines) == len(rows) and all(line.endswith("yes") for line in lines)
    assert all(row["equal"] and row["left"] == 0 for row in rows.values())
    kept = [row["kept"] for row in rows.values()]
    assert kept == sorted(kept, reverse=True)
    assert rows["every 3"]["peak"] > rows["block"]["peak"]  # what three blocks keep exists at once

    trained = Trained(CASE, section("branch"))
    trained.step()
    with Storages() as storages:
        objective = trained.forward()[1]
        by_hand = sum(storages.alive.values())
        del objective
    assert by_hand == rows["branch"]["kept"]
    printed = re.split(r"\s+", lines[4])
    assert printed[:3] == ["deepnorm", "fp32", "branch"]
    assert printed[3] == f"{by_hand / 2**20:.1f}" and printed[5] == f"{1 - by_hand / kept[0]:.1%}"
    assert (tmp_path / "recompute.png").stat().st_size > 10_000


def test_equal_means_every_bit():
    one = [torch.tensor([0.0, 1.0]), torch.tensor(2.0, dtype=torch.float64)]
    assert equal(one, [tensor.clone() for tensor in one])
    assert not equal(one, [torch.tensor([-0.0, 1.0]), one[1]])
    assert not equal(one, [one[0], one[1] + 1e-15])


def test_another_policy_shares_weights_and_gradients():
    one = Trained(CASE, section("none"))
    other = Trained(CASE, section("branch"), like=one)
    before = [gradient.clone() for gradient in one.outcome()[2:]]
    other.step()
    assert all(torch.equal(p.grad, 2 * gradient) for p, gradient in zip(one.parameters, before, strict=True))
    assert race(one, other, 1) != race(one, other, 3)


def test_a_ratio_is_the_median_of_the_pairs():
    class Slow:
        def __init__(self, *seconds):
            self.seconds = iter([Seconds(each, each / 2) for each in seconds]).__next__

    assert race(Slow(2.0, 9.0, 4.0), Slow(1.0, 3.0, 4.0), 3) == Times(2.0, 1.5, 2.5, 15 / 8, 4.0)


def test_a_thousand_sub_layers_lose_the_same_under_every_policy(monkeypatch, capsys):
    tool(monkeypatch, "--thousand", *SMALL, "--none")
    rows = capsys.readouterr().out.splitlines()
    assert [line[:20].strip() for line in rows[-5:]] == ["none, by formula", "none", "branch", "every 3", "block"]
    assert sum(line.endswith("the same, bit for bit") for line in rows) == 3


@pytest.mark.slow
def test_auto_is_timed_beside_every_policy_within_the_budget(monkeypatch, capsys):
    small = [*SMALL, "--seq-len", "512", "--policies", "none,branch,block"]
    tool(monkeypatch, "--auto", *small, "--topologies", "deepnorm", "--compute", "fp32")
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("deepnorm")]
    assert sum(row[3] == "auto" for row in rows) == bench_recompute.BUDGETS
    assert any(row[3] == "block" for row in rows) and not any(row[3] == "none" for row in rows)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--every", "0"], "argument --every: got '0', wanted a whole number of 1 or more"),
        (["--policies", "norm,all"], "argument --policies: 'all' is none of none, norm, "),
        (["--none"], "--none is of --thousand; elsewhere it is one of --policies"),
        (["--dim", "130"], "model.head_dim=65 must be even"),
        ([*SMALL, "--every", "7"], "recompute.every=7 is more than model.num_blocks=6"),
        (["--save", __file__], f"--save {__file__}: File exists"),
    ],
)
def test_bad_arguments_are_told_in_one_line(monkeypatch, capsys, arguments, said):
    with pytest.raises(SystemExit) as exit_:
        tool(monkeypatch, *arguments)
    lines = [line for line in capsys.readouterr().err.splitlines() if not re.match(r"\d\d:\d\d:\d\d ", line)]
    assert exit_.value.code == 2 and len(lines) == 1
    assert lines[0].startswith("bench_recompute.py: error: ") and said in lines[0]
