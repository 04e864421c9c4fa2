"""Every command that README, CONTRIBUTING and docs show: understood in every run of the tests, run with -m slow."""

import os
import re
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from typer.main import get_command

from megaresnorm.cli import app
from megaresnorm.recipe.load import load_recipe

ROOT = Path(__file__).parents[1]
# In the order in which a newcomer would meet them: a later page uses what an earlier one has made.
NAMES = ("README", "configs/README", "launch/README", "CONTRIBUTING", "docs/quickstart", "docs/report",
         "docs/configuration", "docs/coming-from", "docs/conversion", "docs/data", "docs/checkpoints", "docs/clusters",
         "docs/depth", "docs/quantization", "docs/results/2026-11-29-quantization", "docs/kernels", "docs/numerics",
         "docs/parallel", "docs/speed", "docs/profiling", "docs/gpu", "docs/deepspeed",
         "docs/reliability")  # fmt: skip
PAGES = [ROOT / f"{name}.md" for name in NAMES]
NOT_RUN = {  # pattern -> why
    r"git clone ": "the test has cloned it",
    r"pip install ": "it would change the environment; tests/test_package.py installs the wheel",
    r"source \.venv/bin/activate": "every command is run behind it",
    r"pre-commit install": "a package of its own",
    r"NODES=4 |--hostfile|--node-rank": "four hosts; tests/launch starts simulated ones",
    r"bash launch/test\.sh .*-m (slow|gpu)|bash launch/test\.sh tests/checkpoint": "these are the tests",
    r"megaresnorm drill ": "twenty minutes; tests/resilience/test_drill.py",
    r"srun megaresnorm": "Slurm; tests/launch starts one",
    r"python -m pytest -m gpu": "they need a GPU",
    r"train\.loggers='\[tensorboard, wandb\]'": "a service of its own; tests/telemetry/test_loggers.py",
}
SMALL = "model.num_blocks=2 train.sample_tokens=4 train.global_batch=4"
SHORTER = [  # (pattern, what takes its place), all that fit, in turn
    (r"--vocab-size (16384|2048)", "--vocab-size 1024"),
    (r"--corpus english", "--corpus stdlib"),  # which would be fetched
    (r"train\.steps=\d+", "train.steps=4"),
    (r"--seq-len 4096", "--seq-len 32"),
    (r"\bTEXT\b", "my_text/"),
    (r"^(megaresnorm data \w+) runs/a runs/b", r"\1 runs/my-data runs/quickstart/data"),
    (r"^(megaresnorm data \w+) runs/a", r"\1 runs/my-data"),
    (r"my_recipe\.yaml", "configs/quickstart.yaml"),
    (r"^(megaresnorm checkpoint diff) runs/a runs/b",
     r"\1 runs/quickstart/deepnorm-50 runs/quickstart/keel-50 || test $? = 1"),
    (r"^(bash launch/quickstart\.sh.*)", rf"\1 {SMALL}"),
    (r"^(megaresnorm train (?!runs/)(?!.*--dry-run).*)", rf"\1 {SMALL}"),
    (r"^(megaresnorm train runs/.*)", r"\1 train.global_batch=1 train.sample_tokens=4"),
    (r"^(.*bash launch/torchrun\.sh.*|megaresnorm launch (?!.*--dry-run).*)", rf"OMP_NUM_THREADS=1 \1 {SMALL}"),
    (r"^((megaresnorm train (?!.*--dry-run)|bash launch/quickstart|.*launch/torchrun|OMP_NUM_THREADS=1 megaresnorm)"
     r"(?!.*train\.steps).*)",
     r"\1 train.steps=3"),
    (r"^(megaresnorm train configs/(pre-24|english).*)", r"\1 model.dim=64 model.seq_len=32 data.valid_fraction=0.1"),
    (r"data\.split='\[969, 30, 1\]'(.*) data\.valid_fraction=0\.1", r"data.split='[80, 15, 5]'\1"),
    (r"^(megaresnorm train configs/keel.*)", r"\1 model.dim=64"),
    (r"^(megaresnorm convert compare )(\S+) (\S+/hf)$",  # of the run as it is by then
     r"rm -r \3; megaresnorm convert to-hf \2 \3; \1\2 \3"),
    (r"^(megaresnorm generate .*)", r"\1 --tokens 4"),
    (r"^megaresnorm quantize runs/quantization/.*", "megaresnorm quantize runs/quantization/runs/*-2-seed0"),
    (r"^(megaresnorm depth --probe.*)", r"\1 --depths 2 --seeds 1"),
    (r"^(megaresnorm depth --train.*?)( train\.steps=4)?$", r"\1 --depths 2 --seeds 1 train.steps=3"),
    (r"--shapes 1024x1024", "--shapes 64x64"),
    (r"^(python tools/\S+).*", r"\1 --help"),
    (r"^bash launch/test\.sh$", "bash launch/test.sh tests/test_optim.py"),
    (r"^mkdocs serve", "mkdocs build --quiet --site-dir site-of-test"),
    (r"^(tensorboard .*)", r"timeout 10 \1 --port 0 || test $? = 124"),
]  # fmt: skip


def commands(page: Path) -> list[str]:
    """The commands in a page's blocks of shell, continued lines joined, comments left out; not batch scripts."""
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.S)
    lines = "\n".join(block for block in blocks if not block.startswith("#!")).replace("\\\n", " ").splitlines()
    cut = (re.sub(r"(^|\s+)#.*", "", line) for line in lines)
    return [" ".join(line.split()) for line in cut if line.strip()]


def short(command: str) -> str | None:
    """A form of a command that takes seconds; None where it is not run."""
    if any(re.search(pattern, command) for pattern in NOT_RUN):
        return None
    for pattern, shorter in SHORTER:
        command = re.sub(pattern, shorter, command)
    return command


