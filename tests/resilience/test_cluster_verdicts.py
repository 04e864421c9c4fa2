"""Which host, link, device or clock stands out: verdicts on figures that are made up."""

import random
from itertools import combinations
from statistics import median
from types import SimpleNamespace

import pytest
import torch

from megaresnorm.resilience.cluster import compute
from megaresnorm.resilience.cluster.check import Check
from megaresnorm.resilience.cluster.clocks import Offset, judge_clocks, offset_of
from megaresnorm.resilience.cluster.compute import AGAIN, judge_answers, judge_speed
from megaresnorm.resilience.cluster.judge import NOTABLE, odd_answers, rounds, slow_links
from megaresnorm.resilience.cluster.network import Link, judge_links
from megaresnorm.resilience.cluster.node import Place, hosts_of, judge_addresses, judge_limits
from megaresnorm.resilience.cluster.storage import Written, judge_output

GB = 1e9


@pytest.mark.parametrize("count", range(2, 12))
def test_every_pair_meets_once_and_nobody_twice_in_a_round(count):
    schedule = list(rounds(count))
    assert sorted(pair for pairs in schedule for pair in pairs) == list(combinations(range(count), 2))
    assert len(schedule) == count - 1 + count % 2
    for pairs in schedule:
        ends = [end for pair in pairs for end in pair]
        assert len(ends) == len(set(ends)) and len(pairs) == count // 2


def speeds_of(count: int, chance: random.Random) -> dict[tuple[int, int], float]:
    """Healthy links, a quarter faster or slower than each other."""
    return {pair: GB * chance.uniform(0.8, 1.25) for pair in combinations(range(count), 2)}


@pytest.mark.parametrize("count", [3, 4, 5, 8, 16])
def test_healthy_links_of_uneven_speed_are_not_named(count):
    for seed in range(200):
        found = slow_links(speeds_of(count, random.Random(seed)))
        assert not found.ends and not found.links, (seed, found)


@pytest.mark.parametrize("count", [3, 4, 5, 8, 16])
@pytest.mark.parametrize("share", [0.01, 0.2, 0.3])
def test_a_slow_host_is_named_and_none_of_its_links(count, share):
    for seed in range(50):
        chance = random.Random(seed)
        speeds, slow = speeds_of(count, chance), chance.randrange(count)
        speeds = {pair: speed * (share if slow in pair else 1) for pair, speed in speeds.items()}
        found = slow_links(speeds)
        assert list(found.ends) == [slow] and not found.links, (seed, slow, found)
        assert found.ends[slow] == median(speed for pair, speed in speeds.items() if slow in pair)


@pytest.mark.parametrize("count", [4, 5, 8, 16])
def test_a_slow_link_is_named_and_none_of_its_hosts(count):
    for seed in range(50):
        chance = random.Random(seed)
        speeds = speeds_of(count, chance)
        slow = chance.choice(list(speeds))
        speeds[slow] *= 0.3
        found = slow_links(speeds)
        assert list(found.links) == [slow] and not found.ends, (seed, slow, found)


def test_two_slow_hosts_of_five_and_a_slow_link_between_others_are_told_apart():
    speeds = {pair: 0.01 * GB if set(pair) & {1, 3} else GB for pair in combinations(range(6), 2)}
    speeds[0, 5] = 0.1 * GB
    found = slow_links(speeds)
    assert set(found.ends) == {1, 3} and set(found.links) == {(0, 5)} and found.usual == GB


def test_a_slow_host_is_said_with_its_speed_and_the_usual_one():
    links = {pair: Link(1e-4, 12e6 if 2 in pair else 940e6) for pair in combinations(range(4), 2)}
    bandwidth, latency = judge_links(links, ["a", "b", "c", "d"])
    assert bandwidth.verdict == "WARN" and latency.verdict == "PASS"
    assert bandwidth.found == "host c: 12.0 MB/s to all others, median 940.0 MB/s"
    links = {pair: Link(0.08 if 0 in pair else 3e-4, GB) for pair in combinations(range(4), 2)}
    bandwidth, latency = judge_links(links, ["a", "b", "c", "d"])
    assert bandwidth.verdict == "PASS" and latency.verdict == "WARN"
    assert latency.found.startswith("host a: 80.0 ms to all others")
    (slow, _) = judge_links({(0, 1): Link(1e-4, 6e6)}, ["a", "b"])
    assert slow.verdict == "WARN" and slow.found == "link a - b: 6.0 MB/s"


