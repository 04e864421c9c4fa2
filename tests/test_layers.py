"""Import rules: layers only import downwards, optional packages stay in one file, nothing can run code it reads."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "megaresnorm"
# From the bottom up; a module may import its own layer and those below.
LAYERS = [
    ["errors", "limits", "text", "files", "reading", "packages", "recipe", "recompute", "recompute_budget", "pinned"],
    ["kernels"],
    ["parallel"],
    ["model"],
    ["precision", "offload"],
    ["recompute_plan"],
    ["assemble", "layout"],
    [
        "activation_memory",
        "checkpoint",
        "resilience",
        "telemetry",
        "optim",
        "clipping",
        "schedule",
        "data",
        "evaluation",
        "generate",
        "memory",
        "recompute_auto",
    ],
    ["engines", "opening"],
    ["run", "convert", "planner", "machine", "profiling", "report"],
    ["guard", "trainer"],
    ["studies", "testing"],
    ["job", "launch"],
    ["cli", "__main__"],
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
ONLY_IN = {  # package -> the files that may import it
    "deepspeed": ["engines/deepspeed.py"],
    "transformer_engine": ["kernels/add_norm/te.py", "kernels/fp8/te.py"],  # its norms; its product of codes and scales
    "apex": ["kernels/add_norm/apex.py"],
    "liger_kernel": ["kernels/gpu/liger.py"],
    "quack": ["kernels/gpu/quack.py"],
    "yaml": ["recipe/load.py", "data/hub.py"],
    "sentencepiece": ["data/tokenizer.py"],
    "safetensors": ["checkpoint/reader.py", "convert/files.py", "convert/compare.py", "testing.py"],
    "transformers": [
        "cli/conversion.py",  # to say which version there is
        "convert/config_json.py",
        "convert/compare.py",
        "convert/modeling_megaresnorm.py",
        "convert/tokenizers.py",
    ],
    "rich": ["telemetry/log.py", "cli/data.py", "cli/depth.py", "cli/doctor.py", "cli/drill.py"],
    "typer": [
        f"cli/{name}.py"
        for name in (
            "__init__",
            "arguments",
            "checkpoint",
            "conversion",
            "convert",
            "data",
            "depth",
            "doctor",
            "drill",
            "generate",
            "launch",
            "profile",
            "quantize",
            "recipes",
            "report",
            "train",
        )
    ],  # training itself needs no command line
    "datasets": ["data/corpus.py"],
    "pyarrow": ["data/corpus.py"],
    "tokenizers": ["data/hf_tokenizer.py", "convert/tokenizers.py"],
    "matplotlib": ["studies/compare_topologies.py", "report/drawing.py"],
    "triton": [
        "kernels/add_norm/triton_common.py",
        "kernels/add_norm/triton_launch.py",
        "kernels/add_norm/triton_rows.py",
        "kernels/add_norm/triton_sharded.py",
        "kernels/add_norm/triton_wide.py",
        "kernels/add_norm/triton_wide_forward.py",
        "kernels/fp8/triton_formats.py",
        "kernels/fp8/triton_quantize.py",
        "kernels/gpu/activation.py",
        "kernels/gpu/cross_entropy.py",
        "kernels/gpu/rotary.py",
    ],
    "ctypes": [
        f"kernels/cpu/{name}.py"
        for name in ("build", "add_norm", "attention", "activation", "cross_entropy", "sharded")
    ]
    + ["resilience/faults.py"],  # a C call that keeps the interpreter's lock
    "pickle": [],
    "subprocess": [
        "data/english.py",
        "kernels/cpu/build.py",
        "launch/front.py",
        "launch/slurm_job.py",
        "launch/soak.py",
        "launch/ssh.py",
        "launch/submit.py",
        "machine.py",  # lets DeepSpeed make a step
        "parallel/addresses.py",  # asks Slurm
        "resilience/supervisor.py",
    ],
}
# Modules whose content can make a reader run code, and calls that do.
FORBIDDEN_MODULES = {
    "pickle",
    "_pickle",
    "cloudpickle",
    "dill",
    "joblib",
    "marshal",
    "shelve",
    "runpy",
    "code",
    "commands",
    "pty",
}
FORBIDDEN_CALLS = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.load", "torch.hub.load", "numpy.load",
    "torch.distributed.checkpoint.load", "yaml.load_all", "yaml.unsafe_load", "yaml.unsafe_load_all", "yaml.full_load",
    "yaml.full_load_all", "logging.config.dictConfig",
}  # fmt: skip
FORBIDDEN_METHODS = {  # of whatever module: they pickle what ranks tell each other
    "broadcast_object_list", "all_gather_object", "gather_object", "scatter_object_list", "send_object_list",
    "recv_object_list",
}  # fmt: skip
FORBIDDEN_OPTIONS = {"shell", "weights_only", "trust_remote_code", "allow_pickle"}
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
                assert rest[0] != "recipe", f"{relative} takes plain values, never a recipe"
        if package == "torch" and rest[:1] == ["distributed"]:
            assert own not in ("model", "kernels"), f"{relative} must not know of ranks"
        if package in ONLY_IN:
            assert str(relative) in ONLY_IN[package], f"{relative} must not import {package}"


def dangers(source: str):
    """(line, what) of everything in a file that could run code that it reads, under whatever name it was imported."""
    tree = ast.parse(source)
    known: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            known |= {
                a.asname or a.name.split(".")[0]: a.name if a.asname else a.name.split(".")[0] for a in node.names
            }
        elif isinstance(node, ast.ImportFrom):
            known |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            yield from ((node.lineno, name) for name in names if name.split(".")[0] in FORBIDDEN_MODULES)
        if isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Load):
            first, _, rest = ast.unparse(node).partition(".")
            full = ".".join(filter(None, (known.get(first, first), rest)))
            if full in FORBIDDEN_CALLS or full.split(".")[-1] in FORBIDDEN_METHODS:
                yield node.lineno, full
            if full == "yaml.load":
                yield node.lineno, full
        if isinstance(node, ast.Call):
            yield from ((node.lineno, k.arg) for k in node.keywords if k.arg in FORBIDDEN_OPTIONS)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_can_run_code_that_it_reads(path):
    found = set(dangers(path.read_text()))
    if path == ROOT / "recipe" / "load.py":  # with the loader of the next test
        found = {(line, what) for line, what in found if what != "yaml.load" or "_Loader)" not in line_of(path, line)}
    assert not found, path


def line_of(path: Path, line: int) -> str:
    return path.read_text().splitlines()[line - 1]


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import torch\ntorch.load(x)",
        "from torch import load as get\nget(x)",
        "import torch as t\nt.load(x)",
        "reader = eval\nreader(x)",
        "import os\nos.system(x)",
        "from os import system\nsystem(x)",
        "import yaml\nyaml.load(x, yaml.Loader)",
        "import yaml as y\ny.unsafe_load(x)",
        "import torch.distributed as dist\ndist.broadcast_object_list(x)",
        "import torch.distributed.checkpoint as dcp\ndcp.load(x)",
        "import numpy as np\nnp.load(x)",
        "run(command, shell=True)",
        "load(x, weights_only=False)",
        "AutoModel.from_pretrained(x, trust_remote_code=True)",
    ],
)
def test_the_search_for_dangers_finds_them(source):
    assert list(dangers(source))


def test_the_yaml_loader_is_a_safe_one():
    import yaml

    from megaresnorm.recipe.load import _Loader

    assert issubclass(_Loader, yaml.SafeLoader)


def test_importing_the_package_or_its_help_loads_no_heavy_package():
    script = (
        "import sys, megaresnorm; assert 'torch' not in sys.modules; megaresnorm.TOPOLOGIES; megaresnorm.Transformer; "
        "heavy = {'deepspeed', 'transformer_engine', 'apex', 'datasets', 'transformers', 'tensorboard', 'triton', "
        "'sentencepiece', 'liger_kernel', 'quack', 'matplotlib'};"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_model_that_is_not_sharded_needs_no_fsdp_and_no_pipelining():
    """They take a second to import."""
    script = (
        "import sys, torch, megaresnorm.run\n"
        "from megaresnorm.data.loader import Batch, StepBatch\n"
        "from megaresnorm.engines.native import NativeEngine\n"
        "from megaresnorm.recipe.load import build_recipe\n"
        "model = {'dim': 8, 'num_blocks': 1, 'num_heads': 1, 'seq_len': 4, 'vocab_size': 8}\n"
        "train = {'output': 'none', 'steps': 1}\n"
        "engine = NativeEngine(build_recipe({'model': model, 'data': {'path': 'none'}, 'train': train}))\n"
        "tokens = torch.zeros((2, 4), dtype=torch.int64)\n"
        "assert engine.step(StepBatch.of([Batch(tokens, tokens, torch.arange(2))]), 1e-3).applied\n"
        "heavy = {f'torch.distributed.{name}' for name in ('fsdp', 'tensor', 'pipelining')} | {'torch._dynamo'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_every_public_name_can_be_loaded():
    import megaresnorm

    for name in megaresnorm.__all__:
        assert getattr(megaresnorm, name) is not None


def test_who_a_process_is_is_read_from_the_environment_in_one_file():
    """Variables of launchers; what compilers, caches and child processes take is theirs (build.py, english.py, ...)."""
    names = r"RANK|LOCAL_RANK|WORLD_SIZE|LOCAL_WORLD_SIZE|MASTER_ADDR|MASTER_PORT|NODE_RANK|NODES|RANKS_PER_NODE|JOB_ID"
    names += r"|MAX_RESTARTS|TORCHELASTIC_\w+|PET_\w+|SLURM_\w+|OMPI_\w+|MEGARESNORM_(LAUNCHER|ELASTIC|MAX_RESTARTS)"
    reads = re.compile(rf"(environ|getenv|variables|found)(\.get)?[\[(]\s*[\"'](?:{names})[\"']")
    files = {path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py") if reads.search(path.read_text())}
    assert files == {"parallel/environment.py", "parallel/launchers.py"}
    touched = {path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py") if "environ" in path.read_text()}
    of_environ = {name for name in touched if "os.environ" in (ROOT / name).read_text()}
    assert of_environ == {
        "parallel/environment.py",
        "parallel/plan.py",  # how ranks are to be started
        "kernels/deterministic.py",  # sets what cuBLAS reads
        "engines/deepspeed.py",  # sets what DeepSpeed reads
        "engines/extensions.py",  # CXX; sets where torch compiles for as long as it does
        "resilience/supervisor.py",  # passes it on to torchrun
        "launch/request.py",  # what is passed on to other nodes
        "launch/front.py",  # passes it on to launchers
        "launch/deepspeed.py",  # what its launcher passes on by itself
        "cli/launch.py",  # sets what --env names
        "kernels/cpu/build.py",  # CC and the cache folder
        "data/english.py",  # the cache folder
        "data/tokenize.py",  # sets what a tokenizer's library reads
        "profiling/memory.py",  # sets what Kineto reads
        "reading.py",  # variables in paths
        "cli/conversion.py",  # sets what Transformers reads
        "cli/__init__.py",  # whether a shell asks for completions
    }
