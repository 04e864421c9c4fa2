"""The Dockerfiles: plain, built from what there is, and each step does what it says, without a container engine.

The slow tests carry the steps out in layers over this machine's root, minutes each: pytest -m slow THIS_FILE
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from dockerfile import KNOWN, ROOT, Image, read, sources, words

from megaresnorm.launch.kubernetes import USER, WORK

sys.path.insert(0, str(ROOT / "launch"))
try:
    import check_environment
    import install_beside_torch
finally:
    sys.path.remove(str(ROOT / "launch"))

FILES = {"CPU": ROOT / "launch" / "Dockerfile", "CUDA": ROOT / "launch" / "Dockerfile.cuda"}
CAN_BUILD = os.getuid() == 0 and all(map(shutil.which, ("mount", "chroot", "setpriv", "apt-get", "useradd")))
each = pytest.mark.parametrize("path", FILES.values(), ids=FILES)


@each
def test_every_instruction_is_known_and_every_step_is_a_script(path):
    steps = read(path)
    assert {step.instruction for step in steps} <= set(KNOWN)
    assert [step.instruction for step in steps][:2] == ["ARG", "FROM"] and steps[1].text == "${BASE}"
    known = {name for step in steps if step.instruction == "ARG" for name, _ in words(step.text)}
    for step in steps:
        assert set(re.findall(r"\$\{(\w+)", step.text)) <= known
        if step.instruction == "RUN":
            assert not step.text.startswith("[")
            for shell in ("bash", "sh"):
                done = subprocess.run([shell, "-n", "-c", step.text], capture_output=True, text=True)
                assert done.returncode == 0, done.stderr


@each
def test_what_is_copied_is_there_and_reaches_the_builder(path):
    copied = [name for step in read(path) if step.instruction == "COPY" for name in sources(step)]
    let_through = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    for name in copied:
        assert (ROOT / name).exists() and name in let_through
    everything = {name for other in FILES.values() for step in read(other) for name in sources(step)
                  if step.instruction == "COPY"}  # fmt: skip
    assert set(let_through) == everything


@each
def test_containers_work_where_manifests_say_and_not_as_root(path):
    steps = read(path)
    arguments = dict(pair for step in steps if step.instruction == "ARG" for pair in words(step.text))
    assert [step.text for step in steps if step.instruction == "WORKDIR"][-1] == WORK
    assert [step.text for step in steps if step.instruction == "USER"] == ["${UID}"] and arguments["UID"] == str(USER)


@each
def test_they_name_no_host(path):
    """The registry and the index are those of who builds."""
    text = path.read_text()
    assert "://" not in text and not re.search(r"\b[\w-]+\.(com|org|io|net)\b", text)
    assert all(len(line) <= 120 for line in text.splitlines())


@pytest.mark.parametrize(
    ("index", "words"), [("", []), ("https://x/simple?a=b c", ["--index-url", "https://x/simple?a=b c"])]
)
def test_torch_comes_from_the_index_that_is_named(index, words, tmp_path):
    """By the step itself, with a Python that only tells how it was called."""
    (step,) = (step.text for step in read(FILES["CPU"]) if step.instruction == "RUN" and "TORCH_INDEX" in step.text)
    (tmp_path / "python").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "python").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "TORCH_INDEX": index}
    done = subprocess.run(["sh", "-c", step], env=environment, capture_output=True, text=True)
    assert done.stdout.splitlines()[3:] == ["--quiet", "--constraint", "constraints.txt", *words, "torch"]


def test_what_an_image_lacks_comes_from_the_lock_and_its_own_pins_go_first(tmp_path, monkeypatch):
    """pip is not run: what it would be told."""
    (tmp_path / "constraint.txt").write_text("rich==14.1.0\nPyYAML==6.0.1  # of the image\n# safetensors==1\n")
    monkeypatch.setenv("PIP_CONSTRAINT", str(tmp_path / "constraint.txt"))
    versions = {"torch": "2.12.0a0+nv", "numpy": "1.26.4", "typer": "0.9.0", "setuptools": "70.0"}
    monkeypatch.setattr(check_environment, "version_of", versions.get)
    monkeypatch.setattr(check_environment, "place_of", lambda module: None)
    monkeypatch.setattr(install_beside_torch.importlib.metadata, "version", versions.__getitem__)
    calls = []

    def run(*command, environment=None):
        files = [Path(word).read_text() for word in command if str(word).endswith(".txt")]
        calls.append(([str(word) for word in command[len(install_beside_torch.PIP) :]], "".join(files), environment))

    monkeypatch.setattr(install_beside_torch, "run", run)
    install_beside_torch.install(["numpy>=1.26", "rich>=14.1", "typer>=0.19"], tmp_path)
    (locked, entries, _), (rest, torch, _), (_, setuptools, scratch), (package, _, building) = calls
    names = set(re.findall(r"^([a-z0-9-]+)==", entries, re.MULTILINE))
    assert {"safetensors", "typer", "pydantic"} <= names and not names & {"rich", "pyyaml", "numpy", "setuptools"}
    assert "--require-hashes" in locked and entries.count("--hash=sha256:") > len(names)
    assert rest[-3:] == ["numpy>=1.26", "rich>=14.1", "typer>=0.19"] and torch == "torch==2.12.0a0+nv\n"
    assert setuptools.startswith("setuptools==") and "PIP_CONSTRAINT" not in scratch
    assert package[:-1] == ["--no-deps", "--no-build-isolation"] and building["PYTHONPATH"] == str(tmp_path / "build")


@pytest.mark.parametrize(
    ("version", "says"), [(None, "torch is missing"), ("2.4.0", "torch is 2.4.0, older than 2.11")]
)
def test_an_image_without_a_torch_that_will_do_is_refused(version, says, monkeypatch, capsys):
    monkeypatch.setattr(check_environment, "version_of", lambda name: version)
    monkeypatch.setattr(check_environment, "place_of", lambda module: None)
    assert install_beside_torch.main() == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"error: {says}; take an image with torch>=2.11"


@pytest.mark.parametrize("change", ["version", "file", "nothing"])
def test_a_torch_that_has_changed_fails_the_build(change, tmp_path, monkeypatch, capsys):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("")
    records = tmp_path / "torch-2.12.0.dist-info"
    records.mkdir()
    (records / "METADATA").write_text("Name: torch\nVersion: 2.12.0\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "torch")  # whose place is asked for
    monkeypatch.setattr(check_environment, "problem", lambda requirement: None)

    def install(others, folder):
        if change == "version":
            (records / "METADATA").write_text("Name: torch\nVersion: 2.13.0\n")
        elif change == "file":
            (tmp_path / "torch" / "__init__.py").write_text("# another\n")

    monkeypatch.setattr(install_beside_torch, "install", install)
    assert install_beside_torch.main() == (change != "nothing")
    said = capsys.readouterr()
    assert ("MegaResNorm beside torch 2.12.0" in said.out) == (change == "nothing")
    assert ("torch was 2.12.0 and is 2.1" in said.err) == (change != "nothing")


BASE = "/opt/base"  # the Python of the image that is built on


@pytest.fixture
def image(tmp_path):
    """An image with a Python and nothing else."""
    base = {"PATH": f"{BASE}/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
    try:
        image = Image(tmp_path, base).__enter__()
    except subprocess.CalledProcessError as e:
        pytest.skip(f"no layer can be laid over this machine's root: {e.stderr.decode().strip()}")
    try:
        shutil.rmtree(image.root / "workspace", ignore_errors=True)
        done = image.run(f"{sys.executable} -c 'import sys; print(sys.base_prefix)'")
        (prefix,) = done.stdout.split()
        assert image.run(f"{prefix}/bin/python3 -m venv {BASE} && chmod go+rx /root").returncode == 0
        yield image
    finally:
        image.__exit__()


def check(image):
    """What a user does first in a container, as the image's user."""
    doctor = image.run("megaresnorm doctor")
    assert "torch" in doctor.stdout and "Traceback" not in doctor.stderr, doctor
    assert image.run("id -u; pwd").stdout.split() == [str(USER), WORK]
    prepare = image.run("megaresnorm prepare --corpus stdlib --tokenizer bytes --out runs/quickstart/data")
    assert prepare.returncode == 0, prepare
    small = "model.num_blocks=2 train.steps=3 train.global_batch=4 train.eval_every=0"
    trained = image.run(f"OMP_NUM_THREADS=1 megaresnorm launch configs/quickstart.yaml {small} --ranks-per-node 2")
    assert trained.returncode == 0 and "3/3" in trained.stdout, trained


