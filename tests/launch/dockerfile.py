"""Reads a Dockerfile in plain syntax, and carries its steps out without a container engine.

The image is this machine's own root folder with a layer over it (overlayfs): what a step writes lies in that layer.
Needs root.
"""

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
KNOWN = ("ARG", "FROM", "ENV", "RUN", "WORKDIR", "COPY", "USER", "CMD")


@dataclass(frozen=True)
class Step:
    """An instruction and what stands behind it, in one line."""

    instruction: str
    text: str


def read(path: Path) -> list[Step]:
    """The instructions of a Dockerfile, without comments."""
    lines = [line for line in path.read_text().splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [Step(*line.split(None, 1)) for line in joined.splitlines()]


def words(text: str) -> list[tuple[str, str]]:
    """NAME=VALUE pairs of ENV or ARG; an ARG without a value has an empty one."""
    return [(word.partition("=")[0], word.partition("=")[2]) for word in text.split()]


def sources(step: Step) -> list[str]:
    """What a COPY copies, relative to the root of this repository."""
    return step.text.split()[:-1]


class Image:
    """An image that is being built (``with Image(folder) as image``).

    Args:
        folder: for the layer; emptied at the end.
        base: variables of the image that it builds on.
    """

    def __init__(self, folder: Path, base: dict[str, str]) -> None:
        self._folder, self.root = folder / "image", folder / "image" / "root"
        self.environment = {"PATH": os.defpath, "HOME": "/root"} | base
        self.arguments: dict[str, str] = {}
        self.work, self.user = "/", ""

    def __enter__(self) -> "Image":
        layers = [self._folder / name for name in ("upper", "work")]
        for layer in (*layers, self.root):
            layer.mkdir(parents=True)
        options = f"lowerdir=/,upperdir={layers[0]},workdir={layers[1]}"
        try:
            _run("mount", "-t", "overlay", "overlay", "-o", options, self.root)
            for name in ("proc", "dev"):
                _run("mount", "--rbind", f"/{name}", self.root / name)
                _run("mount", "--make-rslave", self.root / name)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        subprocess.run(["umount", "--recursive", "--lazy", str(self.root)], check=False, capture_output=True)
        if not os.path.ismount(self.root):
            shutil.rmtree(self._folder, ignore_errors=True)

    def run(self, command: str, timeout: float = 1200) -> "subprocess.CompletedProcess[str]":
        """Run a command as the steps so far have left the image, by the shell of containers."""
        environment = self.arguments | self.environment
        user = ["setpriv", f"--reuid={self.user}", "--clear-groups"] if self.user else []
        environment |= {"HOME": "/home/megaresnorm"} if self.user else {}
        variables = [f"{name}={value}" for name, value in environment.items()]
        inside = f'cd "{self.work}" && exec env -i "$@"'
        call = ["chroot", str(self.root), *user, "sh", "-c", inside, "-", *variables, "/bin/sh", "-c", command]
        return subprocess.run(call, capture_output=True, text=True, timeout=timeout)

    def build(self, steps: list[Step], given: dict[str, str]) -> None:
        """Carry out the steps of a Dockerfile.

        Args:
            given: values of ARG.
        """
        for step in steps[[step.instruction for step in steps].index("FROM") + 1 :]:
            if step.instruction == "RUN":
                done = self.run(step.text)
                assert done.returncode == 0, f"{step.text}\n{done.stdout}\n{done.stderr}"
            elif step.instruction == "ENV":
                self.environment |= dict(words(step.text))
            elif step.instruction == "ARG":
                self.arguments |= {name: given.get(name, value) for name, value in words(step.text)}
            elif step.instruction == "USER":
                self.user = re.sub(r"\$\{(\w+)\}", lambda found: self.arguments[found[1]], step.text)
            elif step.instruction == "WORKDIR":
                self.work = step.text
                self.inside(".").mkdir(parents=True, exist_ok=True)
            elif step.instruction == "COPY":
                self._copy(sources(step), step.text.split()[-1])

    def inside(self, path: str) -> Path:
        """Where a path of the image lies."""
        return self.root / os.path.normpath(os.path.join(self.work, path)).lstrip("/")

    def _copy(self, names: list[str], to: str) -> None:
        target = self.inside(to)
        target.mkdir(parents=True, exist_ok=True)
        for name in names:
            source = ROOT / name
            if source.is_dir():  # its content, as COPY does
                shutil.copytree(source, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, target)


def _run(*command: object) -> None:
    subprocess.run([str(word) for word in command], check=True, capture_output=True)
