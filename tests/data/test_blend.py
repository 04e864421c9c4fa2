"""Blends draw samples exactly by weight, in one order for any number of ranks; masked documents are kept apart."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from megaresnorm.assemble import build_model
from megaresnorm.cli import main
from megaresnorm.data.loader import Loader, SampleRange
from megaresnorm.data.prepare import PrepareJob, prepare
from megaresnorm.data.samples import BlendedSamples, PackedSamples
from megaresnorm.data.sources import find_sources
from megaresnorm.data.training_data import HELD_OUT, open_data, open_samples, resolve_vocab
from megaresnorm.errors import ConfigError, DataError
from megaresnorm.kernels.cpu import build
from megaresnorm.model.topology import TOPOLOGIES
from megaresnorm.parallel.mesh import Axis, ParallelContext
from megaresnorm.recipe import ModelRecipe, PrecisionRecipe
from megaresnorm.run import Run
from megaresnorm.trainer import train

CPU = torch.device("cpu")
WEIGHTS = [0.62, 0.3, 0.08]


def make_set(folder, name, documents, length):
    (folder / f"{name}.jsonl").write_text(
        "".join(f'{{"text": "{name} {i} {"abcdefgh"[i % 8] * (length - 10)}"}}\n' for i in range(documents))
    )
    return str(prepare(PrepareJob(out=folder / name, paths=(str(folder / f"{name}.jsonl"),))).folder)


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    folder = tmp_path_factory.mktemp("blend")
    return [make_set(folder, name, n, length) for name, n, length in (("a", 300, 60), ("b", 30, 150), ("c", 1000, 25))]


def blend_of(three):
    return [{"path": p, "weight": w} for p, w in zip(three, WEIGHTS, strict=True)]


@pytest.fixture
def blended(three, tiny):
    def make(**sections):
        data = {"blend": blend_of(three), "path": None, **sections.pop("data", {})}
        return tiny(data=data, **sections)

    return make


def samples_of(recipe):
    data = open_data(recipe.data)
    samples, valid = open_samples(data, resolve_vocab(recipe, data))
    return samples, valid[HELD_OUT]


def test_shares_of_a_million_samples_are_the_weights(blended):
    """Within 0.1 % of every weight; after whole windows exact to a sample or two; every source's samples in order."""
    samples, valid = samples_of(blended())
    assert isinstance(samples, BlendedSamples)
    places = np.array([samples.place(i) for i in range(1_000_000)])
    for source, weight in enumerate(WEIGHTS):
        share = (places[:, 0] == source).mean()
        assert abs(share - weight) < 1e-3 * weight, (source, share)
        own = places[places[:, 0] == source, 1]
        assert np.array_equal(own, np.arange(len(own)))
    for n in (5_120, 51_200, 512_000):
        counts = np.bincount(places[:n, 0])
        assert np.abs(counts - n * np.array(WEIGHTS)).max() <= 2
    for n in (0, 1, 1000, 1024, 77_777):
        assert samples.counts(n) == np.bincount(places[:n, 0], minlength=3).tolist()
    even = np.array(
        [valid.place(i)[0] for i in range(3000)]
    )  # validation is not shuffled: every stretch has its shares
    deviation = [np.abs(np.bincount(even[:n], minlength=3) - n * np.array(WEIGHTS)).max() for n in range(1, 3000)]
    assert max(deviation) <= 2 and not np.array_equal(even, places[:3000, 0])


@pytest.mark.parametrize("count", [2, 3, 5, 8])
def test_any_number_of_sources_with_any_weights(three, tiny, count):
    samples, _ = samples_of(tiny(data={"blend": [{"path": three[0], "weight": 1.0}], "path": None}))
    weights = np.random.default_rng(count).dirichlet(np.full(count, 0.5)) + 1e-4
    blend = BlendedSamples([samples.sources[0]] * count, weights.tolist(), seed=1, shuffle=True)
    counts = np.bincount([blend.place(i)[0] for i in range(20 * 1024)], minlength=count)
    assert np.abs(counts / (20 * 1024) - weights / weights.sum()).max() < 3 / (20 * 1024)


