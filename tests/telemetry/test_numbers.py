"""What products of fewer bits lose of the numbers they read: counted, recorded, and said where it is much."""

import json
from math import isnan, nan
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from megaresnorm.data.loader import Batch, StepBatch
from megaresnorm.engines.native import NativeEngine
from megaresnorm.errors import DataError
from megaresnorm.kernels.fp8.formats import E4M3, E5M2, TENSOR, quantize
from megaresnorm.kernels.fp8.product import emulated
from megaresnorm.kernels.fp8.quantize import REFERENCE
from megaresnorm.parallel.layouts import FullLayout
from megaresnorm.parallel.linear import ColumnLinear
from megaresnorm.parallel.linear_kernel import LinearKernel, PlainLinear
from megaresnorm.parallel.mesh import Axis, ParallelContext
from megaresnorm.precision.counting import CLASSES, count
from megaresnorm.precision.delayed import ROOM, Delayed, DelayedScales
from megaresnorm.precision.fp8 import Fp8Linear
from megaresnorm.precision.half import HalfLinear
from megaresnorm.precision.watched import Watch
from megaresnorm.recipe import Fp8Recipe, PrecisionRecipe, Recipe
from megaresnorm.recipe.load import build_recipe
from megaresnorm.run import Run
from megaresnorm.telemetry.numbers import MOST, Numbers, advice, read_numbers
from megaresnorm.trainer import Trainer, train


def test_elements_are_counted_as_the_format_holds_them():
    x = torch.tensor([[0.0, -0.0, 1.0, -448.0], [449.0, 1e-7, -(2.0**-10), 2.0**-9]])
    codes, limit = quantize(x, TENSOR, amax=torch.tensor([[448.0]])).codes, torch.tensor([[448.0]])
    assert count(x, codes, limit).others.tolist() == [6, 1, 2]  # 2^-10 is a tie, and goes to zero
    assert count(x, codes).others.tolist() == [6, 0, 2], "scales of its own clamp nothing"
    assert count(x, codes).elements == 8 and count(x, codes).amax.item() == 449.0
    wide = quantize(x, TENSOR, E5M2, amax=torch.tensor([[448.0]])).codes
    assert count(x, wide, limit).others.tolist() == [6, 1, 0]
    for dtype in (torch.float16, torch.bfloat16):
        form = torch.finfo(dtype)
        y = torch.tensor([0.0, form.max, -torch.inf, form.tiny, form.tiny / 2, 1.0], dtype=dtype)
        assert count(y, y).others.tolist() == [5, 2, 1]
    y = torch.tensor([1e5, 1e-9, 1e-5, 1.0])  # of an FP32 weight: too large, zero, subnormal
    assert count(y, y.half()).others.tolist() == [4, 1, 2]
    spoilt = count(torch.tensor([nan, torch.inf, 1.0]), torch.tensor([nan, torch.inf, 1.0]).to(E4M3))
    assert isnan(spoilt.amax.item()) and spoilt.others.tolist() == [3, 1, 0]
    nothing = torch.zeros(0, 4)
    assert count(nothing, nothing.bfloat16()).others.tolist() == [0, 0, 0]


class Block(nn.Module):
    """One linear layer of 4 inputs and 2 outputs."""

    def __init__(self, kernel: LinearKernel) -> None:
        super().__init__()
        self.layer = ColumnLinear(4, 2, Axis("tp"), kernel=kernel)


def seen(kernel: LinearKernel, weight: list, x: Tensor, dy: Tensor, dtype: torch.dtype) -> dict:
    """Shares and amax of a layer's passes over [x, x] and their gradients [dy, dy]: class -> kind -> number."""
    block = Block(kernel)
    with torch.no_grad():
        block.layer.weight.copy_(torch.tensor(weight))
    if isinstance(kernel, Fp8Linear):
        kernel.weight = quantize(block.layer.weight, kernel.forms.weight)
    watch = Watch([(1, block)], 2, FullLayout(Axis("tp")), dtype, torch.device("cpu"), {})
    with watch.watching() as tally:
        ys = [block.layer(x.clone().requires_grad_()) for _ in range(2)]
        for y in ys:
            y.backward(dy)
    assert block.layer.kernel is kernel
    block.layer(x.clone().requires_grad_()).backward(dy)  # not seen any more
    found = tally.over_ranks(ParallelContext.single())
    assert all(of[0] in (0.0, None) for kind in found for of in kind.values()), "the other block"
    return {of: {kind: numbers[of][1] for kind, numbers in found._asdict().items()} for of in CLASSES}


