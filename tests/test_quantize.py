"""megaresnorm quantize: rounding to INT8 and FP8, its price on a tiny run, and the folder that it writes."""

import json
from pathlib import Path

import pytest
import torch

from megaresnorm.checkpoint.reader import Checkpoint
from megaresnorm.cli import main
from megaresnorm.convert.files import Weights
from megaresnorm.errors import CheckpointError
from megaresnorm.studies.quantize import (
    INPUTS,
    SCHEMES,
    Outliers,
    evaluate,
    linear_layers,
    load,
    look,
    matrices,
    measure,
    quantize,
    set_inputs,
)
from megaresnorm.studies.quantized_files import DESCRIPTION, SCALE, quantized_model
from megaresnorm.trainer import train


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    return tmp_path_factory.mktemp("trained")


@pytest.fixture
def run(tiny, kept) -> Path:
    """A tiny run with learned biases, trained once for all tests."""
    folder = kept / "run"
    recipe = tiny(
        train={"output": str(folder), "steps": 12, "eval_samples": 8},
        model={"topology": "keel", "bias": True},
        optim={"lr": 1e-2},
    )
    if not folder.exists():
        train(recipe)
    return folder


def test_int8_by_hand():
    x = torch.tensor([[127.0, 1.5, -0.5, 0.4], [0.254, -0.254, 0.001, 0.0]])
    codes, scale = quantize(x, SCHEMES["int8-channel"])
    assert codes.tolist() == [[127, 2, 0, 0], [127, -127, 0, 0]] and codes.dtype == torch.int8
    assert scale.tolist() == pytest.approx([1.0, 0.002]) and scale.dtype == torch.float32
    codes, scale = quantize(x, SCHEMES["int8-tensor"])
    assert codes.tolist() == [[127, 2, 0, 0], [0, 0, 0, 0]] and scale.tolist() == [1.0]


def test_fp8_by_hand():
    """E4M3 has 3 bits behind the point: 1.0625 is halfway between 1 and 1.125, and ties go to the even one."""
    x = torch.tensor([[448.0, 1.0625, -1.19, 2.0**-9], [224.0, 2.0**-11, -224.0, 0.0]])
    codes, scale = quantize(x, SCHEMES["fp8-channel"])
    assert scale.tolist() == [1.0, 0.5] and codes.dtype == torch.float8_e4m3fn
    assert codes.float().tolist() == [[448, 1, -1.25, 2**-9], [448, 0, -448, 0]]
    assert quantize(x, SCHEMES["fp8-tensor"]).values()[1].tolist() == [224, 0, -224, 0]


@pytest.mark.parametrize("size", [1e-30, 1e-3, 1.0, 1e30])
@pytest.mark.parametrize("name", SCHEMES)
def test_error_is_within_half_a_code_and_has_no_bias(name, size):
    x = size * torch.randn(64, 512) * torch.logspace(-2, 2, 64).unsqueeze(1)
    found = quantize(x, SCHEMES[name])
    error, scale = (found.values() - x).double(), found.scale.double().unsqueeze(1)
    if name.startswith("int8"):
        assert (error.abs() <= 0.5001 * scale).all()
        assert error.mean().abs() < 4 * error.std() / error.numel() ** 0.5 + 1e-3 * scale.mean()
    else:
        assert (error.abs() <= torch.maximum(x.double().abs() * 1.0001 * 2**-4, scale * 2**-10)).all()
    assert found.values().abs().max() == pytest.approx(x.abs().max().item(), rel=1e-6)


@pytest.mark.parametrize("name", SCHEMES)
def test_what_codes_stand_for_is_quantized_to_itself(name):
    x = torch.randn(16, 32)
    once = quantize(x, SCHEMES[name])
    again = quantize(once.values(), SCHEMES[name])
    assert torch.equal(once.values(), again.values())
    zeros = quantize(torch.zeros(3, 4), SCHEMES[name])
    assert torch.equal(zeros.values(), torch.zeros(3, 4)) and (zeros.scale == 1).all()


def test_outliers_of_parts_are_those_of_all():
    x = torch.randn(1000).double()
    x[7] = 100.0
    outliers = Outliers()
    for part in x.split(300):
        assert outliers.add(part) is part
    rms = x.square().mean().sqrt()
    assert outliers.peak == pytest.approx((100 / rms).item())
    assert outliers.kurtosis == pytest.approx(((x**4).mean() / rms**4).item() - 3)
    assert outliers.kurtosis > 100 and Outliers().peak == 0.0


def test_loss_as_trained_is_the_runs_own(run):
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    own = [record["valid_loss"] for record in records if "valid_loss" in record][-1]
    found = measure(look("run", run), ["fp8-tensor"], samples=8)
    assert found.trained == pytest.approx(own, rel=1e-6) and (found.topology, found.num_blocks) == ("keel", 3)


def test_every_matrix_of_the_blocks_is_quantized_and_nothing_else(run):
    trained = look("run", run)
    names = set(matrices(load(trained)))
    weights = Checkpoint(trained.folder)
    wide = {name for name in weights.names("weights") if len(weights.tensors["weights"][name]["shape"]) == 2}
    assert names == {name for name in wide if name.startswith("blocks.")} and len(names) == 12
    assert set(matrices(load(trained), everything=True)) == names | {"embedding.weight", "head.weight"}


def test_finer_scales_and_more_bits_cost_less(run):
    """The matrices' own errors: losses of a tiny run are too noisy to be ordered."""
    for weight in matrices(load(look("run", run))).values():
        errors = {name: (quantize(weight.detach(), one).values() - weight).norm() for name, one in SCHEMES.items()}
        assert errors["int8-channel"] <= errors["int8-tensor"] < errors["fp8-tensor"] * 1.5