def test_order_is_the_same_on_one_and_four_ranks(blended):
    samples, _ = samples_of(blended())

    def read(size, rank):
        data = Axis("dp", size, rank)
        context = replace(ParallelContext.single(), dp=data, world=data)
        return Loader(samples, 16, context, CPU, micro=4).load(SampleRange(64, 64)).microbatches

    one = {int(i): row for b in read(1, 0) for i, row in zip(b.samples, b.tokens, strict=True)}
    four = {int(i): row for rank in range(4) for b in read(4, rank) for i, row in zip(b.samples, b.tokens, strict=True)}
    assert one.keys() == four.keys() == set(range(64, 128)) and all(torch.equal(one[i], four[i]) for i in one)


def test_order_is_the_same_after_a_resume(blended, tmp_path):
    constant = {"kind": "constant"}
    whole = train(blended(train={"steps": 8, "output": str(tmp_path / "whole")}, schedule=constant))
    train(blended(train={"steps": 3, "output": str(tmp_path / "parts")}, schedule=constant))
    parts = train(blended(train={"steps": 8, "output": str(tmp_path / "parts")}, schedule=constant))
    assert parts.weights_digest == whole.weights_digest and parts.valid_loss == whole.valid_loss


def test_a_blend_of_one_trains_on_that_source_alone(blended, three, tiny):
    blend = samples_of(tiny(data={"blend": [{"path": three[1], "weight": 3.0}], "path": None}))[0]
    alone = samples_of(tiny(data={"path": three[1]}))[0]
    assert all(np.array_equal(blend[i].tokens, alone[i].tokens) for i in range(0, 2048, 97))


def test_entropy_of_a_blend_is_that_of_the_mixture(blended):
    samples, _ = samples_of(blended())
    want = sum(w * np.pad(s.token_shares(), (0, 257))[:257] for w, s in zip(WEIGHTS, samples.sources, strict=True))
    np.testing.assert_allclose(np.pad(samples.token_shares(), (0, 257))[:257], want, atol=1e-12)


def test_changed_weights_are_refused_when_resuming(blended, three, tmp_path, tiny):
    train(blended(train={"steps": 2}))
    other = [{"path": p, "weight": 1.0} for p in three]
    with pytest.raises(Exception, match="has changed since"):
        Run(blended(train={"steps": 3}, data={"blend": other}))


def test_bad_blends_cost_one_line(three, tiny, tmp_path, capsys):
    with pytest.raises(ConfigError, match=r"give either data\.path or data\.blend"):
        tiny(data={"blend": blend_of(three)})
    with pytest.raises(ConfigError, match=r"give either data\.path or data\.blend"):
        tiny(data={"path": None})
    with pytest.raises(ConfigError, match="weight"):
        tiny(data={"path": None, "blend": [{"path": three[0], "weight": 0.0}]})
    (tmp_path / "t.txt").write_text("some words and other words " * 200)
    prepare(
        PrepareJob(out=tmp_path / "sp", paths=(str(tmp_path / "t.txt"),), tokenizer="sentencepiece", vocab_size=300)
    )
    mixed = [{"path": three[0], "weight": 1.0}, {"path": str(tmp_path / "sp"), "weight": 1.0}]
    with pytest.raises(DataError, match="its tokenizer is not that of"):
        open_data(tiny(data={"path": None, "blend": mixed}).data)


def test_data_show_and_verify(three, tmp_path, capsys, blended):
    assert main(["data", "show", *three, "--json", str(tmp_path / "figures.json")]) == 0
    shown = capsys.readouterr().out
    assert "300" in shown and "1,000" in shown and "bytes" in shown
    from megaresnorm.recipe.load import dump_recipe

    (tmp_path / "blend.yaml").write_text(dump_recipe(blended(train={"steps": 100, "global_batch": 8})))
    assert main(["data", "show", str(tmp_path / "blend.yaml"), "--json", str(tmp_path / "draws.json")]) == 0
    assert "62.0000%" in capsys.readouterr().out
    draws = json.loads((tmp_path / "draws.json").read_text())["draws"]
    assert sum(d["drawn"] for d in draws) == 800 and all(d["epochs"] == d["drawn"] / d["sequences"] for d in draws)
    assert [d["share"] for d in draws] == pytest.approx(WEIGHTS) and abs(draws[0]["drawn"] - 496) < 40
    assert (
        main(["data", "verify", *three]) == 0 and capsys.readouterr().out.count("every checksum and token right") == 3
    )


