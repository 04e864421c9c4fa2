"""The GPU campaign on a CPU: every stage runs, one that fails or hangs costs itself alone, and its time adds up."""

import json
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest

TOOL = Path(__file__).parents[1] / "tools" / "gpu_campaign.py"
STAGES = ["machine", "tests", "kernels", "dense", "deep", "profile", "layers", "trainer"]
pytest.importorskip("transformers")


def campaign(*arguments):
    return subprocess.run([sys.executable, str(TOOL), *arguments], capture_output=True, text=True, check=False)


def test_the_plan_adds_up_to_less_than_seven_and_a_half_minutes():
    done = campaign("--plan")
    lines = [
        re.fullmatch(r"(\w+) +(\d+) s, ends by +(\d+) s(?: of (\d+) s)?", line) for line in done.stdout.splitlines()
    ]
    assert all(lines), done.stdout
    names, boxes, ends = ([line[i] for line in lines] for i in (1, 2, 3))
    assert names == [*STAGES, "report"]
    assert int(ends[-1]) == sum(map(int, boxes)) <= int(lines[-1][4]) <= 450


@pytest.mark.parametrize("stages", [STAGES[-2:], pytest.param(STAGES, marks=pytest.mark.slow)], ids=["two", "all"])
def test_a_smoke_run_goes_through_all_stages(tmp_path, stages):
    done = campaign("--smoke", "--out", str(tmp_path / "out"), "--only", ",".join(stages))
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((tmp_path / "out" / "campaign.json").read_text())
    assert report["schema_version"] == 1 and all(stage["commit"] for stage in report["stages"].values())
    assert {name: stage["state"] for name, stage in report["stages"].items()} == dict.fromkeys(stages, "done")
    rows = [
        (item["title"], item["row"]) for stage in report["stages"].values() for item in stage["found"] if "row" in item
    ]
    assert not [row for _, row in rows if "failed" in row]
    for title, contenders in (("dense, 2 x 32", 6), ("deep, 3 x 32", 4)):
        losses = [row["losses"] for t, row in rows if t == title]
        assert len(losses) == (contenders if stages == STAGES else 0)
        for found in losses:  # BF16 products, summed in another order
            assert found == pytest.approx(losses[0], abs=0.02) and found[1] < found[0]
    assert all(row["rc"] == 0 for title, row in rows if title in ("tests", "trainer"))
    assert sum(title == "profile by block" for title, _ in rows) == 2
    made = sorted(path.name for path in (tmp_path / "out").rglob("*"))
    assert made == ["campaign.json", "campaign.md"]


def test_a_stage_that_fails_or_hangs_costs_itself_alone(tmp_path):
    out, start = tmp_path / "out", time.monotonic()
    done = campaign("--smoke", "--out", str(out), "--only", "fails,hangs,machine", "--deadline", "90")
    assert done.returncode == 1 and time.monotonic() - start < 60
    stages = json.loads((out / "campaign.json").read_text())["stages"]
    assert {name: stage["state"] for name, stage in stages.items()} == {
        "fails": "failed", "hangs": "out of time", "machine": "done"
    }  # fmt: skip
    assert "this stage is made to fail" in stages["fails"]["output"]
    assert stages["fails"]["found"] == [{"title": "fails", "row": {"name": "before the error"}}]
    assert stages["hangs"]["found"] == [{"title": "hangs", "row": {"name": "before it hangs"}}]
    text = (out / "campaign.md").read_text()
    assert "| dense | not run | | |" in text and "made to fail" in text

    # Once more, with no time left: what was found stays, and what is left out is named.
    done = campaign("--smoke", "--out", str(out), "--only", "machine,deep", "--deadline", "6")
    stages = json.loads((out / "campaign.json").read_text())["stages"]
    assert done.returncode == 1 and stages["deep"]["state"] == "left out"
    assert stages["machine"]["found"] and "earlier run" in stages["machine"]["why"]
    assert set(stages) == {"fails", "hangs", "machine", "deep"}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--out", "x", "--only", "dance"], "--only dance: no such stage; choose of machine,"),
        ([], "--out FOLDER is missing"),
        (["--out", "x", "--deadline", "3"], "--deadline 3: wanted more than 5 seconds"),
        (["--out", "x", "--smoke", "--results", "y"], "--results is for figures of a GPU"),
        (["--out", "/proc/nope"], "gpu_campaign: "),
        (["--out", "/dev/full"], "gpu_campaign: "),
    ],
)
def test_a_wrong_argument_costs_one_line(arguments, says):
    done = campaign(*arguments)
    assert done.returncode == 2 and says in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    "content",
    [
        '{"stages": ',
        "[]",
        '{"smoke": true, "stages": {"machine": {}}}',
        '{"smoke": true, "stages": {"machine": {"found": []}}}',
        '{"smoke": true, "stages": {"a": {"found": [3]}}}',
    ],
)
def test_a_report_that_is_no_report_is_left_alone(tmp_path, content):
    (tmp_path / "campaign.json").write_text(content)
    done = campaign("--smoke", "--out", str(tmp_path), "--only", "machine")
    assert done.returncode == 2 and "is not of this tool" in done.stderr and done.stderr.count("\n") == 1
    assert (tmp_path / "campaign.json").read_text() == content


def test_smoke_and_real_figures_are_never_in_one_report(tmp_path):
    (tmp_path / "campaign.json").write_text('{"smoke": false, "stages": {}}')
    done = campaign("--smoke", "--out", str(tmp_path), "--only", "machine")
    assert done.returncode == 2 and "is of a GPU; take another --out" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_the_stage_and_keeps_what_it_has_found(tmp_path, number):
    command = [sys.executable, str(TOOL), "--smoke", "--out", str(tmp_path), "--only", "hangs,machine"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while "hangs" not in (children := stages_of(process.pid)) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert "hangs" in children
        time.sleep(3)  # until it has written its row
        process.send_signal(number)
        assert process.wait(30) == 128 + number
        assert "Traceback" not in process.stderr.read()
    assert not stages_of(process.pid), children
    stages = json.loads((tmp_path / "campaign.json").read_text())["stages"]
    assert stages["hangs"]["state"] == "interrupted" and "machine" not in stages


def stages_of(parent: int) -> str:
    """Command lines of the stages that a campaign has started, also of those that outlived it."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            command = (folder / "cmdline").read_text().replace("\0", " ")
            above = (folder / "stat").read_text().rpartition(")")[2].split()[1]
            if "campaign_stages.py" in command and above in (str(parent), "1"):
                found.append(command)
    return "\n".join(found)


def event(device, us):
    return SimpleNamespace(device_type=f"DeviceType.{device}", self_device_time_total=us, self_cpu_time_total=7)


def test_time_on_a_gpu_is_counted_once():
    """Operators of the CPU have the time of the kernels that they launched."""
    sys.path.insert(0, str(TOOL.parent))
    import campaign_stages

    kernels, spent = campaign_stages.kernels_of([event("CPU", 50), event("CUDA", 50)])
    assert [spent(kernel) for kernel in kernels] == [50]
    kernels, spent = campaign_stages.kernels_of([event("CPU", 0)])
    assert [spent(kernel) for kernel in kernels] == [7]
