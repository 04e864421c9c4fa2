#!/usr/bin/env python3
"""All that a GPU can be asked in one call of seven minutes: tests, kernels, training beside peers, a profile.

python tools/gpu_campaign.py --out campaign                     # needs torch, pydantic, pytest; Transformers for peers
python tools/gpu_campaign.py --out campaign --only deep,profile # once more what was mended; the rest stays
python tools/gpu_campaign.py --plan                             # the stages and their time, without running any
python tools/gpu_campaign.py --smoke --out /tmp/smoke           # every stage on a CPU, small

Every stage is a process of its own with a box of time; one that fails, hangs or runs out of memory costs itself alone.
campaign.json and campaign.md are written anew after every stage and name what was left out and why. With --results they
are also copied to FOLDER as DATE-gpu.json and DATE-gpu.md.
"""

import argparse
import datetime
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
# By value: what is wanted most comes first, and a later stage may find no time left. Seconds.
BOXES = {
    "machine": 15, "tests": 70, "kernels": 70, "dense": 130, "deep": 70, "profile": 30, "layers": 30, "trainer": 25,
}  # fmt: skip
HIDDEN = {"fails": 20, "hangs": 8}  # made to fail and to hang, for the tests of this tool
WRITING = 5  # seconds for the report
DEADLINE = 445


def main() -> int:
    arguments = parse()
    boxes = {name: (BOXES | HIDDEN)[name] for name in arguments.only}
    if arguments.plan:
        print(plan(boxes, arguments.deadline))
        return 0
    try:
        folder, target = Path(arguments.out), None if arguments.results is None else Path(arguments.results)
        for path in filter(None, (folder, target)):
            path.mkdir(parents=True, exist_ok=True)
        campaign = Campaign(folder, arguments.deadline, smoke=arguments.smoke)
    except (OSError, ValueError) as e:
        print(f"gpu_campaign: {e}", file=sys.stderr)
        return 2
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    for name, box in boxes.items():
        campaign.run(name, box * (4 if arguments.smoke and name in BOXES else 1))
    print(campaign.markdown())
    if target is not None:
        for end in ("json", "md"):
            shutil.copyfile(folder / f"campaign.{end}", target / f"{datetime.date.today()}-gpu.{end}")
    return 0 if all(stage["state"] == "done" for stage in campaign.stages.values()) else 1


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="folder for campaign.json and campaign.md")
    parser.add_argument("--only", default=",".join(BOXES), help=f"STAGE,... of {','.join(BOXES)} [all, in this order]")
    parser.add_argument("--deadline", type=int, default=DEADLINE, help=f"seconds in all [{DEADLINE}]")
    parser.add_argument("--results", metavar="FOLDER", help="copy the report there, dated (docs/results)")
    parser.add_argument("--smoke", action="store_true", help="tiny, on a CPU")
    parser.add_argument("--plan", action="store_true", help="print the stages and their time, and end")
    arguments = parser.parse_args()
    arguments.only = [name.strip() for name in arguments.only.split(",") if name.strip()] or list(BOXES)
    for name in arguments.only:
        if name not in BOXES | HIDDEN:
            parser.error(f"--only {name}: no such stage; choose of {','.join(BOXES)}")
    if not arguments.plan and not arguments.out:
        parser.error("--out FOLDER is missing")
    if arguments.smoke and arguments.results:
        parser.error("--results is for figures of a GPU, those of --smoke mean nothing")
    if arguments.deadline <= WRITING:
        parser.error(f"--deadline {arguments.deadline}: wanted more than {WRITING} seconds")
    return arguments


def _interrupt(number: int, frame: object) -> None:
    raise Interrupted(number)


class Interrupted(BaseException):
    """A signal, by its number."""


def plan(boxes: dict[str, int], deadline: int) -> str:
    lines, total = [], 0
    for name, box in boxes.items():
        total += box
        lines.append(
            f"{name:8} {box:4} s, ends by {total:4} s{'' if total + WRITING <= deadline else ': past the deadline'}"
        )
    return "\n".join([*lines, f"{'report':8} {WRITING:4} s, ends by {total + WRITING:4} s of {deadline} s"])


