"""metrics.jsonl and TensorBoard's files across restarts: readable records of steps that are not done again stay."""

import json
import logging
import time

import pytest

from megaresnorm.telemetry.events import stamp_after
from megaresnorm.telemetry.metrics import MAX_LINE_BYTES, MetricsWriter


def resumed(folder, first_step: int = 4) -> list[str]:
    """The lines that a resume leaves."""
    MetricsWriter(folder, first_step=first_step).close()
    return (folder / "metrics.jsonl").read_text().splitlines()


def line(step) -> str:
    return json.dumps({"step": step, "loss": 1.5})


def test_whole_lines_before_the_first_step_stay_whatever_stands_between_them(tmp_path, caplog):
    strange = [
        b'{"step": null}',
        b'{"step": "1"}',
        b'{"step": [1]}',
        b'{"step": NaN}',
        b'{"step": true}',
        b'{"step": -1}',
        b'{"loss": 1.0}',
        b"[1]",
        b"1",
        b"null",
        b"",
        b"\x00\x00\x00",
        b"\xff\xfe{",
        b"[" * 50_000,
        b'{"step": 1, "loss": "' + b"x" * MAX_LINE_BYTES + b'"}',
        b'{"step": 1, "loss": "' + b"x" * (3 * MAX_LINE_BYTES),
        b'{"step": ' + b"9" * 5000 + b"}",
        b'{"step": 2, "lo',
    ]
    content = b"".join(line(1).encode() + b"\n" + one + b"\n" for one in strange) + line(3).encode() + b"\n"
    (tmp_path / "metrics.jsonl").write_bytes(content + line(4).encode() + b"\n")
    assert resumed(tmp_path) == [line(1)] * len(strange) + [line(3)]
    assert f"{len(strange)} of its lines cannot be read and are left out" in caplog.text
    assert len(caplog.records) == 1
    assert resumed(tmp_path) == [line(1)] * len(strange) + [line(3)] and len(caplog.records) == 1


def test_a_last_line_without_its_end_is_kept_if_it_is_whole(tmp_path, caplog):
    (tmp_path / "metrics.jsonl").write_text(line(1) + "\n" + line(2))
    writer = MetricsWriter(tmp_path, first_step=3)
    writer.write(3, {"loss": 1.5})
    writer.close()
    assert resumed(tmp_path) == [line(1), line(2), line(3)] and not caplog.records


def test_a_line_that_is_no_number_of_ours_stays_as_it_is(tmp_path):
    odd = '{"step": 1, "loss": NaN, "note": "a\u2028b\x85"}'
    (tmp_path / "metrics.jsonl").write_text(odd + "\n", encoding="utf-8")
    MetricsWriter(tmp_path, first_step=2).close()
    assert (tmp_path / "metrics.jsonl").read_text(encoding="utf-8") == odd + "\n"


def test_a_file_that_needs_no_change_is_not_written(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(line(1) + "\n")
    before = path.stat().st_ino
    assert resumed(tmp_path) == [line(1)] and path.stat().st_ino == before


def test_the_old_file_stays_when_the_new_one_cannot_be_written(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    content = line(1) + "\n" + line(7) + "\n"
    (tmp_path / "metrics.jsonl").write_text(content)
    monkeypatch.setattr("megaresnorm.files.os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        resumed(tmp_path)
    assert (tmp_path / "metrics.jsonl").read_text() == content and len(list(tmp_path.iterdir())) == 1


def test_event_files_sort_after_those_that_are_there_whatever_the_clock_says(tmp_path, monkeypatch):
    now = time.time_ns()
    for moment in (now, now - 3600 * 10**9, now - 7200 * 10**9, now + 10**9):
        monkeypatch.setattr(time, "time_ns", lambda moment=moment: moment)
        MetricsWriter(tmp_path, first_step=1, loggers=["tensorboard"]).close()
        folder = tmp_path / "tensorboard"
        newest = max(folder.iterdir(), key=lambda p: p.stat().st_ctime_ns)
        assert newest.name == max(p.name for p in folder.iterdir())
    assert len(list(folder.iterdir())) == 4
    for there in ("99", "999999", "1764000000", "9" * 200):
        name = f"events.out.tfevents.{there}.host.1"
        assert f"events.out.tfevents.{stamp_after([name], 5)}.a" > name


def test_tensorboard_shows_steps_written_by_a_clock_that_went_back(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    now = time.time_ns()
    for first, moment in ((1, now), (3, now - 3600 * 10**9)):
        monkeypatch.setattr(time, "time_ns", lambda moment=moment: moment)
        writer = MetricsWriter(tmp_path, first_step=first, loggers=["tensorboard"])
        for step in (first, first + 1):
            writer.write(step, {"loss": float(step)})
        writer.close()
    shown = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in shown.Scalars("train/loss")] == [1, 2, 3, 4]


def test_steps_that_an_earlier_version_counted_from_0_are_renumbered(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("".join(line(step) + "\n" for step in range(5)))
    assert resumed(tmp_path, first_step=5) == [line(step) for step in (1, 2, 3, 4)]
    assert resumed(tmp_path, first_step=4) == [line(step) for step in (1, 2, 3)]
