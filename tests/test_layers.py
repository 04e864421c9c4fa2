"""Import rules: layers only import downwards, optional packages stay in their one file, nothing can run code it reads."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "megaresnorm"
# From the bottom up; a module may import its own layer and those below.
LAYERS = [
    ["errors", "recipe", "config"],
    ["kernels"],
    ["parallel"],
    ["model"],
    ["precision", "recompute"],
    ["assemble"],
    ["checkpoint", "resilience", "telemetry", "optim", "schedule", "data", "generate"],
    ["engines", "resume"],
    ["trainer", "convert", "planner"],
    ["comparison"],
    ["cli"],
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
ONLY_IN = {  # package -> the files that may import it
    "deepspeed": ["engines/deepspeed.py"],
    "transformer_engine": ["kernels/te.py", "precision.py"],
    "apex": ["kernels/apex.py"],
    "yaml": ["config.py"],
    "sentencepiece": ["data/tokenizer.py"],
    "safetensors": ["checkpoint/reader.py"],
    "rich": ["telemetry/log.py", "cli/checkpoint.py", "cli/data.py", "cli/depth.py", "cli/doctor.py"],
    "datasets": ["data/corpus.py"],
    "pyarrow": ["data/corpus.py"],
    "tokenizers": ["data/tokenizer.py"],
    "matplotlib": ["comparison.py"],
    "triton": [
        "kernels/triton_add_norm.py",
        "kernels/triton_norm_quant.py",
        "kernels/triton_norms.py",
        "kernels/triton_sharded.py",
        "kernels/triton_wide.py",
    ],
    "ctypes": [
        f"kernels/cpu/{name}.py"
        for name in ("build", "add_norm", "attention", "activation", "cross_entropy", "sharded")
    ],
    "pickle": [],
    "subprocess": ["data/english.py", "kernels/cpu/build.py"],
}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.load", "pickle.load", "pickle.loads",
                   "yaml.unsafe_load", "yaml.full_load", "numpy.load", "np.load"}  # fmt: skip
FILES = sorted(ROOT.rglob("*.py"))


def imports(tree: ast.AST):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node.module or ""


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_downwards(path):
    relative = path.relative_to(ROOT)
    own = relative.parts[0].removesuffix(".py")
    for name in imports(ast.parse(path.read_text())):
        package, *rest = name.split(".")
        if package == "megaresnorm" and own != "__init__" and rest:
            assert RANK[rest[0]] <= RANK[own], f"{relative} imports {name} from above"
            if own in ("kernels", "parallel"):
                assert rest[0] not in ("recipe", "config"), f"{relative} takes plain values, never a recipe"
        if package == "torch" and rest[:1] == ["distributed"]:
            assert own not in ("model", "kernels"), f"{relative} must not know of ranks"
        if package in ONLY_IN:
            assert str(relative) in ONLY_IN[package], f"{relative} must not import {package}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_can_run_code_that_it_reads(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in FORBIDDEN_CALLS, f"{path}:{node.lineno}"
            assert not any(k.arg == "shell" for k in node.keywords), f"{path}:{node.lineno}"
            if ast.unparse(node.func) == "yaml.load":
                assert ast.unparse(node.args[1]) == "_Loader", f"{path}:{node.lineno}"


def test_the_yaml_loader_is_a_safe_one():
    import yaml

    from megaresnorm.config import _Loader

    assert issubclass(_Loader, yaml.SafeLoader)


def test_importing_the_package_or_its_help_loads_no_heavy_package():
    script = (
        "import sys, megaresnorm; assert 'torch' not in sys.modules; megaresnorm.TOPOLOGIES; megaresnorm.Transformer; "
        "heavy = {'deepspeed', 'transformer_engine', 'apex', 'datasets', 'transformers', 'tensorboard', 'triton', 'sentencepiece'};"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_every_public_name_can_be_loaded():
    import megaresnorm

    for name in megaresnorm.__all__:
        assert getattr(megaresnorm, name) is not None