def test_an_offset_is_as_exact_as_the_shortest_round_trip():
    for seed in range(100):
        chance, trips = random.Random(seed), []
        ahead = chance.uniform(-100, 100)
        for i in range(8):
            there, back = chance.expovariate(1000), chance.expovariate(1000)
            trips.append((float(i), i + there + ahead, i + there + back))
        found = offset_of(trips)
        assert abs(found.seconds - ahead) <= found.error + 1e-9
        assert found.error <= min(came - sent for sent, _, came in trips) / 2 + 1e-9


def test_a_clock_that_is_off_by_more_than_a_second_is_named_with_its_host():
    one = judge_clocks({"a": Offset(0.2, 1e-3), "b": Offset(-3600.0, 2e-3)})
    assert one.verdict == "WARN" and one.found == "b -3600.000 s (±2.0 ms)" and "chrony" in one.advice
    assert judge_clocks({"a": Offset(0.2, 1e-3), "b": Offset(1.5, 0.6)}).verdict == "PASS"  # it may be the way there
    assert judge_clocks({}).verdict == "PASS"


def judged(speeds: list[float], kinds: dict[int, str], notable: float = NOTABLE["cuda"]) -> Check:
    return judge_speed("products", speeds, kinds, ["a", "a", "b", "b"], "TFLOP/s", notable=notable)


def test_a_slow_device_is_named_with_rank_host_and_share():
    kinds = dict.fromkeys(range(4), "gpu")
    assert judged([1.0, 0.9, 1.0, 0.95], kinds).verdict == "PASS"
    one = judged([1.0, 1.0, 0.7, 1.0], kinds)
    assert one.verdict == "WARN" and one.found == "rank 2 on b: 0.7 TFLOP/s, 70% of its siblings"
    assert judged([1.0, 1.0, 0.4, 1.0], kinds).verdict == "FAIL"
    mixed = {0: "gpu", 1: "gpu", 2: "cpu", 3: "cpu"}
    assert judged([1.0, 1.0, 0.1, 0.1], mixed).verdict == "PASS"


def test_cpus_that_other_programs_share_are_named_later():
    kinds = dict.fromkeys(range(4), "cpu")
    assert judged([1.0, 1.0, 0.75, 1.0], kinds, NOTABLE["cpu"]).verdict == "PASS"
    one = judged([1.0, 1.0, 0.65, 1.0], kinds, NOTABLE["cpu"])
    assert one.verdict == "WARN" and one.wanted.startswith("70%")


@pytest.mark.parametrize(("disturbed", "times"), [(0, 1), (4, 5), (9, AGAIN)])
def test_devices_are_measured_until_none_stands_out_and_the_fastest_measure_counts(monkeypatch, disturbed, times):
    """What disturbs a rank in some rounds alone is forgotten; what lasts is not."""
    made = []

    def said(mine: list[float], axis: object) -> list[list[float]]:
        made.append(mine)
        return [[1.0, 0.4 if len(made) <= disturbed else 0.9], [1.0, 1.0], [1.0, 1.0]]

    monkeypatch.setattr(compute, "product_tflops", lambda *given: 1.0)
    monkeypatch.setattr(compute, "copy_speed", lambda device: 1.0)
    monkeypatch.setattr(compute, "all_gather_json", said)
    axis = SimpleNamespace(size=3, group=None)
    found = compute.measure_speeds(axis, torch.device("cpu"), 0, dict.fromkeys(range(3), "cpu"))
    assert len(made) == times and found.copied == [0.9 if disturbed < AGAIN else 0.4, 1.0, 1.0]


def test_the_odd_answer_is_named_by_majority_and_one_that_varies_by_itself():
    kinds, hosts = dict.fromkeys(range(4), "gpu"), ["a", "a", "b", "b"]
    assert odd_answers({0: ["x"], 1: ["x"], 2: ["y"], 3: ["x"]}, kinds) == ([2], True)
    assert odd_answers({0: ["x", "z"], 1: ["x"], 2: ["x"], 3: ["x"]}, kinds) == ([0], True)
    assert odd_answers({0: ["x"], 1: ["x"], 2: ["y"], 3: ["y"]}, kinds) == ([0, 1, 2, 3], False)
    assert odd_answers({0: ["x"], 1: ["x"], 2: ["y"], 3: ["y"]}, {0: "g", 1: "g", 2: "c", 3: "c"}) == ([], True)
    one = judge_answers([["x"], ["x"], ["y"], ["x"]], kinds, hosts)
    assert one.verdict == "FAIL" and one.found == "wrong products: rank 2 on b: y"
    assert judge_answers([["x"]] * 4, kinds, hosts).verdict == "PASS"


