"""launch/environment.sh installs only into what it made, uses everything else as it is, and checks what it installs."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
USE = 'make_environment \'\' && echo "${MEGARESNORM[@]}" && echo "${PYTHONPATH:-none}"'


def shell(code, **environment):
    env = {"PATH": "/usr/bin:/bin", "HOME": "/nonexistent", "PYTHON": sys.executable, **environment}
    script = f"set -euo pipefail; source launch/environment.sh; {code}"
    return subprocess.run(["bash", "-c", script], cwd=ROOT, env=env, capture_output=True, text=True)


def fake_environment(folder, packages=True, torch=None):
    """A virtual environment whose Python is the one of the tests, with its packages or none; pip only logs calls.

    Args:
        torch: a version that is said to be installed.
    """
    (folder / "bin").mkdir(parents=True)
    (folder / "pyvenv.cfg").write_text("")
    (folder / "bin" / "python").write_text(
        f'#!/bin/sh\ncase "$*" in *"-m pip "*) echo "$*" >>{folder}/pip; exit 0;; esac\n'
        f'PYTHONPATH={folder}/lib exec {sys.executable} {"" if packages else "-S"} "$@"\n'
    )
    (folder / "bin" / "python").chmod(0o755)
    if torch:
        records = folder / "lib" / f"torch-{torch}.dist-info"
        records.mkdir(parents=True)
        (records / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {torch}\n")
    return folder


def pip_calls(folder):
    file = folder / "pip"
    calls = file.read_text().splitlines() if file.exists() else []
    return [call for call in calls if not call.endswith("--version")]


def test_an_environment_that_was_not_made_here_is_used_as_it_is(tmp_path):
    venv = fake_environment(tmp_path / "venv")
    before = sorted(venv.iterdir())
    got = shell(USE, VENV=str(venv), PYTHONPATH="/mine")
    line, command, path = got.stdout.split("\n")[1:4]
    assert re.fullmatch(rf"==> using {venv} as it is: Python 3\.\d+\.\d+, torch 2\.\S+", line), got
    assert command == f"{venv}/bin/python -m megaresnorm.cli" and path == f"{ROOT}:/mine"
    assert pip_calls(venv) == [] and sorted(venv.iterdir()) == before


def test_what_is_missing_there_is_named_with_the_command_that_installs_it(tmp_path):
    venv = fake_environment(tmp_path / "venv", packages=False)
    got = shell(USE, VENV=str(venv))
    assert got.returncode == 1 and pip_calls(venv) == []
    (line,) = got.stderr.splitlines()
    assert line.startswith(
        f"error: {venv} was not made here and is used as it is, but torch is missing, numpy is missing, "
    )
    command = shlex.split(line.split("install it there: ")[1])
    assert command[-9:] == ["torch>=2.11", "numpy>=1.26", "pydantic>=2.7", "pyyaml>=6.0", "rich>=14.1",
                            "safetensors>=0.5", "sentencepiece>=0.2", "tensorboard>=2.16", "typer>=0.19"]  # fmt: skip


def test_an_activated_environment_is_used_if_it_has_everything(tmp_path):
    ready, other = fake_environment(tmp_path / "ready"), fake_environment(tmp_path / "other", packages=False)
    for variable in ("VIRTUAL_ENV", "CONDA_PREFIX"):
        assert f"using {ready} as it is" in shell(USE, **{variable: str(ready)}).stdout
        assert shell("choose_environment '' && echo $VENV", **{variable: str(other)}).stdout == ".venv\n"
    assert shell("choose_environment '' && echo $VENV", VENV="mine", VIRTUAL_ENV=str(ready)).stdout == "mine\n"


def test_into_one_that_was_made_here_goes_what_the_lock_names_with_its_digests(tmp_path):
    venv = fake_environment(tmp_path / "venv")
    (venv / ".megaresnorm").touch()
    got = shell(USE, VENV=str(venv), PYTHONPATH="/other/packages")
    assert got.returncode == 0 and f"{venv}/bin/megaresnorm\n" in got.stdout, got
    assert [
        re.sub(r"^-I -m pip install --quiet --disable-pip-version-check ", "", call) for call in pip_calls(venv)
    ] == [
        "--require-hashes --no-deps --requirement requirements.lock",
        "--constraint constraints.txt torch",
        "--no-deps --no-build-isolation --editable .",
    ]
    shell(USE, VENV=str(venv))
    assert len(pip_calls(venv)) == 3, "once is enough"
    shell("make_environment dev", VENV=str(venv))
    assert pip_calls(venv)[-1].endswith("--constraint constraints.txt --no-build-isolation --editable .[dev]")


@pytest.mark.parametrize(("torch", "answer"), [(None, "ours"), ("+cpu", "ours"), ("2.12.0+cu126", "theirs")])
def test_the_usual_folder_is_taken_over_unless_another_torch_is_there(torch, answer, tmp_path):
    (pinned,) = re.findall(r"^torch==(.*)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    torch = pinned + torch if torch == "+cpu" else torch
    venv = fake_environment(tmp_path / ".venv", packages=False, torch=torch)
    code = f"cp -r launch pyproject.toml constraints.txt {tmp_path}; cd {tmp_path}; VENV=.venv; is_ours ''"
    got = shell(f"{code} && echo ours || echo theirs")
    assert got.stdout == f"{answer}\n", got
    assert (venv / ".megaresnorm").exists() == (answer == "ours")


def test_a_folder_that_is_no_environment_is_never_removed(tmp_path):
    (tmp_path / "venv").mkdir()
    (tmp_path / "venv" / "precious").write_text("years of work")
    for code in ("make_venv", "make_environment ''"):
        got = shell(code, VENV=str(tmp_path / "venv"))
        assert got.returncode == 1 and "is not a virtual environment; set VENV=another-folder" in got.stderr
        assert (tmp_path / "venv" / "precious").exists()


def test_nor_is_an_environment_without_pip(tmp_path):
    """As uv makes them."""
    venv = fake_environment(tmp_path / "venv", packages=False)
    (venv / "bin" / "python").write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    got = shell("make_environment ''", VENV=str(venv))
    assert got.returncode == 1 and "install it there: uv pip install --python" in got.stderr
    assert (venv / "bin" / "python").exists()


def test_a_half_made_environment_of_ours_is_made_again(tmp_path):
    venv = tmp_path / "venv"
    (venv / "bin").mkdir(parents=True)
    (venv / "pyvenv.cfg").write_text("")
    (venv / "half").touch()
    (venv / ".megaresnorm").write_text("made here")
    python = tmp_path / "python"  # python -m venv takes seconds, and test.sh does it in earnest
    python.write_text(
        f'#!/bin/sh\n[ "$2" = venv ] || exec {sys.executable} "$@"\n'
        'mkdir "$3/bin"; touch "$3/pyvenv.cfg"; printf "#!/bin/sh\\n" >"$3/bin/python"; chmod +x "$3/bin/python"\n'
    )
    python.chmod(0o755)
    got = shell("make_venv && make_venv && is_ours '' && echo ours", VENV=str(venv), PYTHON=str(python))
    assert got.returncode == 0 and got.stdout.endswith("ours\n"), got
    assert got.stdout.count("==> making") == 1 and (venv / "bin" / "python").exists() and not (venv / "half").exists()


def test_missing_and_old_pythons_are_said(tmp_path):
    new = {"VENV": str(tmp_path / "new")}
    assert "not found; install Python 3.10" in shell("make_environment ''", PYTHON="no-such-python", **new).stderr
    old = tmp_path / "old" / "bin" / "python"
    old.parent.mkdir(parents=True)
    old.write_text("#!/bin/sh\ncase $1 in --version) echo Python 3.8.1;; *) exit 1;; esac\n")
    old.chmod(0o755)
    assert "Python 3.8.1 is too old" in shell("make_environment ''", PYTHON=str(old), **new).stderr
    assert "Python 3.8.1 is too old" in shell("make_environment ''", VENV=str(tmp_path / "old")).stderr
    assert not (tmp_path / "new").exists()


def pins(file):
    """(name, condition) -> version of what a file names."""
    lines = [line.rstrip(" \\") for line in (ROOT / file).read_text().splitlines() if re.match(r"[a-z]", line)]
    return {(entry.split("==")[0], condition): entry.split("==")[1] for entry, _, condition in
            (line.partition(" ; ") for line in lines)}  # fmt: skip


def test_lock_and_constraints_agree_and_every_entry_has_digests():
    lock, constraints = pins("requirements.lock"), pins("constraints.txt")
    assert len(lock) > 30 and {version for (name, _), version in lock.items() if name == "numpy"} == {
        version for (name, _), version in constraints.items() if name == "numpy"
    }
    versions = {(name, version) for (name, _), version in constraints.items()}
    assert {(name, version) for (name, _), version in lock.items()} <= versions
    entries = re.split(r"\n(?=[a-z])", (ROOT / "requirements.lock").read_text())[1:]
    assert len(entries) == len(lock) and all(re.search(r"--hash=sha256:[0-9a-f]{64}", entry) for entry in entries)
    torch = [condition for name, condition in constraints if name == "torch"]
    assert torch == [""], "one torch for every platform: environment.sh asks for that"


def test_neither_names_an_index_nor_a_path():
    for file in ("requirements.lock", "constraints.txt"):
        text = (ROOT / file).read_text()
        assert "://" not in text and " @ " not in text and not re.search(r"^-", text, re.MULTILINE)


def test_the_lock_has_all_that_the_package_needs_but_torch():
    sys.path.insert(0, str(ROOT / "launch"))
    try:
        import check_environment
    finally:
        sys.path.remove(str(ROOT / "launch"))
    needed = {requirement.split(">=")[0] for requirement in check_environment.requirements("")}
    locked = {name for name, _ in pins("requirements.lock")}
    assert needed - locked == {"torch"} and "setuptools" in locked
    assert check_environment.problem("numpy>=99") == f"numpy is {check_environment.version_of('numpy')}, older than 99"
    numpy = check_environment.version_of("numpy")
    assert check_environment.problem("numpy>=1,<2") == f"numpy is {numpy}, not below 2"
    assert check_environment.problem("numpy>=1,<99") is None
    assert check_environment.problem("no-such-package>=1") == "no-such-package is missing"
    assert check_environment.numbers("2.13.0a0+cpu") == [2, 13, 0] > check_environment.numbers("2.9")


def test_the_tests_have_the_deepspeed_that_the_extra_allows():
    project = (ROOT / "pyproject.toml").read_text()
    (asked,) = re.findall(r'^deepspeed = \["deepspeed(>=[\d.]+,<[\d.]+)"\]$', project, re.MULTILINE)
    assert f"    \"deepspeed{asked}; sys_platform == 'linux'\",\n" in project, "the extra dev"
    least, below = ([int(number) for number in bound.lstrip("<>=").split(".")] for bound in asked.split(","))
    pinned = pins("constraints.txt")["deepspeed", "sys_platform == 'linux'"]
    assert least <= [int(number) for number in pinned.split(".")] < below


@pytest.mark.parametrize("script", ["quickstart.sh", "test.sh", "torchrun.sh", "deepspeed.sh"])
def test_scripts_have_help(script):
    got = subprocess.run(["bash", ROOT / "launch" / script, "--help"], capture_output=True, text=True)
    assert got.returncode == 0 and f"bash launch/{script}" in got.stdout


def script(name, *words, cwd=None, **environment):
    """Run a script that starts nodes, in an environment that was not made here, whose Python tells how it was called.

    Returns:
        What it printed; the words behind ``python -m megaresnorm`` where it came so far, and what it had of variables.
    """
    python = Path(environment["VENV"]) / "bin" / "python"
    told = 'case "$*" in "-m megaresnorm "*) printf "%s\\n" called "$@"; env >"$0.env"; exit 0;; esac\n'
    python.write_text(python.read_text().replace("#!/bin/sh\n", f"#!/bin/sh\n{told}", 1))
    got = subprocess.run(
        ["bash", ROOT / "launch" / name, *words],
        env={"PATH": "/usr/bin:/bin", "HOME": "/nonexistent", **environment},
        capture_output=True,
        text=True,
        cwd=cwd,
    )
    if "called\n" not in got.stdout:
        return got, None, None
    variables = dict(line.split("=", 1) for line in Path(f"{python}.env").read_text().splitlines() if "=" in line)
    return got, got.stdout.split("called\n-m\nmegaresnorm\n")[1].splitlines(), variables


def with_deepspeed(folder):
    venv = fake_environment(folder)
    records = venv / "lib" / "deepspeed-0.19.8.dist-info"
    records.mkdir(parents=True)
    (records / "METADATA").write_text("Metadata-Version: 2.1\nName: deepspeed\nVersion: 0.19.8\n")
    return venv


def test_torchrun_is_started_where_the_script_was_and_installs_nothing(tmp_path):
    venv = fake_environment(tmp_path / "venv")
    got, words, variables = script("torchrun.sh", "r.yaml", "a=b c", cwd=tmp_path, VENV=str(venv), NODES="2")
    assert words == ["launch", "r.yaml", "a=b c"] and pip_calls(venv) == [], got
    assert variables["PWD"] == str(tmp_path) and variables["NODES"] == "2"
    assert f"using {venv} as it is: Python" in got.stdout and ", torch " in got.stdout


def test_deepspeed_gets_as_options_what_the_variables_say(tmp_path):
    venv = with_deepspeed(tmp_path / "venv")
    usual = ["launch", "r.yaml", "a=b c", "--with", "deepspeed", "--hostfile"]
    got, words, variables = script("deepspeed.sh", "r.yaml", "a=b c", cwd=tmp_path, VENV=str(venv))
    assert words == [*usual, "hosts"] and pip_calls(venv) == [], got
    assert variables["PWD"] == str(tmp_path) and variables["PATH"].startswith(f"{venv}/bin:")
    assert f"using {venv} as it is: Python" in got.stdout and ", torch " in got.stdout
    settings = {
        "HOSTFILE": "my hosts", "NO_SSH": "1", "NODE_RANK": "1", "RANKS_PER_NODE": "8", "MASTER_ADDR": "node0",
        "MASTER_PORT": "29600", "JOB_ID": "j", "MAX_RESTARTS": "0", "LOG_DIR": "my logs", "NODES": "7",
    }  # fmt: skip
    _, words, variables = script("deepspeed.sh", "r.yaml", "a=b c", cwd=tmp_path, VENV=str(venv), **settings)
    assert words == [
        *usual, "my hosts", "--nodes", "7", "--ranks-per-node", "8", "--master-addr", "node0", "--master-port", "29600",
        "--job", "j", "--max-restarts", "0", "--log-dir", "my logs", "--no-ssh", "--node-rank", "1",
    ]  # fmt: skip
    assert not {"NODES", "NODE_RANK", "RANKS_PER_NODE", "MASTER_ADDR", "MASTER_PORT", "LOG_DIR"} & variables.keys()


def test_without_deepspeed_an_environment_of_others_is_named_and_left_alone(tmp_path):
    venv = fake_environment(tmp_path / "venv", packages=False, torch="2.99.0")
    got, words, _ = script("deepspeed.sh", "r.yaml", VENV=str(venv))
    assert got.returncode == 1 and words is None and pip_calls(venv) == []
    (line,) = got.stderr.splitlines()
    assert "was not made here and is used as it is, but" in line and "deepspeed is missing" in line
    assert "torch is" not in line and "'deepspeed>=0.19.7,<0.20'" in line


@pytest.mark.parametrize("name", ["torchrun.sh", "deepspeed.sh"])
def test_help_names_every_variable_that_the_script_reads(name):
    text = (ROOT / "launch" / name).read_text()
    told, code = text.split("\nset -euo pipefail\n")
    read = set(re.findall(r"\$\{([A-Z_]+)", code))
    assert {variable for variable in read if not re.search(rf"\b{variable}\b", told)} == set()
    wanted = {"RANKS_PER_NODE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "JOB_ID", "MAX_RESTARTS", "LOG_DIR",
              "OMP_NUM_THREADS", "VENV"}  # fmt: skip
    assert all(re.search(rf"^#   .*\b{variable}\b", told, re.MULTILINE) for variable in wanted)


def test_the_readme_of_launch_names_what_there_is():
    text = (ROOT / "launch" / "README.md").read_text()
    files = {path.name for path in (ROOT / "launch").iterdir() if path.suffix in (".sh", ".sbatch")}
    files |= {"Dockerfile", "Dockerfile.cuda", "kubernetes/job.yaml", "install_beside_torch.py"}
    assert all(f"`{name}`" in text for name in files)
    table = text.split("## Variables", 1)[1]
    for variable in ("RANKS_PER_NODE", "NODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "JOB_ID", "MAX_RESTARTS",
                     "LOG_DIR", "OMP_NUM_THREADS", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "NCCL_IB_HCA",
                     "NCCL_DEBUG", "TMPDIR", "VENV"):  # fmt: skip
        assert f"`{variable}`" in table