def test_shares_of_each_class_are_those_of_hand_made_tensors():
    """Delayed scaling, with room for inputs up to 7 and gradients up to 28; then codes have the scale 64 or 2^11."""
    scales = DelayedScales(1, 1, torch.device("cpu"))
    scales.largest.copy_(torch.tensor([[7.0, 28.0]]) / torch.tensor(ROOM))
    scales.known = [[True, True]]
    kernel = Fp8Linear(Fp8Recipe(recipe="tensorwise", scaling="delayed"), emulated, REFERENCE, HalfLinear())
    kernel.delayed = Delayed(scales, 0)
    weight = [[0.0, 1.0, 2.0**-20, 448.0], [-1.0, 0.0, 1.0, 2.0**-20]]
    x = torch.tensor([[8.0, 7.0, -9.0, 0.0], [2.0**-17, 1.0, 1.0, 1.0]]).bfloat16()
    dy = torch.tensor([[29.0, 0.0], [2.0**-30, 1.0]]).bfloat16()
    found = seen(kernel, weight, x, dy, torch.bfloat16)
    assert found["input"] == {"amax": 9.0, "saturated": 2 / 8, "underflown": 1 / 7}
    assert found["weight"] == {"amax": 448.0, "saturated": 0.0, "underflown": 2 / 6}
    assert found["gradient"] == {"amax": 29.0, "saturated": 1 / 4, "underflown": 1 / 3}


@pytest.mark.parametrize(("kernel", "dtype"), [(PlainLinear, torch.float16), (HalfLinear, torch.bfloat16)])
def test_shares_of_16_bit_types_follow_the_type(kernel, dtype):
    form = torch.finfo(dtype)
    weight = [[0.0, 1.0, form.tiny / 2, form.max], [-1.0, 0.0, 1.0, -form.max]]
    x = torch.tensor([[1.0, 2.0, -1.0, 0.0], [form.tiny / 4, 0.5, 0.0, 1.0]]).to(dtype)
    dy = torch.tensor([[-1.0, 0.0], [torch.inf, form.tiny / 2]]).to(dtype)
    found = seen(kernel(), weight, x, dy, dtype)
    assert found["input"] == {"amax": 2.0, "saturated": 0.0, "underflown": 1 / 6}
    assert found["weight"] == {"amax": form.max, "saturated": 2 / 8, "underflown": 1 / 6}
    assert found["gradient"] == {"amax": torch.inf, "saturated": 1 / 4, "underflown": 1 / 3}


@pytest.mark.parametrize("recipe", ["rowwise", "block", "mxfp8"])
def test_scales_of_rows_and_blocks_clamp_nothing_and_lose_what_is_small_beside_its_own(recipe):
    """2^-11 is lost beside 448, as is 1 beside 2^27, and neither is in a row of its own."""
    x = torch.tensor([[448.0, 2.0**-11, 1.0, 0.0], [2.0**-11] * 4]).bfloat16()
    dy = torch.tensor([[2.0**27, 1.0], [1.0, 1.0]]).bfloat16()
    found = seen(
        Fp8Linear(Fp8Recipe(recipe=recipe), emulated, REFERENCE, HalfLinear()), [[1.0] * 4] * 2, x, dy, torch.bfloat16
    )
    assert found["input"] == {"amax": 448.0, "saturated": 0.0, "underflown": 1 / 7}
    assert found["gradient"] == {"amax": 2.0**27, "saturated": 0.0, "underflown": 1 / 4}


SEQ, VOCAB = 8, 32


