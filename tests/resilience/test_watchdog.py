"""Slots of ranks, deadlines, and who is named of what is seen; processes that hang in several ways."""

import ctypes
import faulthandler
import gc
import os
import signal
import socket
import threading
import time
from contextlib import closing, suppress
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch.distributed import TCPStore

from megaresnorm.parallel.environment import Environment
from megaresnorm.parallel.mesh import MESH_AXES, Sizes
from megaresnorm.recipe import WatchdogRecipe
from megaresnorm.resilience import beats as words
from megaresnorm.resilience import neighbours as neighbours_module
from megaresnorm.resilience import watcher as watcher_module
from megaresnorm.resilience.beats import ACTIVATIONS, AXES, GRADIENTS, SECOND, SENDS, Beats, Phase, Place
from megaresnorm.resilience.following import BACKUP, LEAST, MOST, UNKNOWN, StepDeadline
from megaresnorm.resilience.hang_report import Hang
from megaresnorm.resilience.launcher import Launcher
from megaresnorm.resilience.neighbours import APART, FORGOTTEN, Answers, Neighbours
from megaresnorm.resilience.sights import Sight, main_stack, sight_of, stacks_of
from megaresnorm.resilience.suspects import judge, members
from megaresnorm.resilience.telling import TellingTransport
from megaresnorm.resilience.watchdog import START, Watchdog
from megaresnorm.resilience.watcher import Watcher, known_hosts, slots_of
from megaresnorm.telemetry.incidents import read_incidents
from megaresnorm.telemetry.wrapped import Wrapped

ONE = (1, 1, 1, 1)


def seen(rank, sizes=ONE, *, step=7, phase=Phase.STEP, place=Place.FORWARD, allowed=10.0, age=11.0, host="a", **more):
    """A rank in some step. More: wait=(axis, sequence, operation), counts={axis: n}, writing=seconds, state, stack."""
    beats, descriptor = Beats.make()
    os.close(descriptor)
    now = time.monotonic_ns()
    beats.introduce(rank, -1)
    beats.shape(sizes)
    beats.own[words.STEP], beats.own[words.MICROBATCH] = step, more.get("microbatch", 0)
    beats.begin(phase, allowed, since=now - int(age * SECOND))
    beats.at(place)
    for axis, count in more.get("counts", {}).items():
        beats.own[words.COUNTS + AXES.index(axis)] = count
    if "writing" in more:
        beats.begin_writing(step, allowed)
        beats.own[words.WRITES_SINCE] = now - int(more["writing"] * SECOND)
    if "wait" in more:
        axis, sequence, operation = more["wait"]
        if axis == "control":
            beats.own[words.C_OPERATION], beats.own[words.C_WAITS_SINCE] = operation, now
        else:
            beats.own[words.AXIS], beats.own[words.SEQUENCE] = AXES.index(axis), sequence
            beats.own[words.OPERATION], beats.own[words.WAITS_SINCE] = operation, now
        if operation < ACTIVATIONS:
            beats.own[words.COUNTS + AXES.index(axis)] = sequence
    sight = sight_of(beats.read(0), host, now)
    return Sight(sight.beat, host, sight.ages, more.get("state", "S"), "", more.get("stack", ()))


def named(*sights, **options):
    verdict = judge({sight.rank: sight for sight in sights})
    return (verdict.ranks, *[getattr(verdict, name) for name in options])


def test_a_slot_says_what_a_rank_has_told():
    beats, descriptor = Beats.make(2)
    second = Beats(descriptor, own=1)
    second.introduce(5, -1)
    second.shape((2, 1, 1, 3))
    second.begin(Phase.STEP, 2.5)
    second.at(Place.BACKWARD)
    beat = beats.read(1)
    assert not beats.read(0).is_used
    assert (beat.rank, beat.words[words.PID], beat.sizes) == (5, os.getpid(), (2, 1, 1, 3))
    assert (beat.words[words.PHASE], beat.words[words.PLACE]) == (Phase.STEP, Place.BACKWARD)
    assert beat.words[words.ALLOWED] == 2.5 * SECOND and beat.waits is None and not beat.writes
    second.begin_writing(40, 9.0)
    assert beats.read(1).writes and beats.read(1).words[words.WRITTEN_STEP] == 40
    second.end_writing()
    assert not beats.read(1).writes