ALL = [(page, command) for page in PAGES for command in commands(page)]


def test_the_pages_have_commands():
    assert len(ALL) > 60 and {page for page, _ in ALL} >= set(PAGES) - {ROOT / "docs/numerics.md"}
    assert set(PAGES) >= {page for page in ROOT.glob("docs/*.md") if commands(page)}
    assert all(any(re.search(pattern, command) for _, command in ALL) for pattern in NOT_RUN)


@pytest.mark.parametrize(("page", "command"), ALL, ids=[f"{page.stem}: {command[:60]}" for page, command in ALL])
def test_our_commands_are_understood(page, command):
    """Options and arguments exist, and overrides fit the recipe that is named."""
    words = shlex.split(command)
    launched = [word for word in words if word.endswith("launch/torchrun.sh")]
    if launched:
        words = ["megaresnorm", "train", *words[words.index(launched[0]) + 1 :]]
    if words[0] != "megaresnorm":
        return
    words, found, name = words[1:], get_command(app), "megaresnorm"
    words = words[: words.index(">")] if ">" in words else words
    while hasattr(found, "commands"):
        name, found = words[0], found.commands[words[0]]
        words = words[1:]
    context = found.make_context(name, words)
    recipe = context.params.get("recipe")
    if name in ("train", "launch") and recipe.startswith("configs/"):
        load_recipe(ROOT / recipe, context.params["overrides"] or [])


def make_inputs(folder: Path) -> None:
    """What the pages take for given: texts, two models of Transformers, a pair of Megatron's files."""
    import gzip
    import json

    import pyarrow
    import pyarrow.parquet
    import torch
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    from megaresnorm.data.prepare import PrepareJob, prepare

    texts = [page.read_text() for page in sorted(ROOT.glob("docs/*.md"))]
    (folder / "my_text").mkdir()
    for i, text in enumerate(texts):
        (folder / "my_text" / f"{i}.txt").write_text(text)
    with gzip.open(folder / "more.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), folder / "table.parquet")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<s>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
             "intermediate_size": 48, "vocab_size": len(fast), "max_position_embeddings": 64}  # fmt: skip
    torch.manual_seed(0)
    for name, kind, more in (
        ("Qwen3-0.6B", "qwen3", {"head_dim": 8, "tie_word_embeddings": True}),
        ("Llama-3.2-1B", "llama", {}),
    ):
        config = transformers.AutoConfig.for_model(kind, **shape, **more)
        target = folder / "models" / name
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(target)
        fast.save_pretrained(target)
    made = prepare(PrepareJob(out=folder / "runs" / "made", paths=(str(folder / "my_text"),), workers=1,
                              tokenizer=str(folder / "models" / "Llama-3.2-1B"))).folder  # fmt: skip
    (folder / "runs" / "gpt2").mkdir()
    for name in ("tokens.bin", "tokens.idx", "tokenizer.json"):
        (folder / "runs" / "gpt2" / name).write_bytes((made / name).read_bytes())


def make_environment(folder: Path) -> None:
    """A virtual environment with the packages of the one that runs the tests, into which no script installs."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "tests.pth").write_text(f"import site; site.addsitedir({sysconfig.get_paths()['purelib']!r})\n")
    for name, module in {"megaresnorm": "megaresnorm", "mkdocs": "mkdocs", "tensorboard": "tensorboard.main"}.items():
        (folder / "bin" / name).write_text(f'#!/bin/sh\nexec {folder}/bin/python -m {module} "$@"\n')
        (folder / "bin" / name).chmod(0o755)


@pytest.mark.slow
def test_every_command_runs_from_a_fresh_clone(tmp_path):
    """In its short form, one after the other, in the environment that the README activates."""
    clone = tmp_path / "megaresnorm"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    make_environment(clone / ".venv")
    make_inputs(clone)
    environment = {k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "PYTHONPATH", "VENV")}
    environment |= {"PYTHONPATH": str(clone), "MEGARESNORM_CACHE": str(tmp_path / "cache")}
    failed, done = [], set()
    for page, command in ALL:
        shorter = short(command)
        if shorter is None or shorter in done:
            continue
        done.add(shorter)
        if shorter.startswith("megaresnorm prepare") and "--out runs/my-data" in shorter:
            shorter += " --overwrite"  # two pages make another one there
        script = f"set -eo pipefail; source .venv/bin/activate; {shorter}"
        got = subprocess.run(["bash", "-c", script], cwd=clone, env=environment, capture_output=True, text=True)
        print(f"{got.returncode} {page.stem}: {shorter}")
        if got.returncode:
            failed.append(f"{page.stem}: {shorter}\n{(got.stdout + got.stderr)[-600:]}")
    for page in (ROOT / "README.md", ROOT / "docs" / "speed.md"):
        (program,) = re.findall(r"```python\n(.*?)```", page.read_text(), re.S)
        small = program.replace('["', '["model.num_blocks=2", "train.steps=3", "train.global_batch=4", "')
        command = [clone / ".venv" / "bin" / "python", "-c", small]
        got = subprocess.run(command, cwd=clone, env=environment, capture_output=True, text=True)
        print(f"{got.returncode} {page.stem}: {got.stdout.splitlines()[-1:]}")
        if got.returncode:
            failed.append(f"{page.stem}: {small}\n{got.stderr[-600:]}")
    assert not failed, "\n\n".join(failed)
    assert len(done) > 40


@pytest.mark.parametrize("script", sorted(path.name for path in (ROOT / "launch").glob("*.s*")))
def test_scripts_are_shell(script):
    got = subprocess.run(["bash", "-n", ROOT / "launch" / script], capture_output=True, text=True)
    assert got.returncode == 0, got.stderr