def place(rank: int, host: str = "a", machine: str = "m", **more) -> Place:
    usual = {
        "local_rank": 0, "device": "cpu", "files": 65536, "processes": None, "locked": None, "shm": 1 << 34,
        "addresses": ["10.0.0.1"], "interfaces": ["eth0"], "listening": ["10.0.0.1:4000"], "memory": [1 << 34, 1 << 35],
        "device_memory": None,
    }  # fmt: skip
    return Place(rank=rank, host=host, machine=machine, **usual | more)


def verdicts(checks) -> dict[str, str]:
    return {one.name: one.verdict for one in checks}


def test_two_hosts_with_one_name_are_two():
    assert hosts_of([place(0), place(1)]) == {"a": [0, 1]}
    assert hosts_of([place(0), place(1, machine="n")]) == {"a (m)": [0], "a (n)": [1]}


def test_limits_that_are_too_low_are_named_with_host_and_command():
    hosts = {"a": [0], "b": [1]}
    fine = judge_limits([place(0), place(1, "b")], hosts, 1)
    assert set(verdicts(fine).values()) == {"PASS"}
    low = judge_limits([place(0), place(1, "b", files=128, processes=100)], hosts, 1)
    assert verdicts(low) == {"open files": "WARN", "processes": "WARN", "shared memory": "PASS"}
    assert low[0].found == "128 on b" and low[0].advice == "ulimit -n 264" and low[0].wanted == "264 or more"
    assert verdicts(judge_limits([place(0), place(1, "b", files=40)], hosts, 1))["open files"] == "FAIL"
    gpus = [place(0, device="cuda:0", locked=65536), place(1, "b", device="cuda:0", shm=1 << 20)]
    assert verdicts(judge_limits(gpus, hosts, 1)) == {
        "open files": "PASS", "processes": "PASS", "locked memory": "WARN", "shared memory": "WARN",
    }  # fmt: skip
    sharing = judge_limits([place(r, shm=60 << 20) for r in range(4)], {"a": [0, 1, 2, 3]}, 4)
    assert verdicts(sharing)["shared memory"] == "PASS"
    assert (
        verdicts(judge_limits([place(r, shm=1 << 20) for r in range(4)], {"a": [0, 1, 2, 3]}, 4))["shared memory"]
        == "WARN"
    )


def test_loopback_between_hosts_fails_and_a_wide_open_port_is_named():
    hosts = {"a": [0], "b": [1]}
    assert set(verdicts(judge_addresses([place(0), place(1, "b")], hosts)).values()) == {"PASS"}
    own = place(1, "b", addresses=["127.0.0.1"], interfaces=["lo"])
    (addresses, _) = judge_addresses([place(0), own], hosts)
    assert addresses.verdict == "FAIL" and addresses.found == "rank 1 on b: 127.0.0.1"
    local = [place(r, addresses=["127.0.0.1"], interfaces=["lo"], listening=["127.0.0.1:9"]) for r in (0, 1)]
    assert set(verdicts(judge_addresses(local, {"a": [0, 1]})).values()) == {"PASS"}
    for where in ("0.0.0.0:25999", "[::]:25999"):
        (_, ports) = judge_addresses([place(0), place(1, "b", listening=[where])], hosts)
        assert ports.verdict == "WARN" and ports.found == f"rank 1 on b: {where}"


def test_an_output_folder_that_is_slow_full_or_not_shared_is_said(tmp_path):
    fine, hosts = Written(num_bytes=10**7, seconds=0.1, free=10**12), ["a", "b"]
    assert set(verdicts(judge_output(tmp_path, [fine, fine], hosts, 10**9, 2, 3600)).values()) == {"PASS"}
    slow = judge_output(tmp_path, [fine, Written(num_bytes=10**7, seconds=10, free=10**12)], hosts, 10**10, 2, 3600)
    assert verdicts(slow)["write speed"] == "WARN" and "5e+03 s for a checkpoint of 10.0 GB" in slow[-1].found
    little = [fine, Written(num_bytes=10**7, seconds=0.1, free=2 * 10**9)]
    assert verdicts(judge_output(tmp_path, little, hosts, 10**9, 2, 3600))["space"] == "WARN"
    assert verdicts(judge_output(tmp_path, little, hosts, 10**10, 2, 36000))["space"] == "FAIL"
    (blind,) = judge_output(tmp_path, [fine, Written(seen=False)], hosts, 10**9, 2, 3600)
    assert blind.verdict == "FAIL" and "is not seen by rank 1 on b" in blind.found
    (wrong,) = judge_output(tmp_path, [fine, Written(error="read-only")], hosts, 10**9, 2, 3600)
    assert wrong.verdict == "FAIL" and wrong.found == "rank 1 on b: read-only"