class Sends:
    """A transport whose collectives show what the slot says while they are waited for."""

    def __init__(self, beats):
        self.beats, self.waits = beats, []

    def start_all_reduce(self, x, *, overwrite):
        return lambda: self.waits.append(str(self.beats.read(0).waits)) or x

    start_all_gather = start_reduce_scatter = lambda self, x: self.start_all_reduce(x, overwrite=False)


def test_collectives_are_counted_on_each_axis_and_told_while_they_are_waited_for():
    beats, descriptor = Beats.make()
    os.close(descriptor)
    sends = Sends(beats)
    tp, world = (TellingTransport(sends, axis, beats.own) for axis in ("tp", "world"))
    x = torch.zeros(4)
    tp.start_all_reduce(x, overwrite=True)()
    world.start_all_gather(x)()
    pending = tp.start_reduce_scatter(x)
    assert beats.read(0).waits is None and beats.read(0).count("tp") == 2  # begun: others need not wait for this rank
    pending()
    told = ["all-reduce #1 over tp, 16 bytes", "all-gather #1 over world, 16 bytes"]
    assert sends.waits == [*told, "reduce-scatter #2 over tp, 16 bytes"] and beats.read(0).waits is None


def test_telling_costs_less_than_two_microseconds():
    beats, descriptor = Beats.make()
    os.close(descriptor)

    def seconds(work, count=5000) -> float:
        start = time.perf_counter()
        for _ in range(count):
            work()
        return (time.perf_counter() - start) / count

    assert min(seconds(lambda: beats.at(Place.FORWARD)) for _ in range(5)) < 2e-6
    assert min(seconds(lambda: beats.begin(Phase.STEP, 10.0)) for _ in range(5)) < 2e-6


def test_a_steps_time_is_learned_from_the_last_hundred():
    deadline = StepDeadline(None)
    for _ in range(19):
        deadline.note(20.0)
    assert deadline.seconds == 600
    deadline.note(30.0)
    assert deadline.seconds == 300
    for _ in range(100):
        deadline.note(0.5)
    assert deadline.seconds == LEAST
    fixed = StepDeadline(7)
    for _ in range(30):
        fixed.note(100.0)
    assert fixed.seconds == 7


class ARun:
    """What following asks of a run; the time-outs that its groups have are kept."""

    def __init__(self):
        self.context = self
        self.waits: list[float] = []

    def set_timeouts(self, timeout, writing):
        self.waits.append(timeout)


@pytest.fixture
def watchdog():
    with closing(Watchdog(Environment(), WatchdogRecipe(start=1000, checkpoint=300, evaluation=200))) as watchdog:
        yield watchdog


def test_the_first_step_of_a_process_which_compiles_is_not_learned_from(watchdog):
    following = watchdog.following
    done = following._done(ARun(), lambda: None)
    for seconds in (500.0, *[1.0] * 30):
        following._began = time.monotonic() - seconds
        done()
    assert following.deadline.seconds == LEAST


def test_groups_wait_as_long_as_a_step_may_last_and_longer_around_what_may_take_longer(watchdog):
    following, run = watchdog.following, ARun()
    done = following._done(run, lambda: None)

    def step(seconds: float) -> list[float]:
        run.waits.clear()
        following._began = time.monotonic() - seconds
        done()
        return run.waits

    assert step(1.0) == [UNKNOWN + BACKUP]
    for _ in range(19):
        assert not step(10.0)
    assert step(10.0) == [pytest.approx(100 + BACKUP, abs=0.1)]
    assert not step(10.1)  # 101: not worth it
    assert step(20.0) == [pytest.approx(200 + BACKUP, abs=0.1)]
    assert [wait for _ in range(MOST) for wait in step(1.0)][-1] == LEAST + BACKUP  # down, as it went up
    phases = [(Phase.EVALUATION, 200), (Phase.SAVE, 300), (Phase.BACK, 1000)]
    for phase, seconds in phases:
        run.waits.clear()
        following._with_all(run, phase, lambda seconds=seconds: seconds)(lambda: None)()
        assert run.waits == [seconds + BACKUP]  # and not less when it is over here: another rank may still be at it
        assert step(1.0) == [following.deadline.seconds + BACKUP]


class Metrics:
    """Tells where its rank says that it is, and how long that may last."""

    def __init__(self, own):
        self.own, self.seen = own, []

    def close(self, code=0):
        self.seen.append((self.own[words.PHASE], self.own[words.ALLOWED] / SECOND, self.own[words.STEP]))

    def go_back(self, first_step):
        self.close()


