"""A run on several ranks: the same losses as one process, one log, and a checkpoint that any layout can go on from."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ranks import run_ranks

from megaresnorm.errors import ConfigError
from megaresnorm.recipe import Recipe
from megaresnorm.trainer import train

LAYOUTS = [
    {"tp": 2, "tensor_layout": "columns"},
    {"pp": 2, "pipeline": "gpipe"},
    {"dp_shard": 2},
    {},
]


def with_settings(recipe: Recipe, **sections: dict) -> Recipe:
    from megaresnorm.config import build_recipe

    values = recipe.model_dump(exclude_none=True)
    for section, settings in sections.items():
        values[section] |= settings
    return build_recipe(values)


def run_on_ranks(rank: int, recipe: Recipe) -> tuple[float, float, str]:
    os.environ |= {
        "WORLD_SIZE": "2",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "-",
        "MASTER_PORT": "-",
    }
    summary = train(recipe)
    return summary.train_loss, summary.valid_loss, summary.weights_digest


@pytest.mark.parametrize("clip", ["global", "adagc"])
def test_a_run_goes_on_in_another_layout(tiny, tmp_path, clip):
    """Six steps in each of four layouts, the first three of them in the layout before: the losses are one process's."""
    settings = {
        "model": {"num_blocks": 4, "num_kv_heads": 2, "tied_embeddings": True, "dropout": 0.1, "ffn_dim": 24},
        "train": {"global_batch": 6, "micro_batch": 2, "eval_samples": 5, "checkpoint_every": 3},
        "optim": {"clip": clip} | ({"adagc_warmup": 2} if clip == "adagc" else {"clip_norm": 0.1}),
        "precision": {"compute": "fp64", "residual_dtype": "fp64"},
        "schedule": {"kind": "constant", "min_ratio": 0.1},
    }
    base = with_settings(tiny(), **settings)
    one = train(with_settings(base, train={"output": str(tmp_path / "one")}))
    for i, layout in enumerate(LAYOUTS):
        folder = str(tmp_path / f"two-{i}")
        before = LAYOUTS[i - 1]
        first = with_settings(base, train={"output": folder, "steps": 3}, parallel=before)
        run_ranks(2, run_on_ranks, first)
        both = run_ranks(2, run_on_ranks, with_settings(base, train={"output": folder}, parallel=layout))
        for train_loss, valid_loss, digest in both:
            assert train_loss == pytest.approx(one.train_loss, rel=1e-6), (before, layout)
            assert valid_loss == pytest.approx(one.valid_loss, rel=1e-6), (before, layout)
            assert digest == both[0][2]
        lines = Path(folder, "metrics.jsonl").read_text().splitlines()
        assert len(lines) == 6
    # And one process goes on from what two ranks have saved.
    again = train(with_settings(base, train={"output": str(tmp_path / "two-0")}))
    assert (
        again.weights_digest
        == run_ranks(2, run_on_ranks, with_settings(base, train={"output": str(tmp_path / "two-0")}))[0][2]
    )


def test_torchrun_just_works(tiny, tmp_path, byte_data):
    """Two ranks from the command line: one log, exit code 0, and one line for a layout that cannot be."""
    from megaresnorm.config import dump_recipe

    file = tmp_path / "recipe.yaml"
    file.write_text(dump_recipe(tiny(train={"output": str(tmp_path / "out")})))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", port,
        "-m", "megaresnorm.cli", "train", "recipe.yaml",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, "parallel.tp=2"], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("step 6/6") == 1 and "ranks     2 = tp 2, stream in full" in done.stdout
    refused = subprocess.run(
        [*command, "parallel.tp=2", "parallel.pp=2"], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert refused.returncode != 0
    assert refused.stderr.count("megaresnorm: error:") == 1 and "= 4, but 2 ranks were started" in refused.stderr


def test_a_rank_sees_only_its_samples_and_all_have_as_many_microbatches():
    from dataclasses import replace

    import numpy as np

    from megaresnorm.data.loader import microbatches
    from megaresnorm.data.samples import Sample
    from megaresnorm.parallel.context import Axis, ParallelContext

    class Numbered:
        per_epoch = num_documents = 100

        def __getitem__(self, i: int) -> Sample:
            return Sample(np.full(5, i), np.zeros(5, dtype=np.int64))

    seen = []
    for rank in range(4):
        context = replace(ParallelContext.single(), data=Axis("data", 4, rank), world=Axis("world", 4, rank))
        batches = list(microbatches(Numbered(), 10, 7, 2, context, torch.device("cpu")))
        assert [tuple(b.tokens.shape) for b in batches] == [(2, 4)]
        seen += [int(row[0]) for b in batches for row in b.labels if row[0] >= 0]
    assert sorted(seen) == list(range(10, 17))


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile needs a C++ compiler")
def test_compiled_blocks_train_the_same(tiny, tmp_path):
    plain = train(tiny(train={"steps": 3}))
    compiled = train(tiny(train={"steps": 3, "compile": "blocks", "output": str(tmp_path / "compiled")}))
    assert compiled.train_loss == pytest.approx(plain.train_loss, rel=1e-5)
    with pytest.raises(ConfigError, match=r"train.compile=cuda_graphs needs a GPU.*try train.compile=blocks"):
        train(tiny(train={"compile": "cuda_graphs", "device": "cpu", "output": str(tmp_path / "graphs")}))
