#!/usr/bin/env python3
"""Whether MegaResNorm works with the versions that it is for: makes environments, installs, imports, runs tests.

python tools/version_matrix.py FOLDER
python tools/version_matrix.py FOLDER --python /opt/python3.12/bin/python3 --torch-of 2.11.0=/opt/an-environment

For the pinned torch with Python 3.11, and for the oldest that pyproject.toml allows with Python 3.12, FOLDER gets an
environment, in which three sets of packages are tried one after the other:

* minimal: what pyproject.toml requires. Every module is imported that can be; commands that need an optional package
  say so in one line.
* without: the extras data and hf as well, with pytest: the chosen tests.
* with: the extra deepspeed as well: the fast tests of its engine.

In each of them `import megaresnorm` must import no optional package, and a tiny run is trained with what was installed,
away from this repository. Versions are those of constraints.txt, but for torch. pip's own settings hold: where they
name no source of builds for CPUs, torch brings gigabytes of CUDA packages, unless --torch-of names an environment to
take it from. Prints a table; the exit code is 1 if a cell fails. FOLDER keeps the environments and their logs.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROBE = Path(__file__).with_name("version_probe.py")
PYTHON_OF_PINNED, PYTHON_OF_OLDEST = "3.11", "3.12"
TESTS = ("tests/test_layers.py", "tests/test_package.py", "tests/test_trainer.py")
ZERO = ("tests/zero", "-m", "deepspeed and not slow")
# What torch consists of, with the packages that its builds for GPUs bring.
OF_TORCH = re.compile(r"(torch|torchgen|functorch|triton|nvidia|cuda)([-_.].*)?")


@dataclass
class Environment:
    """A virtual environment for one torch and one Python.

    Attributes:
        cells: set of packages -> what became of it.
    """

    torch: str
    version: str
    python: Path
    folder: Path
    cells: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"Python {self.version}, torch {self.torch}"

    @property
    def log(self) -> Path:
        return self.beside("log")

    def beside(self, ending: str) -> Path:
        return self.folder.parent / f"{self.folder.name}.{ending}"

    @property
    def own_python(self) -> Path:
        return self.folder / "bin" / "python"

    def run(self, *words: object, cwd: Path = ROOT) -> None:
        """Run a program of the environment; what it prints goes into a log beside it.

        Raises:
            subprocess.CalledProcessError: it fails.
        """
        settings = os.environ | {"OMP_NUM_THREADS": "1", "PIP_QUIET": "1", "PIP_PROGRESS_BAR": "off"}
        settings.pop("PYTHONPATH", None)
        with self.log.open("a") as log:
            log.write(f"\n$ {' '.join(map(str, words))}\n")
            log.flush()
            subprocess.run([str(word) for word in words], cwd=cwd, env=settings, stdout=log, stderr=log, check=True)

    @property
    def source(self) -> Path:
        return self.folder.parent / "source"

    def install(self, *packages: object) -> None:
        self.run(self.own_python, "-m", "pip", "install", "-c", self.beside("constraints.txt"), *packages)

    def test(self, *arguments: object) -> None:
        self.run(self.own_python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="for the environments; made if it is not there")
    parser.add_argument("--python", type=Path, action="append", default=[], metavar="FILE",
                        help="an interpreter to take, beside python3.11 and python3.12 of PATH")  # fmt: skip
    parser.add_argument("--torch-of", action="append", default=[], metavar="VERSION=ENVIRONMENT",
                        help="take this torch from an environment of the same Python, by links")  # fmt: skip
    parser.add_argument("--torch", metavar="VERSION", help="try this one alone")
    arguments = parser.parse_args()
    versions = {pinned(): PYTHON_OF_PINNED, oldest(): PYTHON_OF_OLDEST}
    if arguments.torch is not None and arguments.torch not in versions:
        parser.error(f"--torch {arguments.torch}: wanted one of {', '.join(versions)}")
    donors = dict(one.partition("=")[::2] for one in arguments.torch_of)
    pythons = find_pythons(arguments.python)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    wanted = {torch: python for torch, python in versions.items() if arguments.torch in (None, torch)}
    tried = []
    for torch, version in wanted.items():
        folder = arguments.folder.absolute() / f"python{version}-torch{torch}"
        if version not in pythons:
            parser.error(f"python{version} is not on PATH; name it: --python FILE")
        tried.append(Environment(torch, version, pythons[version], folder))
    copy_source(arguments.folder.absolute() / "source")
    for environment in tried:
        try_all(environment, donors.get(environment.torch))
    print(table(tried))
    return 0 if all(cell.startswith("ok") for each in tried for cell in each.cells.values()) else 1


def pinned() -> str:
    return re.findall(r"^torch==([\d.]+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[0]


def oldest() -> str:
    """The first release that pyproject.toml allows."""
    found = re.findall(r'^    "torch>=([\d.]+)",$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[0]
    return found if found.count(".") == 2 else f"{found}.0"


def find_pythons(given: list[Path]) -> dict[str, Path]:
    """Interpreters by their versions, as 3.11; those that are given come first."""
    found: dict[str, Path] = {}
    names = [shutil.which(f"python{version}") for version in (PYTHON_OF_PINNED, PYTHON_OF_OLDEST)]
    for path in (*given, *(Path(name) for name in names if name)):
        code = "import sys; print('%d.%d' % sys.version_info[:2])"
        done = subprocess.run([path, "-c", code], capture_output=True, text=True, check=False)
        if done.returncode == 0:
            found.setdefault(done.stdout.strip(), path)
        elif path in given:
            raise SystemExit(f"error: --python {path}: not an interpreter ({done.stderr.strip()[:200]})")
    return found


def copy_source(folder: Path) -> None:
    """The files of this repository, in which a build may leave what it makes."""
    shutil.rmtree(folder, ignore_errors=True)
    files = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(files, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines():
        if (ROOT / name).is_file() and not name.startswith(("docs/", "tests/")):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)


def try_all(environment: Environment, donor: str | None) -> None:
    """Try one set of packages after the other; each is tried whatever became of those before."""
    steps: dict[str, Callable[[], None]] = {
        "minimal": lambda: try_minimal(environment, donor),
        "without": lambda: try_without(environment),
        "with": lambda: try_with(environment),
    }
    for name, step in steps.items():
        start = time.monotonic()
        try:
            step()
            said = f"ok, {time.monotonic() - start:.0f} s"
        except (OSError, subprocess.CalledProcessError) as e:
            said = f"FAILED: {failure(e)}"
        environment.cells[name] = said
        print(f"{environment.name}, {name}: {said}", flush=True)


def failure(error: OSError | subprocess.CalledProcessError) -> str:
    if isinstance(error, OSError):
        return str(error)
    words = [Path(word).name if "/" in word else word for word in error.cmd]
    return f"{' '.join(words[1:])[:80]} (exit code {error.returncode}; see the log)"


def constraints_with(torch: str) -> str:
    """The pinned versions, but for torch; another torch chooses its setuptools as well (2.11 needs one below 82)."""
    others = ("torch==",) if torch == pinned() else ("torch==", "setuptools==")
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    kept = [f"torch=={torch}", *(line for line in lines if not line.startswith(others))]
    return "\n".join(kept) + "\n"


def try_minimal(environment: Environment, donor: str | None) -> None:
    environment.log.unlink(missing_ok=True)
    environment.beside("constraints.txt").write_text(constraints_with(environment.torch))
    environment.run(environment.python, "-m", "venv", "--clear", environment.folder, cwd=environment.folder.parent)
    if donor is not None:
        link_torch(Path(donor), environment)
    environment.install(f"torch=={environment.torch}")
    environment.install(environment.source)
    probe(environment)


def try_without(environment: Environment) -> None:
    environment.install(
        f"{environment.source}[data,hf]", "pytest", "setuptools>=77"
    )  # the last builds the wheel that a test opens
    probe(environment)
    environment.test(*TESTS)


def try_with(environment: Environment) -> None:
    environment.install(f"{environment.source}[deepspeed]")
    probe(environment)
    environment.test(*ZERO)


def probe(environment: Environment) -> None:
    environment.run(environment.own_python, PROBE, cwd=environment.folder)


def link_torch(donor: Path, environment: Environment) -> None:
    """Hard links to the files of another environment's torch, or copies on another file system.

    Raises:
        OSError: it has no torch for this Python.
    """
    source, target = (
        folder / "lib" / f"python{environment.version}" / "site-packages" for folder in (donor, environment.folder)
    )
    if not (source / "torch").is_dir():
        raise FileNotFoundError(f"--torch-of: {source} has no torch")
    for path in of_torch(source):
        if path.is_dir():
            shutil.copytree(path, target / path.name, copy_function=link)
        else:
            link(str(path), str(target / path.name))


def of_torch(site: Path) -> Iterator[Path]:
    return (path for path in site.iterdir() if OF_TORCH.fullmatch(path.name))


def link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def table(tried: list[Environment]) -> str:
    names = ["minimal", "without", "with"]
    lines = ["", f"| | {' | '.join(names)} DeepSpeed |", f"| --- |{' --- |' * len(names)}"]
    for each in tried:
        lines.append(f"| {each.name} | {' | '.join(each.cells[name] for name in names)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