def test_metrics_have_a_time_of_their_own_to_close_and_to_go_back(watchdog):
    run, own = ARun(), watchdog.beats.own
    run.steps_done, own[words.STEP] = 4, 9  # it has gone back
    with Wrapped() as wrapped:
        metrics = watchdog.following._recording(run, wrapped, lambda: Metrics(own))()
        watchdog.begin(Phase.STEP, 60.0)
        metrics.go_back(5)
        assert (own[words.PHASE], own[words.ALLOWED]) == (Phase.STEP, 60 * SECOND)
        metrics.close(0)
        assert metrics.seen == [(Phase.METRICS, 300.0, 4)] * 2
        assert watchdog.following._recording(run, wrapped, lambda: None)() is None  # on other ranks


def test_the_start_has_its_time_before_the_recipe_has_been_read():
    assert WatchdogRecipe().start == START


@pytest.mark.parametrize("sizes", [Sizes(2, 1, 2, 1, 2), Sizes(3, 2, 1, 1, 2), Sizes(1, 4, 1, 1, 1)])
def test_members_of_an_axis_are_those_of_the_mesh(sizes):
    shape = [getattr(sizes, name) for name in MESH_AXES if name != "cp"]
    ranks = torch.arange(sizes.num_ranks).view(shape)
    for rank in range(sizes.num_ranks):
        place = [int(i) for i in (ranks == rank).nonzero()[0]]
        for dim, axis in enumerate(("pp", "dp_replicate", "dp_shard", "tp")):
            index = [slice(None) if d == dim else place[d] for d in range(4)]
            assert members(axis, rank, shape) == ranks[tuple(index)].flatten().tolist()
        assert members("dp", rank, shape) == sorted(ranks[place[0], :, :, place[3]].flatten().tolist())
        assert members("model_shards", rank, shape) == sorted(ranks[place[0], place[1]].flatten().tolist())
        assert members("world", rank, shape) == list(range(sizes.num_ranks))
        ends = ranks[[0, -1], place[1], place[2], place[3]].flatten().tolist()
        assert members("embedding", rank, shape) == sorted(set(ends))


TP2, PP2, DP2 = (1, 1, 1, 2), (2, 1, 1, 1), (1, 2, 1, 1)
SQUARE = (2, 1, 1, 2)  # stages 0: ranks 0 and 1; 1: ranks 2 and 3


def test_a_rank_that_is_stopped_is_named_whatever_the_slots_say():
    waits = {"wait": ("tp", 5, 1)}
    assert named(seen(0, TP2, state="T", **waits), seen(1, TP2, **waits)) == ((0,),)


def test_the_rank_that_has_not_begun_a_collective_is_named():
    waiting = seen(1, TP2, wait=("tp", 412, 1))
    assert named(seen(0, TP2, counts={"tp": 411}), waiting) == ((0,),)
    assert named(seen(0, TP2, counts={"tp": 411}, place=Place.UPDATE), waiting) == ((0,),)


def test_waits_are_followed_from_axis_to_axis():
    """Rank 3 waits for its stage's rank 2, which waits for rank 0, which waits for rank 1: it computes."""
    assert named(
        seen(0, SQUARE, wait=("tp", 9, 1)),
        seen(1, SQUARE, counts={"tp": 8}),
        seen(2, SQUARE, wait=("pp", 0, ACTIVATIONS), counts={"tp": 3}),
        seen(3, SQUARE, wait=("tp", 4, 1)),
    ) == ((1,),)


def test_a_stage_waits_for_its_neighbour():
    assert named(seen(0, PP2, wait=("pp", 1, GRADIENTS)), seen(1, PP2)) == ((1,),)
    assert named(seen(0, PP2), seen(1, PP2, wait=("pp", 1, ACTIVATIONS))) == ((0,),)
    assert named(seen(0, PP2, wait=("pp", 1, SENDS)), seen(1, PP2)) == ((1,),)


def test_where_waits_are_not_told_the_rank_farthest_behind_is_named():
    assert named(seen(0, DP2, place=Place.BACKWARD), seen(1, DP2, place=Place.DATA)) == ((1,),)
    assert named(seen(0, DP2, step=6, place=Place.AFTER), seen(1, DP2, place=Place.BACKWARD)) == ((0,),)