def recipe_of(fp8: dict | None = None, num_blocks: int = 2, **sections) -> Recipe:
    precision = {"compute": "bf16"} if fp8 is None else {"compute": "fp8", "fp8": fp8}
    model = {"dim": 32, "num_heads": 2, "ffn_dim": 48, "seq_len": SEQ, "vocab_size": VOCAB, "topology": "pre"}
    values = {"model": model | {"num_blocks": num_blocks}, "data": {"path": "none"}, "precision": precision}
    values |= {"train": {"output": "none", "steps": 9}, "telemetry": {"every": 1}}
    return build_recipe(values | sections)


def batch() -> StepBatch:
    rows = torch.randint(VOCAB, (4, SEQ + 1))
    return StepBatch.of([Batch(rows[i, :-1], rows[i, 1:], i) for i in torch.arange(4).split(2)])


def test_delayed_scaling_that_saturates_is_said_once_and_what_to_do(caplog):
    """Norms whose weights grow eightfold between two steps."""
    fp8 = {"recipe": "tensorwise", "scaling": "delayed", "bf16_first_blocks": 1, "bf16_last_blocks": 0}
    recipe = recipe_of(fp8)
    engine = NativeEngine(recipe)
    numbers = Numbers(recipe, engine.assembled, engine.tensors["weights"])
    for step in (1, 2, 3):
        with numbers.seen_in(step):
            assert engine.step(batch(), 1e-3).applied
        if step == 1:
            assert numbers.worst["saturated"] == 0.0 and not caplog.records, "no history yet"
            with torch.no_grad():
                for name, p in engine.assembled.parameters().items():
                    if name.endswith("norm_in.weight"):
                        p.mul_(8)
        if step == 2:
            inputs = numbers.record["blocks"]["input"]["saturated"]
            assert inputs[0] == 0.0 and inputs[1] > MOST["saturated"], "block 0 is in BF16"
            assert numbers.worst["saturated"] >= inputs[1] * (1 - 1e-6)
            (said,) = [r.getMessage() for r in caplog.records if "inputs of linear layers" in r.getMessage()]
            assert f"step 2: {100 * inputs[1]:.3g} % of the inputs" in said and "of block 1 saturate in E4M3" in said
            assert "precision.fp8.recipe=rowwise" in said and "\n" not in said
    assert sum("inputs of linear layers of block 1 saturate" in r.getMessage() for r in caplog.records) == 1
    assert numbers.record["format"]["input"] == ["bf16", "e4m3"]


def test_gradients_in_e4m3_with_one_scale_underflow_where_tokens_differ_much(caplog):
    """Half of the tokens have a stream 2^22 times larger, and so gradients as much smaller."""
    found, said = {}, {}
    for name, fp8 in {
        "one scale": {"recipe": "tensorwise", "backward": "e4m3"},
        "wider": {"recipe": "tensorwise", "backward": "e5m2"},
        "rows": {"recipe": "rowwise", "backward": "e4m3"},
    }.items():
        torch.manual_seed(0)
        recipe = recipe_of(fp8 | {"bf16_first_blocks": 0, "bf16_last_blocks": 0}, num_blocks=1)
        engine = NativeEngine(recipe)
        with torch.no_grad():
            engine.assembled.parameters()["embedding.weight"][: VOCAB // 2].mul_(2.0**22)
        numbers = Numbers(recipe, engine.assembled, engine.tensors["weights"])
        caplog.clear()
        with numbers.seen_in(1):
            engine.step(batch(), 1e-3)
        (found[name],) = numbers.record["blocks"]["gradient"]["underflown"]
        said[name] = [r.getMessage() for r in caplog.records if "outputs of block" in r.getMessage()]
    assert found["one scale"] > 2 * MOST["underflown"] and max(found["wider"], found["rows"]) < MOST["underflown"]
    assert "underflow in E4M3" in said["one scale"][0] and "precision.fp8.backward=e5m2" in said["one scale"][0]
    assert not said["wider"] and not said["rows"]


def test_advice_names_settings_for_every_format_class_and_kind():
    cases = [(PrecisionRecipe(compute="bf16"), "bf16")]
    cases += [(PrecisionRecipe(compute="fp16", loss_scale=scale), "fp16") for scale in (None, "dynamic", 1024.0)]
    for recipe in ("rowwise", "tensorwise", "mxfp8"):
        precision = PrecisionRecipe(compute="fp8", fp8=Fp8Recipe(recipe=recipe))
        cases += [(precision, form) for form in ("bf16", "e4m3", "e5m2")]
    for precision, form in cases:
        for kind in MOST:
            for of in CLASSES:
                said = advice(precision, form, kind, of)
                assert any(word in said for word in ("=", "bf16_first_blocks", "optim.lr", "model.init"))
                assert "\n" not in said and len(said) < 130


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "numbers.jsonl").read_text().splitlines()]