def test_verify_finds_a_flipped_byte_anywhere(three, tmp_path, capsys):
    import shutil

    shutil.copytree(three[0], tmp_path / "copy")
    path = tmp_path / "copy" / "tokens.bin"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert main(["data", "verify", str(tmp_path / "copy")]) == 3
    assert "damaged between byte" in capsys.readouterr().err


@pytest.mark.parametrize("positions", ["rope", "learned"])
@pytest.mark.parametrize("attention", ["sdpa", "blocked"])
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_a_masked_document_is_computed_as_if_it_were_alone(topology, positions, attention):
    from megaresnorm.recipe import KernelRecipe

    recipe = ModelRecipe(
        dim=16, num_blocks=2, num_heads=4, num_kv_heads=2, seq_len=24, vocab_size=64, topology=topology, qk_norm="head",
        positions=positions,
    )  # fmt: skip
    model = build_model(recipe, PrecisionRecipe(compute="fp64"), KernelRecipe(attention=attention)).model
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05)
    tokens = torch.randint(64, (2, 24), generator=torch.Generator().manual_seed(0))
    documents = torch.tensor([[0] * 7 + [1] * 12 + [2] * 5, [0] * 24])
    packed = model(tokens, documents_BS=documents).view(2, 24, -1)
    weights = torch.randn(2, 24, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (packed * weights).sum().backward()
    got = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    for row, start, stop in ((0, 0, 7), (0, 7, 19), (0, 19, 24), (1, 0, 24)):
        alone = model(tokens[row : row + 1, start:stop])
        torch.testing.assert_close(packed[row, start:stop], alone, rtol=0, atol=1e-11)
        (alone * weights[row, start:stop]).sum().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(got[name], p.grad, rtol=0, atol=1e-10 * max(1.0, p.grad.abs().max().item()))
    assert not torch.allclose(model(tokens).view(2, 24, -1)[0, 7:], packed[0, 7:])


@pytest.mark.skipif(build.unavailable() is not None, reason="no C compiler")
def test_documents_make_no_mask_where_a_kernel_knows_them():
    """No tensor whose last two dims are S x S is made, forward or backward; torch's kernel on CPUs needs one."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    from megaresnorm.recipe import KernelRecipe

    seq, made = 101, []

    class Shapes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            made.extend(tuple(t.shape) for t in tree_leaves(out) if isinstance(t, torch.Tensor))
            return out

    recipe = ModelRecipe(dim=16, num_blocks=2, num_heads=2, seq_len=seq, vocab_size=64)
    documents = torch.arange(seq).view(1, seq) // 17
    for backend, dense in (("cpu", False), ("sdpa", True)):
        model = build_model(recipe, kernels=KernelRecipe(attention=backend)).model
        made.clear()
        with Shapes():
            model(torch.zeros((1, seq), dtype=torch.long), documents_BS=documents).sum().backward()
        assert made and any(shape[-2:] == (seq, seq) for shape in made) == dense, backend


def test_masking_takes_no_loss_across_a_boundary_and_trains(blended, three):
    (source,) = find_sources(None, [three[0] + ".jsonl"])
    recipe = blended(data={"mask_documents": True}, train={"steps": 3})
    samples, _ = samples_of(recipe)
    loader = Loader(samples, 16, ParallelContext.single(), CPU, micro=8, mask_documents=True)
    (batch,) = loader.load(SampleRange(0, 8)).microbatches
    ends = batch.tokens == 256
    assert (
        ends.any()
        and torch.equal(batch.labels == -1, ends)
        and torch.equal(batch.documents.diff(dim=1) == 1, ends[:, :-1])
    )
    assert source.num_bytes and train(recipe).steps == 3


def test_packed_samples_number_their_documents(three, tiny):
    samples, _ = samples_of(tiny(data={"path": three[2]}))
    assert isinstance(samples, PackedSamples)
    for i in range(50):
        tokens, documents = samples[i]
        assert documents[0] == 0 and np.array_equal(np.diff(documents), (tokens[:-1] == 256).astype(int))