def test_ranks_that_are_alike_are_all_named():
    assert named(seen(0, DP2, place=Place.BACKWARD), seen(1, DP2, place=Place.BACKWARD)) == ((0, 1),)


def test_the_minority_of_innermost_frames_is_suspect():
    four = (1, 4, 1, 1)
    same = [seen(rank, four, place=Place.BACKWARD, stack=("backward (a.py:1)",)) for rank in (0, 1, 3)]
    assert named(*same, seen(2, four, place=Place.BACKWARD, stack=("read (b.py:1)",))) == ((2,),)


def test_a_stack_that_ends_in_a_wait_is_no_suspect():
    start = {"phase": Phase.START, "place": Place.BEGIN, "step": 0}
    sights = (
        seen(0, DP2, **start, stack=("wait_for_all (rendezvous.py:9)",)),
        seen(1, DP2, **start, stack=("f (a.py:1)",)),
    )
    assert named(*sights) == ((1,),)


def test_a_writer_that_hangs_is_named_though_all_go_on_training():
    waiting = seen(0, DP2, age=0.1, writing=11.0, wait=("control", 8, 2))
    hangs = seen(1, DP2, age=0.1, writing=11.0, counts={"control": 7})
    assert named(waiting, hangs) == ((1,),)
    assert hangs.where == "while saving step 7" and hangs.setting == "watchdog.checkpoint=10"


def test_a_microbatch_that_is_not_known_is_left_out():
    assert seen(0, microbatch=3).where == "in step 7 in the forward pass, microbatch 3"
    assert seen(0, microbatch=-1).where == "in step 7 in the forward pass"


def test_who_waits_for_a_rank_that_is_within_its_time_does_not_hang():
    """Rank 1 still writes a checkpoint, which may take longer than the step in which rank 0 waits for it."""
    saving = seen(1, TP2, phase=Phase.SAVE, allowed=100.0, counts={"tp": 4})
    assert named(seen(0, TP2, wait=("tp", 5, 1)), saving, in_time=1) == ((1,), True)
    late = seen(1, TP2, phase=Phase.SAVE, allowed=10.5, counts={"tp": 4})
    assert named(seen(0, TP2, wait=("tp", 5, 1)), late, in_time=1) == ((1,), False)


def test_who_has_gone_on_waits_untold_for_a_rank_behind_that_is_within_its_time():
    """DDP's sums are not told: rank 1 is in a step, or at the end of the run, and rank 0 still at its loggers."""
    loggers = {"phase": Phase.METRICS, "place": Place.AFTER, "allowed": 100.0, "step": 7}
    for ahead in ({"step": 8}, {"phase": Phase.CLOSING, "step": 7}):
        assert named(seen(0, DP2, **loggers), seen(1, DP2, **ahead), in_time=1)[1]
        assert named(seen(0, DP2, **loggers | {"allowed": 10.5}), seen(1, DP2, **ahead), in_time=1) == ((0,), False)
    saving = seen(0, DP2, phase=Phase.SAVE, allowed=100.0, step=7)
    assert named(saving, seen(1, DP2, step=8), in_time=1)[1]
    assert named(seen(0, DP2, step=8, age=1.0), seen(1, DP2, step=7), in_time=1) == ((1,), False)
    hung_writer = seen(1, DP2, step=8, age=0.1, writing=11.0)
    assert named(seen(0, DP2, step=7, age=0.1), hung_writer, in_time=1) == ((1,), False)


def test_a_main_thread_has_no_time_of_its_own_while_its_checkpoint_is_written():
    assert not seen(0, phase=Phase.SAVE, writing=1.0).is_overdue
    assert seen(0, phase=Phase.SAVE).is_overdue


def test_hosts_of_an_earlier_start_are_forgotten(tmp_path):
    launcher = Launcher(tmp_path)
    launcher.introduce(0, 0, attempt=1)
    launcher.write_json("run", {"output": "x", "hosts": ["a", "b"], "attempt": 1})
    assert known_hosts(launcher) == {0: "a", 1: "b"}
    launcher.introduce(0, 0, attempt=2)
    assert known_hosts(launcher) == {}


def test_ranks_that_nobody_sees_are_named_with_their_host():
    mine = {0: seen(0, DP2, wait=("world", 5, 1), host="a")}
    verdict = judge(mine)
    hang = Hang(mine, verdict, {0: "a", 1: "b"}, "a")
    assert verdict.ranks == (1,) and verdict.unreachable
    assert str(hang.failure("x")).startswith(
        "rank 1 on b: cannot be reached: rank 0 on a has waited for it in step 7 in the forward pass, microbatch 0"
    )


