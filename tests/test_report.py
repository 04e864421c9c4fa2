"""A run's page: complete, harmless whatever names and settings hold, the same twice, also of a run that goes on."""

import json
import math
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import time
from html import escape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from report_files import BLOCKS, write_lines, write_run

from megaresnorm.cli import main
from megaresnorm.report.columns import read_columns
from megaresnorm.report.depth import thinned_records
from megaresnorm.report.depth_records import OverTime, depth_over_time
from megaresnorm.report.marks import marks_of, smoothed, spikes_of, thinned
from megaresnorm.report.runs import read_runs
from megaresnorm.report.write import write_report

NOW = 2e9
OF_TRAINING = ["loss", "gradient_norm", "learning_rate", "loss_scale", "throughput", "peak_memory"]
OF_DEPTH = [
    f"depth_{name}"
    for name in ("stream_rms", "branch_ratio", "angular_distance", "gradient_norm", "update_ratio", "logit_max",
                 "attention_entropy", "collapse", "effective_depth", "path_length", "paths")
]  # fmt: skip
OF_PROFILE = ["profile_time", "profile_memory", "profile_ranks"]
VOID = {"meta", "link", "img", "br", "hr", "input"}
LOADS = {"src", "href", "xlink:href", "srcset", "data", "action", "poster"}


class Page(HTMLParser):
    """A page as a parser sees it, which fails where tags are not balanced or something would be loaded."""

    def __init__(self, path: Path):
        super().__init__()
        self.open, self.tags, self.ids, self.text, self.drawn, self.figures, self.refers = [], [], [], [], [], {}, set()
        text = path.read_text(encoding="utf-8")
        self.feed(text)
        self.close()
        assert not self.open and not re.search(r"@import|url\((?!#)", text)
        assert len(self.ids) == len(set(self.ids)) and self.refers <= set(self.ids)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.tags.append(tag)
        self.ids += [given["id"]] if "id" in given else []
        for name, value in given.items():
            assert not name.startswith("on"), (tag, name)
            if name in LOADS:
                assert value.startswith(("#", "data:image/png;base64,")), (tag, name, value)
                self.refers |= {value[1:]} if value.startswith("#") else set()
            self.refers |= set(re.findall(r"url\(#([^)]*)\)", value or ""))
        if tag == "figure":
            self.figures[given["id"]] = None
        if tag == "svg":
            self.figures[[*self.figures][-1]] = (given["role"], given["aria-label"])
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)
        self.drawn += [data] if "svg" in self.open else []

    @property
    def words(self):
        return " ".join(" ".join(self.text).split())


def page_of(*folders, now=NOW, out=None):
    return Page(write_report([*folders], out, now))