@pytest.mark.slow
@pytest.mark.skipif(not CAN_BUILD, reason="needs root and Debian")
def test_the_image_for_cpus_is_built_and_trains(image):
    image.build(read(FILES["CPU"]), {})
    (pinned,) = re.findall(r"^torch==(.*)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert image.run("python -c 'import torch; print(torch.__version__)'").stdout.strip().split("+")[0] == pinned
    check(image)


@pytest.mark.slow
@pytest.mark.skipif(not CAN_BUILD, reason="needs root and Debian")
def test_the_image_on_another_keeps_its_torch_and_its_pins(image):
    pins = "rich==14.1.0\nsetuptools==78.1.0\n"  # one that is missing, one that is there
    (image.root / "opt" / "constraint.txt").write_text(pins)
    image.environment["PIP_CONSTRAINT"] = "/opt/constraint.txt"
    done = image.run("python -m pip install --quiet torch==2.13.0 setuptools numpy==2.3.5")
    assert done.returncode == 0, done
    packages = next((image.root / BASE.lstrip("/")).glob("lib/python3*/site-packages"))
    before = files_of(packages)
    assert len(before) > 1000
    image.build(read(FILES["CUDA"]), {})
    assert files_of(packages) == before
    for name, version in {"rich": "14.1.0", "setuptools": "78.1.0", "numpy": "2.3.5"}.items():
        assert (packages / f"{name}-{version}.dist-info").is_dir()
    check(image)


def files_of(packages: Path) -> dict[str, tuple[int, int]]:
    """Sizes and times of torch's files, without what Python compiles when they are imported."""
    found = [
        path for top in ("torch", *(p.name for p in packages.glob("torch-*"))) for path in (packages / top).rglob("*")
    ]
    files = [path for path in found if path.is_file() and "__pycache__" not in path.parts]
    return {str(path.relative_to(packages)): (path.stat().st_size, path.stat().st_mtime_ns) for path in files}