def test_the_line_says_rank_host_step_phase_time_setting_and_what_the_others_wait_for():
    late = seen(3, (1, 1, 1, 4), step=17, place=Place.DATA, age=10.2, counts={"tp": 411})
    others = [seen(rank, (1, 1, 1, 4), step=17, wait=("tp", 412, 1)) for rank in range(3)]
    sights = {sight.rank: sight for sight in (*others, late)}
    hang = Hang(sights, judge(sights), {}, "a")
    assert str(hang.failure("PATH")) == (
        "rank 3 on a: hangs in step 17 while reading samples for 10.2 s (watchdog.step=10); "
        "the others wait in all-reduce #412 over tp, 0 bytes; stacks: PATH"
    )


def test_a_second_hang_at_the_same_step_leaves_the_first_report_as_it_is(tmp_path):
    paths = []
    for _ in range(2):
        hang = Hang({0: seen(0)}, judge({0: seen(0)}), {}, "a", frozenset({0}))
        paths.append(hang.write(tmp_path))
        assert "rank 0 on a" in Path(paths[-1]).read_text()
    assert [Path(path).name for path in paths] == ["hang-7-a.txt", "hang-7-a-2.txt"]
    events = list(read_incidents(tmp_path))
    assert [event["report"] for event in events] == ["hang-7-a.txt", "hang-7-a-2.txt"]
    assert all(event["kind"] == "hang" and event["what"].startswith("hangs in step 7") for event in events)


def test_a_torn_line_of_events_is_not_lost_to_that_of_a_hang(tmp_path):
    (tmp_path / "events.jsonl").write_text('{"kind": "start", "st')  # a killed process has left it
    Hang({0: seen(0)}, judge({0: seen(0)}), {}, "a", frozenset({0})).write(tmp_path)
    assert [event["kind"] for event in read_incidents(tmp_path)] == ["hang"]


def test_what_another_node_sends_is_what_it_has_seen():
    sight = seen(3, TP2, wait=("tp", 4, 1), state="T", stack=("wait (a.py:3)",))
    assert Sight.of_json(sight.to_json()) == sight
    for spoilt in ({}, [], {**sight.to_json(), "words": [1]}, {**sight.to_json(), "ages": {}}):
        with pytest.raises((ValueError, TypeError, KeyError, AttributeError)):
            Sight.of_json(spoilt)


def test_a_pause_of_the_whole_host_is_forgiven():
    beats, descriptor = Beats.make()
    os.close(descriptor)
    beats.introduce(0, -1)
    now = time.monotonic_ns()
    beats.begin(Phase.STEP, 5.0, since=now - 8 * SECOND)
    found: list[Hang] = []
    watcher = Watcher(slots_of(beats, 1), lambda hang: bool(found.append(hang)))
    watcher._last = now - 7 * SECOND  # it did not run for seven of these seconds
    watcher.look()
    assert not found
    beats.begin(Phase.STEP, 5.0, since=now - 14 * SECOND)
    watcher.look()
    assert len(found) == 1


def test_a_lasting_error_of_the_watcher_is_said_once_a_minute(caplog, monkeypatch):
    looks = []
    monkeypatch.setattr(watcher_module, "EVERY", 0.001)
    watcher = Watcher(lambda: looks.append(1) or iter([None]), lambda hang: True)  # what it sees is no slot
    watcher.start()
    while len(looks) < 5:
        time.sleep(0.001)
    watcher.stop()
    assert len([record for record in caplog.records if "error of its own" in record.message]) == 1


def hangs(descriptor: int, slot: int, how: str, allowed: float) -> None:
    """A rank that begins a step, and then waits in a collective over world, or hangs before it."""
    beats = Beats(os.dup(descriptor), own=slot)
    stacks = os.memfd_create("stacks")
    faulthandler.register(signal.SIGUSR2, file=stacks, all_threads=True)
    beats.introduce(slot, stacks)
    beats.shape(DP2)
    beats.own[words.STEP] = 7
    beats.begin(Phase.STEP, allowed)
    beats.at(Place.UPDATE)
    if how == "waits":
        TellingTransport(Sleeps(), "world", beats.own).start_all_reduce(torch.zeros(4), overwrite=True)()
    while how == "interpreter":
        ctypes.PyDLL(None).sleep(60)
    if how == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(60)