def files_under(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_page_has_every_figure_and_nothing_but_it_is_written(tmp_path):
    run = write_run(tmp_path / "run", precision={"compute": "fp8"}, train={"max_skipped_steps": 7})
    before = files_under(run)
    page = page_of(run)
    wanted = [*OF_TRAINING, *OF_DEPTH, "numbers_underflown", *OF_PROFILE]
    assert [*page.figures] == wanted and all(page.figures[name][0] == "img" for name in wanted)
    assert all(page.figures[name][1] for name in wanted) and "script" not in page.tags
    for words in ("deepnorm, 6 blocks = 12 sub-layers, width 64", "200 of 200 steps", "max_skipped_steps: 7",
                  "block 2 ffn takes 4 ms longer", "4 % with equal stages", "The 10 slowest rows",
                  "Spikes 1 step 150", "Refused or skipped 1 step 120"):  # fmt: skip
        assert words in page.words, words
    after = files_under(run)
    pngs = {f"report/{name}.png" for name in wanted}
    assert after.keys() - before.keys() == {"report.html", *pngs} and before.items() <= after.items()
    assert all(after[name].startswith(b"\x89PNG") for name in pngs)


def test_the_same_files_make_the_same_page_and_figures(tmp_path):
    run = few_figures(write_run(tmp_path / "run", numbers=False))
    assert [*page_of(run).figures] == ["loss", "depth_stream_rms", *OF_PROFILE]
    before = files_under(run)
    page_of(run)
    assert files_under(run) == before


def few_figures(run):
    """Of the files of a run only what a few figures show: each takes a fifth of a second."""
    for name, kept in (("metrics.jsonl", ("step", "loss", "time")), ("depth.jsonl", ("schema_version", "step"))):
        records = [json.loads(line) for line in (run / name).read_text().splitlines()]
        streams = [record.get("by_sublayer", {}).get("stream_rms") for record in records]
        cut = [{key: record[key] for key in kept} for record in records]
        cut = [
            one | ({"by_sublayer": {"stream_rms": row}} if row else {}) for one, row in zip(cut, streams, strict=True)
        ]
        write_lines(run / name, cut)
    return run


def test_names_and_settings_are_text_whatever_they_hold(tmp_path):
    hostile = "<script>alert(1)</script>\"'&$x^2$ \x1b[2J"
    bare = {"depth": False, "numbers": False}
    run = write_run(tmp_path / hostile.replace("/", "~"), data={"path": hostile.replace("$", "")},
                    train={"output": "out"}, **bare)  # fmt: skip
    found = json.loads((run / "profile" / "profile.json").read_text())
    found["findings"], found["rows"][1]["name"], found["device"] = [hostile], hostile, "<img src=x onerror=alert(1)>"
    (run / "profile" / "profile.json").write_text(json.dumps(found))
    other = write_run(tmp_path / "_<b>other", **bare)
    page = page_of(run)
    assert not {"script", "img", "b"} & set(page.tags) and page.words.count("<script>alert(1)</script>") >= 4
    third = write_run(tmp_path / "$x^2$", **bare, train={"output": "out"})
    page = page_of(run, other, third, out=tmp_path / "both.html")
    assert not {"script", "img", "b"} & set(page.tags) and "_<b>other" in page.words
    assert {" _<b>other", "$x^2$"} <= {*page.drawn}
    assert "\x1b" not in (tmp_path / "both.html").read_text()


def test_a_run_that_goes_on_is_shown_as_far_as_it_is_written(tmp_path):
    run, lock = write_run(tmp_path / "run", steps=200, done=120, profile=False), tmp_path / "run" / ".lock"
    few_figures(run)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 121, "loss": 3.0')
    with (run / "depth.jsonl").open("a") as file:
        file.write('{"schema_version": 1, "step": 130, "ki')
    lock.write_text('{"pid": 1}')
    os.utime(lock, (NOW, NOW))
    page = page_of(run, now=NOW + 20)
    assert "going on: 120 of 200 steps" in page.words and "cannot be read" not in page.words

    def state(now):
        (found,) = read_runs([run], now)
        return found.state

    assert state(NOW + 100) == "stopped"
    lock.write_text("")
    os.utime(lock, (NOW, NOW))
    assert state(NOW) == "stopped"
    lock.unlink()  # a copy
    assert (state(1.7e9 + 42), state(1.7e9 + 102)) == ("going on", "stopped")


def test_what_is_not_recorded_is_not_shown(tmp_path):
    quiet = write_run(tmp_path / "quiet", done=50, depth=False, profile=False)
    (quiet / "numbers.jsonl").write_text((quiet / "numbers.jsonl").read_text().replace("0.00", "0.0e"))  # zeros
    assert "nothing saturates or underflows in 5 records" in page_of(quiet).words
    page = page_of(write_run(tmp_path / "alone", recipe=False, depth=False, numbers=False, profile=False))
    assert [*page.figures] == OF_TRAINING and "recipe.yaml: cannot be read" in page.words
    assert "Depth" not in page.words and "Profile" not in page.words
    begun = write_run(tmp_path / "begun", done=0, depth=False, numbers=False, profile=False)
    assert "not begun: 0 of 200 steps" in page_of(begun).words


def test_losses_that_are_not_numbers_leave_gaps(tmp_path):
    run = write_run(tmp_path / "run", depth=False, numbers=False, profile=False)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        record |= {"lr": None, "peak_memory": None, "tokens_per_second": None, "loss_scale": None}
    for record in records[30:40]:
        record["loss"] = record["gradient_norm"] = None
    write_lines(run / "metrics.jsonl", records)
    page = page_of(run)
    assert "step 31, 32, 33, 34, ..." in page.words and [*page.figures] == ["loss", "gradient_norm"]
    for record in records:
        record["loss"] = record["gradient_norm"] = None
    write_lines(run / "metrics.jsonl", records)
    assert "loss" not in page_of(run).figures


def test_several_runs_are_laid_over_each_other(tmp_path):
    runs = [
        write_run(tmp_path / "a" / "run", train={"max_skipped_steps": 7}),
        write_run(tmp_path / "b" / "run", blocks=8, model={"topology": "keel"}, done=150),
        write_run(tmp_path / "c" / "run", depth=False),
    ]
    page = page_of(*runs, out=tmp_path / "three.html")
    depth = [f"runs_{name}" for name in OF_DEPTH[:8]]
    assert [*page.figures] == ["runs_loss", "runs_valid_loss", "runs_gradient_norm", "runs_throughput", *depth]
    assert all(name in page.words for name in ("a/run", "b/run", "c/run"))
    assert "model.topology deepnorm keel deepnorm" in page.words and "train.max_skipped_steps 7 10 10" in page.words
    assert sorted(path.name for path in (tmp_path / "three").iterdir()) == sorted(f"{n}.png" for n in page.figures)
    assert not (runs[0] / "report.html").exists()


def test_a_run_that_was_trained_and_taken_up_again_has_its_page(tiny, tmp_path, capsys):
    from megaresnorm.trainer import train

    settings = {"loggers": ["tensorboard"], "eval_every": 2}
    train(tiny(train=settings | {"steps": 4}, checkpoint={"every": 2}))
    train(tiny(train=settings, checkpoint={"every": 2}))
    capsys.readouterr()
    assert main(["report", str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out == f"written    {tmp_path / 'run' / 'report.html'}\n"
    page = Page(tmp_path / "run" / "report.html")
    assert "finished: 6 of 6 steps" in page.words and "Starts 2 again before step 5" in page.words
    (read,) = read_runs([tmp_path / "run"])
    assert f"({read.num_parameters:,})" in page.words and read.num_parameters == parameters_of(tmp_path / "run")


def test_what_happened_and_where_the_time_went_are_told(tiny, tmp_path, monkeypatch):
    """Three starts, one of them killed, a step made again, one that sent the run back, and a line that is no event."""
    from megaresnorm.trainer import train

    monkeypatch.setenv("MEGARESNORM_DRILL", "1")
    faults = [{"kind": "nan", "step": 3, "place": "gradient"}, {"kind": "nan", "step": 5, "place": "weight"}]
    settings = {"checkpoint": {"every": 2}, "guard": {"nonfinite": "rollback"}, "drill": {"faults": faults}}
    train(tiny(train={"steps": 4}, **settings))
    with (tmp_path / "run" / "events.jsonl").open("a") as file:
        file.write('{"kind": "<b>", "step": 1, "time": "x", "what": "<script>"}\n')
        file.write('{"kind": "start", "step": 5, "time": 1.7e9, "what": "a process that was killed"}\ntorn')
    train(tiny(**settings))
    page = page_of(tmp_path / "run")
    assert "made again, is fine" in page.words and "from step 5 back to step 4" in page.words
    assert "begins, ranks: 1" in page.words and "<script>" not in (tmp_path / "run" / "report.html").read_text()
    assert "Goodput" in page.words and "steps refused or made again" in page.words
    (read,) = read_runs([tmp_path / "run"])
    spent = [read.metrics.last(f"spent_{kind}") for kind in ("productive", "lost", "checkpoint", "start")]
    assert all(seconds > 0 for seconds in spent) and 0 < read.metrics.last("goodput") < 1
    assert read.num_starts == 3


def parameters_of(run):
    from megaresnorm.checkpoint.inspect import newest_of
    from megaresnorm.checkpoint.reader import Checkpoint

    found = Checkpoint(newest_of(run))
    return sum(found.read("weights", name).numel() for name in found.names("weights"))


def test_what_cannot_be_reported_is_one_line(tmp_path, capsys, monkeypatch):
    run, folder = write_run(tmp_path / "run", depth=False, numbers=False, profile=False), tmp_path / "empty"
    folder.mkdir()
    (run / "metrics.jsonl.d").mkdir()

    def error(*arguments):
        assert main(["report", *map(str, arguments)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    assert "has neither metrics.jsonl nor recipe.yaml nor a profile; wanted the output folder of a run" in error(folder)
    assert "has neither" in error(tmp_path / "nowhere") and not (folder / "report.html").exists()
    assert "given twice" in error(run, tmp_path / "empty" / ".." / "run")
    assert "wanted a file NAME.html" in error(run, "--out", tmp_path / "page")
    assert "cannot be written" in error(run, "--out", run / "recipe.yaml" / "page.html")
    (run / "report").symlink_to(folder)
    assert "a link stands" in error(run) and not [*folder.iterdir()]
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    (run / "report").unlink()
    assert "figures need matplotlib, which is not installed; pip install matplotlib" in error(run)


def test_columns_are_those_of_the_lines(tmp_path):
    records = [{"step": step, "loss": step / 7, "lr": None} | ({"valid_loss": 1.0} if step % 3 == 0 else {})
               for step in range(1, 20)]  # fmt: skip
    lines = [json.dumps(record) for record in records]
    lines[4:4] = [
        '{"step": 3',
        "7",
        '{"step": "x"}',
        '{"step": true}',
        "[" * 100_000,
        '{"step": 1, "a": "' + "x" * 10**6,
    ]
    lines += ['{"step": 4, "loss": 9.0, "word": "a"}', '{"step": 20, "loss": NaN}', '{"step": 21, "loss": 2.0']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    found = read_columns(tmp_path / "metrics.jsonl")
    loss = [record["loss"] for record in records]
    loss[3] = 9.0  # the later of two records
    assert found.steps.tolist() == [*range(1, 21)] and found.unreadable == 6
    assert found.values["loss"][:19].tolist() == loss and math.isnan(found.values["loss"][19])
    assert np.flatnonzero(np.isfinite(found.values["valid_loss"])).tolist() == [2, 5, 8, 11, 14, 17]
    assert found.get("lr") is None and found.get("word") is None and found.get("none") is None


def test_a_spike_is_six_deviations_above_the_steps_before_it():
    noise = random.Random(0)
    loss = [3 + 0.1 * noise.gauss(0, 1) + (noise.random() < 0.02) * noise.random() * 2 for _ in range(600)]
    loss[250:330] = [math.nan] * 80
    wanted = []
    for i, one in enumerate(loss):
        before = [x for x in loss[max(0, i - 128) : i] if not math.isnan(x)]
        if len(before) >= 64 and one > statistics.mean(before) + 6 * statistics.stdev(before):
            wanted.append(i)
    assert len(wanted) > 3 and spikes_of(np.array(loss)).tolist() == wanted
    even = [2.9, 3.1] * 32  # deviation 0.1008, of a sample
    assert spikes_of(np.array([*even, 3.603])).tolist() == [] and spikes_of(np.array([*even, 3.606])).tolist() == [64]
    assert spikes_of(np.array([3.0] * 63 + [9.0])).tolist() == [] and spikes_of(np.array([3.0] * 200)).tolist() == []


def test_refused_steps_starts_and_pauses_are_found(tmp_path):
    records = [
        {"step": i, "loss": 3.0, "gradient_norm": 1.0, "time": 100.0 + i, "skipped": int(i >= 40)} for i in range(1, 80)
    ]
    records[9]["loss"] = records[9]["gradient_norm"] = None
    records[19] |= {"loss": None, "gradient_norm": 0.0}  # no labels
    records[29]["valid_loss"] = 3.0
    for record in records[30:]:
        record["time"] += 1000.0  # behind an evaluation
    for record in records[60:]:
        record["time"] += 200.0
    write_lines(tmp_path / "metrics.jsonl", records)
    columns = read_columns(tmp_path / "metrics.jsonl")
    marks = marks_of(columns, [])
    assert columns.steps[marks.refused].tolist() == [10, 40] and columns.steps[marks.pauses].tolist() == [61]
    marks = marks_of(columns, [90.0, 110.5, 110.6, 9999.0])
    assert columns.steps[marks.starts].tolist() == [11] and not len(marks.pauses)


def test_thinning_keeps_minima_and_maxima():
    values = np.random.default_rng(0).normal(size=100_000)
    values[[5_000, 70_001]] = 9.0, -9.0
    values[20_000:30_000] = np.nan
    x, y = thinned(np.arange(100_000), values)
    assert len(x) <= 1000 and (np.diff(x) > 0).all() and np.isnan(y).any()
    assert {5_000, 70_001} <= {*x.tolist()} and np.array_equal(values[x], y, equal_nan=True)
    over = OverTime(np.arange(1000), values[:2000].reshape(1000, 2))
    steps, most = thinned_records(over)
    assert len(steps) == 300 and np.array_equal(most.max(axis=0), over.values.max(axis=0))


def test_smoothing_is_the_mean_of_the_last_steps():
    values = np.array([1.0, math.nan, 3.0, 5.0, 1e30, 7.0, 9.0])
    found = smoothed(values, 2)
    assert found[:4].tolist() == [1.0, 1.0, 3.0, 4.0] and found[6] == pytest.approx(8.0)


def test_depth_is_read_by_place_and_torn_lines_are_counted(tmp_path):
    run = write_run(tmp_path / "run")
    lines = (run / "depth.jsonl").read_text().splitlines()
    lines[3:3] = [
        '{"schema_version": 1, "st',
        '{"schema_version": 2, "step": 5}',
        '{"schema_version": 1, "step": 6, "by_block": 3}',
    ]
    (run / "depth.jsonl").write_text("\n".join(lines))
    found = depth_over_time(run / "depth.jsonl")
    stream, gradient = found.by_place["stream_rms"], found.by_place["gradient_norm"]
    assert found.unreadable == 2 and stream.values.shape == (20, 2 * BLOCKS) and gradient.values.shape == (20, BLOCKS)
    assert math.isnan(stream.values[1, 2]) and stream.values[19, 3] == pytest.approx(0.1 + 0.05 * 1.5 + 0.2)
    assert found.whole["mean_path_length"][0].tolist() == [50, 100, 150, 200]
    assert found.paths[0] == 200 and found.paths[1].tolist() == [0, 1, 2, 4, 8, 12]


def test_files_of_another_version_are_left_out_and_said(tmp_path):
    run = write_run(tmp_path / "run")
    (run / "profile" / "profile.json").write_text('{"schema_version": 9, "rows": []}')
    (run / "numbers.jsonl").write_text('{"schema_version": 9, "step": 1}\n')
    (run / "recipe.yaml").write_text("model: [")
    (read,) = read_runs([run])
    assert read.profile is None and not read.numbers and read.recipe is None and len(read.problems) == 3
    for words in ("profile.json: schema_version=9 is not 1", "numbers.jsonl: schema_version=9", "recipe.yaml: "):
        assert words in " ".join(read.problems)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.filterwarnings("error")
def test_files_with_anything_in_the_place_of_numbers_have_a_page(tmp_path, seed):
    run, noise = write_run(tmp_path / "run"), random.Random(seed)
    others = [None, 0, -1, 1e300, 1e-300, "x", [1], {}, True, math.nan, math.inf, 10**400]

    def changed(value, share):
        if isinstance(value, dict):
            return {k: v if k in ("schema_version", "step") else changed(v, share) for k, v in value.items()}
        if isinstance(value, list) and noise.random() > share / 5:
            return [changed(one, share) for one in value]
        return noise.choice(others) if noise.random() < share else value

    for name in ("metrics.jsonl", "depth.jsonl", "numbers.jsonl", "profile/profile.json"):
        records = map(json.loads, (run / name).read_text().splitlines())
        write_lines(run / name, [changed(record, 0.2) for record in records])
    assert set(page_of(run).figures) >= {"loss", "throughput"}


@pytest.mark.slow
def test_a_million_steps_take_ten_seconds_and_make_a_small_page(tmp_path):
    run = write_run(tmp_path / "run", steps=10**6, done=0, depth=False, numbers=False, profile=False)
    noise = random.Random(0)
    with (run / "metrics.jsonl").open("w") as file:
        for step in range(1, 10**6 + 1):
            record = {"step": step, "loss": 3 + noise.random(), "gradient_norm": 0.5 + noise.random(), "lr": 1e-3,
                      "samples": 8 * step, "tokens": 1024 * step, "time": 1.7e9 + 0.1 * step, "seconds": 0.1,
                      "tokens_per_second": 9000 + noise.random(), "tflops": 0.05,
                      "peak_memory": 400_000_000}  # fmt: skip
            file.write(json.dumps(record) + "\n")
    before = time.process_time()
    page_of(run)
    assert time.process_time() - before < 10 and (run / "report.html").stat().st_size < 3 * 2**20


def chromium():
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.slow
@pytest.mark.skipif(chromium() is None, reason="no Chromium is installed")
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_it_without_errors_and_without_scrolling_sideways(tmp_path, width):
    runs = [write_run(tmp_path / name) for name in ("one", "two-" + "long" * 30)]
    for page in (write_report(runs[:1], now=NOW), write_report(runs, tmp_path / "both.html", NOW)):
        shot = tmp_path / f"{page.stem}-{width}.png"  # kept with pytest's temporary folders
        said = browse(tmp_path, width, page, f"--screenshot={shot}").stderr
        assert shot.stat().st_size > 20_000 and ":CONSOLE" not in said
        frame = tmp_path / "frame.html"  # a window is never as narrow as a telephone
        frame.write_text(
            f'<iframe style="border: 0; width: {width}px" srcdoc="{escape(page.read_text())}"></iframe>'
            "<script>onload = () => { const page = document.querySelector('iframe').contentDocument.documentElement;"
            "document.title = [page.clientWidth, page.scrollWidth].join() }</script>"
        )
        found = re.search(r"<title>(\d+),(\d+)</title>", browse(tmp_path, 1400, frame, "--dump-dom").stdout)
        assert found[1] == found[2] and int(found[1]) == width


def browse(folder, width, page, *options):
    """Open a page in Chromium, without a network."""
    command = [chromium(), "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}",
               "--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr", "--v=0", "--hide-scrollbars",
               "--virtual-time-budget=2000", f"--window-size={width},2000", *options, f"file://{page}"]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
