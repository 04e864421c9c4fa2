"""events.jsonl and goodput: what was written is read, what is hostile is left out, and totals go on over starts."""

import json
import os

import pytest

from megaresnorm.report.incidents import incident_rows, start_times
from megaresnorm.telemetry.goodput import Goodput
from megaresnorm.telemetry.incidents import EVENTS, MOST, Incidents, ended_on_purpose, read_incidents


def test_what_is_noted_is_read_and_a_torn_line_costs_itself_alone(tmp_path):
    Incidents(tmp_path).note("start", 1, "begins")
    with (tmp_path / EVENTS).open("a") as file:
        file.write('{"schema_version": 1, "step": 2, "ki')
    Incidents(tmp_path).note("nonfinite", 3, "a name\nwith a line break \x1b[31m", rank=1, block=2)
    Incidents(tmp_path, writes=False).note("spike", 4, "on another rank")
    first, second = read_incidents(tmp_path)
    assert (first["kind"], second["kind"], second["rank"], second["block"]) == ("start", "nonfinite", 1, 2)
    assert "\n" not in second["what"] and "\x1b" not in second["what"]


@pytest.mark.parametrize(
    "content", ["[" * 100_000, '{"step": 1}', '{"step": -1, "kind": "x"}', "1", '"x"', "\0" * 70_000]
)
def test_what_is_no_event_is_left_out(tmp_path, content):
    (tmp_path / EVENTS).write_text(content + "\n")
    assert not list(read_incidents(tmp_path))


def test_pipes_folders_and_links_are_not_read(tmp_path):
    os.mkfifo(tmp_path / EVENTS)
    assert not list(read_incidents(tmp_path)) and ended_on_purpose(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / EVENTS).mkdir()
    Incidents(tmp_path / "a").note("start", 1, "costs a warning alone")
    assert not list(read_incidents(tmp_path / "a"))


def test_the_newest_events_of_many_are_read_and_odd_times_are_none(tmp_path):
    lines = [
        {"step": step, "kind": "start", "time": time} for step, time in enumerate([1.7e9] * MOST + [1e400, 10**400])
    ]
    (tmp_path / EVENTS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = list(read_incidents(tmp_path))
    assert len(found) == MOST and found[-1]["step"] == MOST + 1
    assert set(start_times(found)) == {1.7e9} and len(incident_rows(found)) > 100


def test_a_run_that_was_killed_is_told_from_one_that_ended(tmp_path):
    assert ended_on_purpose(tmp_path), "none was ever begun"
    incidents = Incidents(tmp_path)
    incidents.note("start", 1, "begins")
    assert not ended_on_purpose(tmp_path)
    incidents.note("end", 9, "ends")
    assert ended_on_purpose(tmp_path)


def test_steps_that_are_made_again_are_lost_and_totals_go_on():
    first = Goodput()
    first.begin_step()
    for _ in range(4):
        first.step(1.0)
    kept = first.metrics()
    for lost in (0.0, 0.5, 1.0):
        first.step(1.0, lost)
    first.waited(0.5)
    last = first.metrics() | {"time": 1.0}
    assert (last["spent_productive"], last["spent_lost"]) == (5.5, 1.5)
    second = Goodput()
    second.resume(kept, last, ended=True)
    after = second.metrics()
    assert (after["spent_productive"], after["spent_lost"], after["spent_waiting"]) == (4.0, 3.0, 0.0)
    assert after["spent_start"] == pytest.approx(last["spent_start"], abs=0.1), "nobody waited for it"
    third = Goodput()
    third.resume(kept, last, ended=False)
    assert third.metrics()["spent_start"] > 1e9, "from the last step of a process that was killed"
    first.went_back(kept)
    assert first.metrics()["spent_productive"] == 4.0


def test_goodput_is_the_productive_share_of_all_but_what_is_a_part_of_another():
    goodput = Goodput()
    goodput.step(3.0, 1.0)
    goodput.waited(1.5)
    assert goodput.metrics()["goodput"] == pytest.approx(2 / 3)