class Campaign:
    """Runs stages and keeps what they have found.

    Attributes:
        stages: by name, in the order of their first run: state (done, failed, out of time, left out), seconds, what was
            found, and the end of the output of one that failed.
    """

    def __init__(self, folder: Path, deadline: int, *, smoke: bool) -> None:
        self.folder, self.smoke, self.end = folder, smoke, time.monotonic() + deadline - WRITING
        commit = ["git", "-C", str(HERE), "rev-parse", "--short", "HEAD"]
        found = subprocess.run(commit, capture_output=True, text=True, check=False).stdout.strip()
        self.commit = found or "unknown"
        self.stages: dict[str, dict[str, Any]] = self._earlier()
        self.cache = tempfile.TemporaryDirectory(prefix="campaign-")  # what a stage compiles serves those after it

    def _earlier(self) -> dict[str, dict[str, Any]]:
        """The stages of an earlier call with the same folder."""
        file = self.folder / "campaign.json"
        if not file.exists():
            return {}
        try:
            report = json.loads(file.read_text())
            stages = report["stages"]
            table("", [item["row"] for stage in stages.values() for item in stage["found"] if "title" in item])
            if not all({"state", "why", "seconds", "commit", "date"} <= set(stage) for stage in stages.values()):
                raise KeyError("a stage without its state")
            smoke = report["smoke"]
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise ValueError(f"{file} is not of this tool ({type(e).__name__}); move it away") from None
        if smoke != self.smoke:
            raise ValueError(f"{file} is of a {'smoke run' if smoke else 'GPU'}; take another --out")
        return stages

    def run(self, name: str, box: int) -> None:
        """Run one stage in its box, or in what is left of the time."""
        left = self.end - time.monotonic()
        if left < min(box, 10) / 2:
            self._keep(name, {"state": "left out", "why": f"{max(left, 0):.0f} s were left", "seconds": 0, "found": []})
            return
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as temporary:
            found, output = Path(temporary, "found.jsonl"), Path(temporary, "output.txt")
            found.touch()
            try:
                state, why = self._process(name, min(box, left), found, output)
            except Interrupted as e:
                state, why = "interrupted", signal.Signals(e.args[0]).name
            lines = [line for line in found.read_text().splitlines() if line.endswith("}")]
            stage = {"state": state, "why": why, "seconds": round(time.monotonic() - start, 1)}
            stage["found"] = [json.loads(line) for line in lines]
            rows = [item["row"] for item in stage["found"] if "row" in item]
            failures = sum(bool(row.get("failed") or row.get("rc")) for row in rows)
            if state == "done" and failures:
                stage |= {"state": "done, with failures", "why": f"{failures} of {len(rows)} rows"}
            if state not in ("done", "interrupted"):
                stage["output"] = output.read_text(errors="replace")[-1500:]
        self._keep(name, stage)
        if state == "interrupted":
            sys.exit(128 + signal.Signals[why])

    def _process(self, name: str, box: float, found: Path, output: Path) -> tuple[str, str]:
        command = [sys.executable, str(HERE / "campaign_stages.py"), name, str(found)]
        paths = [str(HERE.parent), str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {"TORCHINDUCTOR_CACHE_DIR": self.cache.name, **os.environ, "TRANSFORMERS_OFFLINE": "1"}
        environment["PYTHONPATH"] = os.pathsep.join(paths)
        if self.smoke:
            command.append("--smoke")
            environment["OMP_NUM_THREADS"] = "1"
        with open(output, "wb") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
        try:
            code = process.wait(timeout=box)
            return ("done", "") if code == 0 else ("failed", f"exit code {code}")
        except subprocess.TimeoutExpired:
            return "out of time", f"ended after {box:.0f} s"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # also what it has started
            process.wait()

    def _keep(self, name: str, stage: dict[str, Any]) -> None:
        """Take over what a stage has found. One that found nothing now does not take the place of one that did."""
        earlier = self.stages.get(name)
        if earlier and earlier["found"] and not stage["found"]:
            stage = {**earlier, "state": stage["state"], "why": f"{stage['why']}; what is here is of an earlier run"}
        stage = {"commit": self.commit, "date": datetime.datetime.now().isoformat(timespec="seconds"), **stage}
        self.stages[name] = stage
        print(f"{name}: {stage['state']} {stage['why']} ({stage['seconds']} s)", file=sys.stderr, flush=True)
        report = {"schema_version": 1, "smoke": self.smoke, "stages": self.stages}
        for file, text in (
            ("campaign.json", json.dumps(report, indent=1) + "\n"),
            ("campaign.md", self.markdown()),
        ):
            new = self.folder / f".{file}"
            new.write_text(text)
            os.replace(new, self.folder / file)

    def markdown(self) -> str:
        """The report: a table for every title, and what was left out."""
        lines = ["# GPU campaign", ""]
        lines += ["A smoke run on a CPU, whose figures mean nothing."] if self.smoke else []
        lines += ["", "| stage | state | seconds | commit, time |", "| --- | --- | --- | --- |"]
        lines += [
            f"| {name} | {s['state']}{': ' * bool(s['why'])}{s['why']} | {s['seconds']} | {s['commit']}, {s['date']} |"
            for name, s in self.stages.items()
        ]
        lines += [f"| {name} | not run | | |" for name in BOXES if name not in self.stages]
        for name, stage in self.stages.items():
            lines += ["", f"## {name}", "", *(f"{item['note']}\n" for item in stage["found"] if "note" in item)]
            titles = dict.fromkeys(item["title"] for item in stage["found"] if "title" in item)
            for title in titles:
                lines += table(title, [item["row"] for item in stage["found"] if item.get("title") == title])
            if stage.get("output"):
                lines += ["```", stage["output"].replace("```", "'''").strip(), "```"]
        return "\n".join(lines) + "\n"


def table(title: str, rows: list[dict[str, Any]]) -> list[str]:
    """A table whose columns are the keys of all rows, in the order of their first appearance."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    cell = lambda value: "" if value is None else str(value).replace("|", "/").replace("\n", " ")  # noqa: E731
    return [
        f"**{title}**", "", f"| {' | '.join(keys)} |", "| --- " * len(keys) + "|",
        *(f"| {' | '.join(cell(row.get(key)) for key in keys)} |" for row in rows), "",
    ]  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
