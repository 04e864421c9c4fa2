"""A run on several ranks: the same losses as one process, one log, and a checkpoint that any layout can go on from."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from cases import LAYOUTS as ALL_LAYOUTS
from cases import VARIANTS, batches, errors, gradients, make_recipe
from cases import build as build_engine
from launched import be_rank, environment

from megaresnorm.errors import ConfigError, UserError
from megaresnorm.kernels.cpu import build
from megaresnorm.model.topology import TOPOLOGIES
from megaresnorm.parallel.mesh import ParallelContext
from megaresnorm.recipe import Recipe
from megaresnorm.testing import run_ranks
from megaresnorm.trainer import train

LAYOUTS = [
    {"tp": 2, "tensor_layout": "columns"},
    {"pp": 2, "pipeline": "gpipe"},
    {"dp_shard": 2},
    {},
]


def with_settings(recipe: Recipe, **sections: dict) -> Recipe:
    from megaresnorm.recipe.load import build_recipe

    values = recipe.model_dump(exclude_none=True)
    for section, settings in sections.items():
        values[section] |= settings
    return build_recipe(values)


def run_on_ranks(rank: int, recipe: Recipe) -> tuple[float, float, str]:
    be_rank(rank, 2)
    summary = train(recipe)
    return summary.train_loss, summary.valid_loss, summary.weights_digest


@pytest.mark.parametrize("clip", [pytest.param("global", marks=pytest.mark.slow), "adagc"])
def test_a_run_goes_on_in_another_layout(tiny, tmp_path, clip):
    """Six steps in each of four layouts, the first three of them in the layout before: the losses are one process's."""
    settings = {
        "model": {"num_blocks": 4, "num_kv_heads": 2, "tied_embeddings": True, "dropout": 0.1, "ffn_dim": 24},
        "train": {"global_batch": 6, "micro_batch": 2, "eval_samples": 5},
        "checkpoint": {"every": 3},
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


@pytest.mark.parametrize(
    ("ranks", "parallel"),
    [(2, {}), (3, {}), (4, {"pp": 2}), (4, {"dp_shard": 2})],
    ids=["dp2", "dp3", "pp2 dp2", "hsdp"],
)
def test_ranks_with_fewer_samples_than_others_train_and_evaluate_as_one_process(tiny, tmp_path, ranks, parallel):
    """A row alone is a view of its tokens: what stands in without labels must not be written into them."""
    settings = {
        "model": {"num_blocks": 4},
        "train": {"global_batch": 4, "micro_batch": 1, "eval_samples": 5},
        "precision": {"compute": "fp64"},
    }
    one = train(tiny(**settings))
    settings["train"]["output"] = str(tmp_path / "ranks")
    for train_loss, valid_loss in run_ranks(ranks, losses_on_rank, ranks, tiny(**settings, parallel=parallel)):
        assert train_loss == pytest.approx(one.train_loss, rel=1e-11)
        assert valid_loss == pytest.approx(one.valid_loss, rel=1e-11)


def losses_on_rank(rank: int, num_ranks: int, recipe: Recipe) -> tuple[float, float]:
    be_rank(rank, num_ranks)
    summary = train(recipe)
    return summary.train_loss, summary.valid_loss


def torchrun(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    """launch/torchrun.sh called from ``folder``, with the environment that runs this test."""
    return subprocess.run(
        ["bash", str(Path(__file__).parents[2] / "launch" / "torchrun.sh"), *arguments],
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment(folder, 2),
    )


def test_torchrun_just_works(tiny, tmp_path, byte_data):
    """Two ranks from the command line, with a recipe and an output beside it: one log and exit code 0.

    A layout that cannot be is refused in one line.
    """
    from megaresnorm.recipe.load import dump_recipe

    (tmp_path / "recipe.yaml").write_text(dump_recipe(tiny(train={"output": "out"})))
    done = torchrun(tmp_path, "recipe.yaml", "parallel.tp=2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("step 6/6") == 1 and "ranks     2 = tp 2, stream in full" in done.stdout
    assert (tmp_path / "out" / "metrics.jsonl").is_file()
    refused = torchrun(tmp_path, "recipe.yaml", "parallel.tp=2", "parallel.pp=2")
    assert refused.returncode != 0
    assert refused.stderr.count("megaresnorm: error:") == 1 and "= 4, but 2 ranks were started" in refused.stderr


def test_torchrun_says_what_it_lacks(tmp_path):
    assert "which recipe?" in torchrun(tmp_path).stderr
    assert "RANKS_PER_NODE" in torchrun(tmp_path, "--help").stdout


def test_a_rank_sees_only_its_samples_and_all_have_as_many_microbatches():
    from dataclasses import replace

    import numpy as np

    from megaresnorm.data.loader import Loader, SampleRange
    from megaresnorm.parallel.mesh import Axis

    class Numbered:
        per_epoch = num_documents = 100

        def read(self, i: int, tokens: np.ndarray, documents: np.ndarray | None = None) -> None:
            tokens[:] = i

    seen = []
    for rank in range(4):
        context = replace(ParallelContext.single(), dp=Axis("dp", 4, rank), world=Axis("world", 4, rank))
        batches = Loader(Numbered(), 4, context, torch.device("cpu"), micro=2).load(SampleRange(10, 7)).microbatches
        assert [tuple(b.tokens.shape) for b in batches] == [(2, 4)]
        seen += [int(row[0]) for b in batches for row in b.labels if row[0] >= 0]
    assert sorted(seen) == list(range(10, 17))


def test_no_rank_goes_on_alone(tiny, tmp_path):
    """Where the first cannot write its folder, or one has other kernels, all end."""
    (tmp_path / "file").write_text("in the way")
    recipe = tiny(train={"output": str(tmp_path / "file")})
    first, second = run_ranks(2, how_it_ends, recipe, None)
    assert "cannot be written" in first and second == first
    for says in run_ranks(2, how_it_ends, tiny(train={"output": str(tmp_path / "out")}), 1):
        assert "ranks have chosen different kernels" in says


def how_it_ends(rank: int, recipe: Recipe, rank_with_others: int | None) -> str:
    """One rank's node may lack a compiler, say."""
    if rank == rank_with_others:
        build.unavailable = lambda: "no compiler here"
    try:
        return str(run_on_ranks(rank, recipe))
    except UserError as e:
        return str(e)


def with_train(recipe: Recipe, **changes: object) -> Recipe:
    return recipe.model_copy(update={"train": recipe.train.model_copy(update=changes)})


def compiled_losses(rank: int, layout: str) -> list[float]:
    recipe = make_recipe("deepnorm", "llama", ALL_LAYOUTS[layout][1], "fp32", 2)
    losses = []
    for compiled in ("none", "blocks"):
        _, engine = build_engine(with_train(recipe, compile=compiled))
        for step in range(3):
            stats = engine.step(batches(engine, recipe, seed=step), 1e-3)
            losses.append(stats.loss)
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] > 0 and not counters["graph_break"]
    return losses


@pytest.mark.parametrize(
    "layout",
    [
        "tp2 columns, gather",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("tp2 full", "tp2 tokens", "tp2 columns, merge", "pp2 1f1b", "dp2 ddp", "fsdp2")
        ),
    ],
)
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile needs a C++ compiler")
def test_compiled_blocks_of_several_ranks_are_whole_graphs(layout):
    losses = run_ranks(2, compiled_losses, layout)[0]
    assert losses[3:] == pytest.approx(losses[:3], rel=1e-6)


@pytest.mark.parametrize(
    ("topology", "variant"),
    [
        ("deepnorm", "llama"),
        *(
            pytest.param(t, v, marks=pytest.mark.slow)
            for t in TOPOLOGIES
            for v in VARIANTS
            if (t, v) != ("deepnorm", "llama")
        ),
    ],
)
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile needs a C++ compiler")
def test_blocks_compiled_with_the_reference_have_the_same_gradients(topology, variant):
    """Where all of a block is traced: its matrix products, dropout, and the additions and norms around them."""
    recipe = make_recipe(topology, variant, {}, "fp32", 2, kernels={"add_norm": "reference"})
    found = []
    for compiled in ("none", "blocks"):
        torch._dynamo.reset()
        assembled, engine = build_engine(with_train(recipe, compile=compiled))
        engine.gradients(batches(engine, recipe))
        found.append(gradients(assembled))
    off = errors(found[1], found[0])
    # 6e-6 is the bias of a norm of keys, whose gradient is zero in mathematics; all others are below 2e-6.
    assert max(off.values()) < 1e-5, max(off, key=off.__getitem__)
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile needs a C++ compiler")
def test_compiled_blocks_train_the_same(tiny, tmp_path):
    plain = train(tiny(train={"steps": 3}))
    compiled = train(tiny(train={"steps": 3, "compile": "blocks", "output": str(tmp_path / "compiled")}))
    assert compiled.train_loss == pytest.approx(plain.train_loss, rel=1e-5)
    with pytest.raises(ConfigError, match=r"train.compile=cuda_graphs needs a GPU.*try train.compile=blocks"):
        train(tiny(train={"compile": "cuda_graphs", "device": "cpu", "output": str(tmp_path / "graphs")}))