def test_inputs_are_quantized_where_a_linear_reads_them(run):
    """A layer by itself: what its product becomes is the product of what codes stand for."""
    trained = look("run", run)
    model = load(trained)
    layers = linear_layers(model)
    assert len(layers) == 12 and "head" in linear_layers(model, everything=True)
    layer, x = layers["blocks.1.ffn.branch.down"], torch.randn(5, 24)
    with torch.no_grad():
        plain, rounded = layer(x), layer(quantize(x, SCHEMES["int8-channel"]).values())
        set_inputs(layers, SCHEMES["int8-channel"])
        assert torch.equal(layer(x), rounded) and not torch.equal(rounded, plain)
        set_inputs(layers, None)
        assert torch.equal(layer(x), plain)


def test_the_command_prints_a_table_and_writes_figures(run, tmp_path, capsys):
    file = tmp_path / "figures.json"
    assert main(["quantize", str(run), str(run), "--samples", "4", "--activations", "--json", str(file)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("keel") == 2 and "kurtosis of x" in printed
    written = json.loads(file.read_text())
    one, other = written["runs"]
    assert written["schema_version"] == 1 and one == other and one["samples"] == 4
    assert set(one["losses"]) == {name + part for name in SCHEMES for part in ("", INPUTS)}
    assert all(0 < abs(loss - one["trained"]) < 0.2 for loss in one["losses"].values())
    assert f"{one['losses']['fp8-tensor'] - one['trained']:+.5f}" in printed
    assert len(one["weight_peaks"]) == len(one["input_peaks"]) == 12 and max(one["input_peaks"].values()) > 2
    assert main(["quantize", str(run), "--samples", "4", "--formats", "int8-tensor", "--all", "--json", "-"]) == 0
    (alone,) = json.loads(capsys.readouterr().out)["runs"]
    assert alone["losses"]["int8-tensor"] != one["losses"]["int8-tensor"] and len(alone["weight_peaks"]) == 14


@pytest.mark.parametrize("name", SCHEMES)
def test_loss_of_the_written_folder_is_the_one_that_is_printed(name, run, tmp_path, capsys):
    out, everything = tmp_path / "out", ["--all"] if name == "fp8-channel" else []
    argv = ["quantize", str(run), "--formats", name, "--output", str(out), "--json", str(tmp_path / "f"), *everything]
    assert main(argv) == 0
    assert f"written    {out}" in capsys.readouterr().out
    (figures,) = json.loads((tmp_path / "f").read_text())["runs"]
    model, recipe = quantized_model(out)
    trained = look("run", run)
    assert evaluate(trained, model, figures["samples"]) == figures["losses"][name]
    assert recipe.model == trained.recipe.model
    description = json.loads((out / DESCRIPTION).read_text())
    assert description["loss"] == {"trained": figures["trained"], "quantized": figures["losses"][name]}
    types = {"I8": torch.int8, "F8_E4M3": torch.float8_e4m3fn, "F32": torch.float32}
    tensors = Weights(out, types).tensors
    for key in description["quantized"]:
        rows = tensors[key][1][0] if SCHEMES[name].by_row else 1
        assert tensors[key][2] == SCHEMES[name].dtype and tensors[key + SCALE][1:] == ((rows,), torch.float32)
    weights = Checkpoint(trained.folder)
    for key in description["kept"]:
        assert torch.equal(dict(model.named_parameters())[key], weights.read("weights", key))
    assert {*description["kept"], *description["quantized"]} == set(weights.names("weights"))


def broken(out: Path, **changes) -> None:
    path = out / DESCRIPTION
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(("changes", "wanted"), [
    ({"schema_version": 2}, "schema_version 1"), ({"scheme": "int4"}, "schema_version 1"),
    ({"recipe": 5}, "its recipe cannot be used"), ({"quantized": "all"}, "does not say which"),
    ({"quantized": ["a"]}, "'a' is not a matrix"), ({"quantized": []}, "is not in both"),
    ({"scheme": "fp8-tensor"}, "torch.int8"),
])  # fmt: skip
def test_a_folder_that_is_not_what_it_says_costs_one_line(changes, wanted, run, tmp_path):
    out = tmp_path / "out"
    assert main(["quantize", str(run), "--formats", "int8-tensor", "--samples", "1", "--output", str(out)]) == 0
    quantized_model(out)
    broken(out, **changes)
    with pytest.raises(CheckpointError, match=wanted) as error:
        quantized_model(out)
    assert "\n" not in str(error.value)


def test_what_cannot_be_quantized_costs_one_line(run, tiny, tmp_path, capsys):
    bare = tiny(data={"valid_fraction": 0.0}, train={"output": str(tmp_path / "bare"), "steps": 1})
    train(bare)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    both = [str(run), str(run)]
    for argv, code, wanted in (
        ([str(tmp_path)], 4, "has no checkpoint; wanted the output folder of a run"),
        ([str(tmp_path / "bare")], 2, "was trained without validation data"),
        ([str(run), "--formats", "int9-tensor"], 2, "did you mean int8-tensor?"),
        ([str(run), "--output", str(tmp_path / "x")], 2, "--output takes one run in one format, not 1 in 4"),
        ([*both, "--formats", "int8-tensor", "--output", str(tmp_path / "x")], 2, "not 2 in 1"),
        ([str(run), "--formats", "int8-tensor", "--output", str(tmp_path / "full")], 2, "exists already"),
        ([str(run), "--json", str(tmp_path)], 2, "cannot be written"),
    ):
        assert main(["quantize", *argv]) == code
        (line,) = capsys.readouterr().err.splitlines()
        assert wanted in line
    assert not (tmp_path / "x").exists()
