"""doctor --cluster on hosts of a network of its own, one of which has a slow link."""

import json
import subprocess

import pytest
from hosts import CAN_MAKE_HOSTS, Hosts
from submitted import LAUNCH, Submitted, write_recipe

needs_hosts = pytest.mark.skipif(not CAN_MAKE_HOSTS, reason="needs root, ip and unshare, to make network namespaces")
LOUD = {"products", "copies", "latency"}  # of which other programs of this machine may take a share


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    with Hosts(3, tmp_path_factory.mktemp("hosts")) as made:
        yield made


def examined(hosts, folder, recipe, name: str, **variables: str):
    """The job on three hosts, and what it writes."""
    write_recipe(folder, recipe)
    jobs = []
    for i in range(3):
        place = ["--nodes", "3", "--node-rank", str(i), "--master-addr", hosts.addresses[0], "--ranks-per-node", "1"]
        command = [*LAUNCH, "recipe.yaml", "--doctor", f"--json={name}", *place]
        jobs.append(Submitted(hosts, i, command, folder, folder / "run", **variables))
    codes = [job.finish(120) for job in jobs]
    report = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
    return codes, jobs[0].text, report, {one["name"]: one for one in report.get("checks", [])}


@needs_hosts
@pytest.mark.slow
def test_a_host_behind_a_slow_link_is_named_and_none_before(hosts, tiny, tmp_path):
    recipe = tiny(train={"global_batch": 6})
    codes, text, report, checks = examined(hosts, tmp_path, recipe, "before.json")
    assert codes == [0, 0, 0] and report["hosts"] == {"mrn-0": [0], "mrn-1": [1], "mrn-2": [2]}, text
    assert {n for n, one in checks.items() if one["verdict"] != "PASS"} <= LOUD, text
    assert "eth0 (10.77.0.1, 10.77.0.2, 10.77.0.3)" in checks["addresses"]["found"]
    assert all(where.startswith("10.77.0.") for rank in report["ranks"] for where in rank["listening"])
    shape = ["tc", "qdisc", "replace", "dev", "eth0", "root", "tbf", "rate", "80mbit", "burst", "32kbit"]
    try:
        done = subprocess.run(["ip", "netns", "exec", hosts.namespaces[2], *shape, "latency", "50ms"], check=False)
        if done.returncode:
            pytest.skip("this kernel cannot shape traffic (tc, tbf)")
        codes, text, report, checks = examined(hosts, tmp_path, recipe, "slow.json")
    finally:
        clear = ["tc", "qdisc", "del", "dev", "eth0", "root"]
        subprocess.run(["ip", "netns", "exec", hosts.namespaces[2], *clear], check=False, capture_output=True)
    assert codes == [0, 0, 0], text
    assert checks["bandwidth"]["verdict"] == "WARN", text
    assert checks["bandwidth"]["found"].startswith("host mrn-2: ") and "to all others" in checks["bandwidth"]["found"]


@needs_hosts
@pytest.mark.slow
def test_loopback_between_hosts_is_one_line_of_a_table_or_of_a_job(hosts, tiny, tmp_path):
    recipe = tiny(train={"global_batch": 6})
    codes, text, _, checks = examined(hosts, tmp_path, recipe, "lo.json", GLOO_SOCKET_IFNAME="lo")
    assert codes == [1, 1, 1] and checks["addresses"]["verdict"] == "FAIL", text
    assert "GLOO_SOCKET_IFNAME=lo is loopback (127.0.0.1) on mrn-" in checks["addresses"]["found"], text
