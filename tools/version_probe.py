"""What tools/version_matrix.py runs in each environment, away from the repository: whether the package works there.

It needs nothing but the package that was installed. Prints a line for each fault, and one that says what was looked at.
"""

import importlib
import importlib.util
import pkgutil
import subprocess
import sys
import tempfile
from pathlib import Path

HEAVY = ("apex", "datasets", "deepspeed", "liger_kernel", "quack", "tensorboard", "transformer_engine", "transformers",
         "triton")  # fmt: skip
# Modules that import an optional package when they are imported -> the package. All others import everywhere.
OPTIONAL = {
    "megaresnorm.convert.modeling_megaresnorm": "transformers",
    "megaresnorm.kernels.add_norm.apex": "apex",
    "megaresnorm.kernels.add_norm.te": "transformer_engine",
    "megaresnorm.kernels.add_norm.triton_": "triton",
    "megaresnorm.kernels.fp8.te": "transformer_engine",
    "megaresnorm.kernels.fp8.triton_": "triton",
    "megaresnorm.kernels.gpu.activation": "triton",
    "megaresnorm.kernels.gpu.cross_entropy": "triton",
    "megaresnorm.kernels.gpu.liger": "liger_kernel",
    "megaresnorm.kernels.gpu.quack": "quack",
    "megaresnorm.kernels.gpu.rotary": "triton",
}
TINY = ("model.num_blocks=2", "train.steps=2", "train.output=run", "data.path=data", "train.sample_tokens=0")
TRAIN = ("train", "recipe.yaml", *TINY)
WORKS = (("prepare", "text.txt", "--out", "data"), TRAIN, ("checkpoint", "verify", "run"), ("doctor",))
# Where the package is not installed, the command says so in one line.
NEEDS = (
    ("transformers", ("convert", "to-hf", "run", "hf")),
    ("transformers", ("convert", "from-deepspeed", "run", "out")),
    ("datasets", ("prepare", "hf:name", "--out", "more")),
    ("datasets", ("prepare", "rows.parquet", "--out", "more")),
    ("matplotlib", ("report", "run")),
    ("tokenizers", ("prepare", "text.txt", "--tokenizer", "tokenizer.json", "--out", "more")),
    ("deepspeed", (*TRAIN, "engine.name=deepspeed", "train.output=other")),
    ("deepspeed", ("launch", "recipe.yaml", "--with", "deepspeed", "--hostfile", "hosts")),
    ("wandb", (*TRAIN, "train.loggers=[wandb]", "train.output=other")),
    ("mlflow", (*TRAIN, "train.loggers=[mlflow]", "train.output=other")),
)


def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def import_faults() -> tuple[list[str], int, set[str]]:
    """Modules that do not import as they should, how many there are, and the packages that are not here."""
    import megaresnorm

    faults, count, absent = [], 0, set()
    for module in pkgutil.walk_packages(megaresnorm.__path__, "megaresnorm."):
        if module.name.endswith(".__main__"):  # runs the command
            continue
        count += 1
        needs = next((package for start, package in OPTIONAL.items() if module.name.startswith(start)), None)
        try:
            importlib.import_module(module.name)
        except ImportError as e:
            if needs is None or installed(needs) or needs not in str(e) or "\n" in str(e):
                faults.append(f"import {module.name}: {e!r}")
            else:
                absent.add(needs)
        except BaseException as e:  # noqa: BLE001 - whatever ends an import is a fault of it
            faults.append(f"import {module.name}: {e!r}")
    return faults, count, absent


def heavy_packages() -> list[str]:
    """A line if the package by itself, or its public classes, import an optional package."""
    code = (
        "import sys, megaresnorm; assert 'torch' not in sys.modules; megaresnorm.TOPOLOGIES; megaresnorm.Transformer; "
        f"print(*sorted(set({HEAVY!r}) & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        return [f"import megaresnorm: {last_line(done.stderr)}"]
    return [f"import megaresnorm imports {done.stdout.strip()}"] if done.stdout.strip() else []


def command_faults() -> tuple[list[str], int]:
    """Commands that fail, or do not say in one line what they need; and how many needed something."""
    faults, missing = [], 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "text.txt").write_text("A residual stream is a sum of branches.\n" * 200)
        (folder / "hosts").write_text("localhost slots=2\n")
        for empty in ("rows.parquet", "tokenizer.json"):
            (folder / empty).touch()
        (folder / "recipe.yaml").write_text(run(folder, "recipe", "quickstart").stdout)
        for words in WORKS:
            done = run(folder, *words)
            if done.returncode:
                faults.append(f"megaresnorm {' '.join(words)}: exit code {done.returncode}: {last_line(done.stderr)}")
        for package, words in NEEDS:
            if installed(package):
                continue
            missing += 1
            done = run(folder, *words)
            lines = done.stderr.splitlines()
            if done.returncode == 0 or len(lines) != 1 or package not in lines[0].lower():
                said = f"exit code {done.returncode}, {len(lines)} lines, the last: {last_line(done.stderr)}"
                faults.append(f"megaresnorm {' '.join(words)}: wanted one line on {package}; {said}")
    return faults, missing


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megaresnorm", *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def last_line(text: str) -> str:
    return (text.strip().splitlines() or ["nothing"])[-1][:300]


def main() -> int:
    faults, count, absent = import_faults()
    faults += heavy_packages()
    wrong, missing = command_faults()
    faults += wrong
    for line in faults:
        print(line)
    print(f"{count} modules, {len(absent)} optional packages absent, {len(WORKS)} + {missing} commands")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