def test_a_run_records_its_numbers_and_goes_on_as_one_that_never_stopped(tiny, tmp_path):
    """The record of step 6 is of a start that was killed before its checkpoint: it is dropped, and made again."""
    fp8 = {"recipe": "tensorwise", "scaling": "delayed", "history": 2}
    settings = {"precision": {"compute": "fp8", "fp8": fp8}, "telemetry": {"every": 3}, "checkpoint": {"every": 4}}
    settings |= {"model": {"ffn_dim": 32}}
    train(tiny(**settings))
    run = tmp_path / "run"
    whole, metrics = lines(run), [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in whole] == [3, 6] and read_numbers(run) == whole
    for record in whole:
        assert list(record) == ["schema_version", "step", "format", "blocks"] and record["schema_version"] == 1
        inner = {"input": "e4m3", "weight": "e4m3", "gradient": "e5m2"}
        assert record["format"] == {name: ["bf16", form, "bf16"] for name, form in inner.items()}
        for name in CLASSES:
            of = record["blocks"][name]
            assert list(of) == ["amax", "saturated", "underflown"] and all(len(each) == 3 for each in of.values())
            assert all(amax > 0 for amax in of["amax"])
        shares = [share for of in record["blocks"].values() for share in (*of["saturated"], *of["underflown"])]
        assert all(0 <= share <= 1 for share in shares)
        row = metrics[record["step"] - 1]
        assert max(row["saturated"], row["underflown"]) == pytest.approx(max(shares), rel=1e-5)
    assert [row["step"] for row in metrics if "saturated" in row] == [3, 6]

    (run / "checkpoints" / "step-00000006").rename(tmp_path / "away")
    train(tiny(**settings))
    assert lines(run) == whole

    (tmp_path / "other").mkdir()
    train(tiny(**settings | {"telemetry": {}, "train": {"output": str(tmp_path / "other")}}))
    assert not (tmp_path / "other" / "numbers.jsonl").exists()
    ends = [next((folder / "checkpoints" / "step-00000006").glob("weights-*")) for folder in (run, tmp_path / "other")]
    assert ends[0].read_bytes() == ends[1].read_bytes(), "watching changes no bit"


def test_a_file_that_cannot_be_read_is_said_in_a_line(tmp_path, caplog):
    with pytest.raises(DataError, match=r"there is none; set telemetry\.every") as error:
        read_numbers(tmp_path)
    assert "\n" not in str(error.value)
    path = tmp_path / "numbers.jsonl"
    path.write_text('{"schema_version": 1, "step": 2}\n{"schema_version": 1, "st')
    assert read_numbers(str(tmp_path)) == [{"schema_version": 1, "step": 2}]
    assert "1 of its lines cannot be read" in caplog.text
    path.write_text('{"schema_version": 2, "step": 2}\n')
    with pytest.raises(DataError, match="schema_version=2 is not 1"):
        read_numbers(tmp_path)


def test_an_error_in_a_watched_step_leaves_the_layers_as_they_were(tiny):
    recipe = tiny(precision={"compute": "bf16"}, telemetry={"every": 1})
    with Run(recipe) as run:
        trainer = Trainer(run)
        kernels = [m.kernel for m in run.engine.model.modules() if hasattr(m, "kernel")]
        with pytest.raises(ArithmeticError), trainer.numbers.seen_in(1):
            raise ArithmeticError
        assert [m.kernel for m in run.engine.model.modules() if hasattr(m, "kernel")] == kernels
        assert trainer.numbers.record is None and trainer.numbers.worst == {}