class Sleeps:
    def start_all_reduce(self, x, *, overwrite):
        return lambda: time.sleep(60)


@pytest.mark.parametrize("how", ["sleeps", "interpreter", "stopped"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_hangs_is_found_in_time_named_and_its_stacks_are_read(how, rank):
    allowed = 0.4
    beats, descriptor = Beats.make(2)
    pids, found = [], []
    try:
        for slot in range(2):
            pid = os.fork()
            if pid == 0:
                with suppress(BaseException):
                    hangs(descriptor, slot, how if slot == rank else "waits", allowed)
                os._exit(1)
            pids.append(pid)
        start = time.monotonic()
        watcher = Watcher(slots_of(beats, 2), lambda hang: bool(found.append(hang)) or True)
        while not found and time.monotonic() < start + 10:
            watcher.look()
            time.sleep(0.05)
        seconds = time.monotonic() - start
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        os.close(descriptor)
    (hang,) = found
    assert seconds < allowed + 2 and hang.verdict.ranks == (rank,), hang.text()
    assert "in step 7 in the update" in hang.line and "the other waits in all-reduce #1 over world" in hang.line
    assert "stopped by a signal" in hang.line if how == "stopped" else "in hangs\n" in hang.sights[rank].stacks
    assert "in wait\n" in hang.sights[1 - rank].stacks and hang.sights[1 - rank].stack[1].startswith("wait (telling.py")


def traced(pid: int) -> bool:
    return "TracerPid:\t0\n" not in Path(f"/proc/{pid}/status").read_text()


def test_a_rank_with_a_debugger_at_it_is_left_alone_and_has_its_time_again(caplog):
    beats, descriptor = Beats.make()
    (pid, found), trace = (os.fork(), []), ctypes.CDLL(None, use_errno=True).ptrace
    if pid == 0:
        with suppress(BaseException):
            hangs(descriptor, 0, "sleeps", 0.3)
        os._exit(1)
    try:
        watcher = Watcher(slots_of(beats, 1), lambda hang: bool(found.append(hang)) or True)
        if trace(0x4206, pid, 0, 0):  # PTRACE_SEIZE: as a debugger that lets it run
            pytest.skip("this system lets nobody trace its own children")
        assert traced(pid)
        end = time.monotonic() + 1.0
        while time.monotonic() < end:
            watcher.look()
            time.sleep(0.02)
        assert not found and caplog.text.count("is under a debugger") == 1
        os.kill(pid, signal.SIGSTOP)
        os.waitpid(pid, 0)  # it stands still for its debugger
        assert trace(17, pid, 0, 0) == 0 and not traced(pid)  # PTRACE_DETACH
        watcher.look()
        assert not found
        while not found and time.monotonic() < end + 10:
            watcher.look()
            time.sleep(0.02)
        assert found and time.monotonic() > end + 0.2
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(descriptor)


def test_stacks_that_were_asked_for_before_take_no_memory(watchdog):
    beat = watchdog.beats.read(0)
    sizes, counts = [], set()
    for _ in range(3):
        stacks = stacks_of([beat])[beat.rank]
        sizes.append(os.fstat(watchdog._stacks).st_size)
        counts.add(stacks.count("most recent call first"))
        assert "\0" not in stacks
    assert len(counts) == 1, "each answer has the stacks of its own question alone"
    assert max(sizes) < 1.5 * min(sizes)


@pytest.mark.parametrize("stop", [0, 143])
def test_a_hang_after_a_stop_ends_the_job_rather_than_to_start_ranks_again(tmp_path, monkeypatch, capsys, stop):
    launcher, ended = Launcher(tmp_path), []
    monkeypatch.setattr(watcher_module, "end", lambda hang: ended.append("ranks"))
    monkeypatch.setattr(os, "_exit", ended.append)
    if stop:
        launcher.write("stop", stop)
    sights = {rank: seen(rank, DP2, state="S" if rank else "T") for rank in (0, 1)}
    assert watcher_module.ends_ranks(launcher)(Hang(sights, judge(sights), {}, "a", frozenset({0, 1})))
    assert ended == (["ranks", 143] if stop else ["ranks"]) and launcher.read("end") == (stop or None)
    lines = capsys.readouterr().err.splitlines()
    assert "rank 0 on a: hangs in step 7" in lines[0]
    assert lines[1:] == ["megaresnorm: SIGTERM: ended without saving, since rank 0 hung"] * bool(stop)


def test_the_main_threads_stack_is_told_from_the_others():
    main = '  File "/x/a.py", line 3 in inner\n  File "/x/a.py", line 9 in f\n'
    text = 'Thread 0x2 (most recent call first):\n  File "/x/t.py", line 1 in run\n\n'
    text += f"Current thread 0x1 (most recent call first):\n{main}"
    assert main_stack(text) == ("inner (a.py:3)", "f (a.py:9)") and main_stack("") == ()


def test_a_watchdog_that_is_closed_leaves_nothing_behind():
    gc.collect()
    before = signal.getsignal(signal.SIGUSR2), len(os.listdir("/proc/self/fd"))
    watchdog = Watchdog(Environment(), whole=True)
    assert len(os.listdir("/proc/self/fd")) > before[1]
    watchdog.close()
    del watchdog
    gc.collect()  # the memory goes with the last who may write it
    assert before == (signal.getsignal(signal.SIGUSR2), len(os.listdir("/proc/self/fd")))


def test_a_rank_that_never_says_anything_is_named_when_the_start_is_over():
    beats, descriptor = Beats.make(2)
    os.close(descriptor)
    beats.introduce(4, -1)
    beats.begin(Phase.START, 5.0, since=time.monotonic_ns() - 6 * SECOND)
    found: list[Hang] = []
    Watcher(slots_of(beats, 2), lambda hang: bool(found.append(hang))).look()
    assert found[0].verdict.ranks == (5,) and "has not come so far as to read its recipe" in found[0].line
    assert "rank 4 on" in found[0].line and "(watchdog.start=5)" in found[0].line


@pytest.fixture
def store():
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def neighbours(store, sights) -> tuple[Neighbours, threading.Thread]:
    """A node's watcher, and a thread in which it answers for three seconds; what it hears is kept as ``heard``."""
    wait = timedelta(seconds=3)
    node = Neighbours(
        lambda: TCPStore("127.0.0.1", store.port, is_master=False, wait_for_workers=False, timeout=wait),
        lambda: {0: "a", 1: "b"},
    )
    node.heard, end = [], time.monotonic() + 3

    def answer():
        while not node.heard and time.monotonic() < end:
            node.heard += [found for found in [node.listen(lambda: sights)] if found is not None]
            time.sleep(0.05)

    return node, threading.Thread(target=answer, daemon=True)


def test_nodes_see_what_each_other_sees_and_hear_the_verdict(store):
    mine = {0: seen(0, DP2, wait=("world", 5, 1), host="a")}
    theirs = {1: seen(1, DP2, counts={"world": 4}, host="b")}
    (asks, _), (answers, thread) = neighbours(store, mine), neighbours(store, theirs)
    thread.start()
    time.sleep(0.6)  # it has looked once
    sights, hosts, silent, heard = asks.ask(mine)
    assert sights == mine | theirs and hosts == {0: "a", 1: "b"} and heard and not silent
    asks.tell(judge(sights), sights)
    thread.join()
    (found,) = answers.heard
    assert found[0] == sights and found[1].ranks == (1,) and not asks.is_cut


def test_a_store_that_does_not_answer_holds_nobody_up_and_is_cut_only_when_asked_again(monkeypatch):
    monkeypatch.setattr(neighbours_module, "ANSWERS", 0.2)
    with socket.socket() as silent:  # it takes connections, and says nothing
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        address = silent.getsockname()[:2]
        node = Neighbours(lambda: socket.create_connection(address).recv(1), lambda: {0: "a", 1: "b"})
        node._failures = 1  # it has answered nothing, a moment ago
        node._failed_first = time.monotonic() - 0.1
        mine = {0: seen(0, DP2, wait=("world", 5, 1), host="a")}
        start = time.monotonic()
        answers = node.ask(mine)
        assert answers.sights == mine and not answers.heard and not answers.silent and not node.is_cut
        node.tell(judge(mine, [1]), mine)
        assert time.monotonic() - start < 1
        node._failed_first -= APART
        assert node.is_cut and node._silent({1}, 0.0, heard=False) == {1}
    assert judge(mine, [1]).ranks == (1,) and judge(mine, [1]).unreachable


def test_a_first_question_has_the_time_to_connect(store, monkeypatch):
    monkeypatch.setattr(neighbours_module, "ANSWERS", 0.2)

    def connect():
        time.sleep(0.6)
        return TCPStore("127.0.0.1", store.port, is_master=False, wait_for_workers=False)

    node = Neighbours(connect, lambda: {0: "a"})
    assert node.ask({0: seen(0)}).heard and not node.is_cut


def test_a_node_is_out_of_reach_when_it_has_not_answered_twice_some_seconds_apart():
    node, now = Neighbours(lambda: None, dict), time.monotonic()
    assert node._silent({1, 2}, now, heard=True) == set() == node._silent({1, 2}, now + 1, heard=True)
    assert node._silent({2}, now + APART + 1, heard=True) == {2}  # rank 1 has answered meanwhile
    node._asked_last, node._missed = now - FORGOTTEN, {2: now - FORGOTTEN}
    assert node._silent({2}, now, heard=True) == set()  # that was another time


def test_questions_that_a_node_has_asked_before_are_removed(store):
    node, _ = neighbours(store, {})
    mine = {0: seen(0)}
    node._hosts = lambda: {0: "a"}
    for _ in range(20):
        answers = node.ask(mine)
        node.tell(judge(mine), answers.sights, seconds=0.01)
    assert store.num_keys() <= 4 + 1 and not store.check(["seen/1"]) and store.check(["seen/20", "found/20"])


class Asked:
    """Other nodes that are asked, and what they say each time: the last goes on."""

    is_cut = False

    def __init__(self, *answers):
        self.answers, self.times, self.told = list(answers), [], []

    def listen(self, see):
        return None

    def ask(self, mine):
        self.times.append(time.monotonic())
        answers = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        return answers._replace(sights=answers.sights | mine)

    def tell(self, verdict, sights):
        self.told.append(verdict)


def a_late_rank_with(others: Asked, monkeypatch, seconds: float) -> tuple[list[Hang], int]:
    """The hangs that are found while rank 0 waits in a collective over world; how often stacks are read."""
    beats, descriptor = Beats.make()
    os.close(descriptor)
    beats.introduce(0, -1)
    beats.shape(DP2)
    beats.begin(Phase.STEP, 5.0, since=time.monotonic_ns() - 6 * SECOND)
    beats.own[words.AXIS], beats.own[words.OPERATION] = AXES.index("world"), 1
    beats.own[words.WAITS_SINCE], beats.own[words.COUNTS + AXES.index("world")] = time.monotonic_ns(), 5
    found, reads = [], []
    for name, value in (("AGAIN", 0.05), ("MOST_AGAIN", 0.2), ("APART", 0.1)):
        monkeypatch.setattr(watcher_module, name, value)
    monkeypatch.setattr(watcher_module, "stacks_of", lambda beats: reads.append(1) or {})
    watcher = Watcher(slots_of(beats, 1), lambda hang: bool(found.append(hang)) or True, others)
    watcher._again = 0.05
    end = time.monotonic() + seconds
    while not found and time.monotonic() < end:
        watcher.look()
        time.sleep(0.01)
    return found, len(reads)


def test_who_is_late_but_in_time_asks_less_and_less_often_and_reads_no_stacks(monkeypatch):
    saves = {1: seen(1, DP2, phase=Phase.SAVE, allowed=100.0, counts={"world": 4}, host="b")}
    others = Asked(Answers(saves, {0: "a", 1: "b"}))
    found, reads = a_late_rank_with(others, monkeypatch, 0.7)
    gaps = [later - earlier for earlier, later in zip(others.times, others.times[1:], strict=False)]
    assert not found and not reads and 4 <= len(others.times) <= 6
    assert all(gap >= least for gap, least in zip(gaps, (0.05, 0.1, 0.2, 0.2, 0.2), strict=False))


def test_one_question_that_is_not_answered_ends_no_job(monkeypatch):
    hosts = {0: "a", 1: "b"}
    late = {1: seen(1, DP2, counts={"world": 4}, host="b")}
    nothing, half = Answers({}, hosts, heard=False), Answers({}, hosts)
    others = Asked(nothing, half, nothing)
    found, reads = a_late_rank_with(others, monkeypatch, 0.5)
    assert not found and not reads and len(others.times) >= 3
    for last in (Answers(late, hosts), Answers({}, hosts, frozenset({1}))):
        found, reads = a_late_rank_with(Asked(nothing, last), monkeypatch, 5.0)
        assert found[0].verdict.ranks == (1,) and reads == 1
        assert found[0].verdict.unreachable == (1 not in last.sights)
