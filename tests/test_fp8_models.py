"""FP8 linear layers within models of every topology, against FP64."""

import pytest
import torch
from torch import Tensor

from megaresnorm.assemble import build_model
from megaresnorm.kernels.cross_entropy import differentiate
from megaresnorm.kernels.fp8.formats import E4M3, E5M2, MX, ROW, TENSOR, Fp8, Rows, dequantize
from megaresnorm.model.topology import TOPOLOGIES, beside_others
from megaresnorm.precision.copies import copy_weights
from megaresnorm.precision.fp8 import Fp8Linear, OutputGradient, fp8_layers
from megaresnorm.recipe import Fp8Recipe, ModelRecipe, PrecisionRecipe

RECIPES: dict[str, dict] = {
    "rowwise": {"recipe": "rowwise"},
    "block": {"recipe": "block"},
    "mxfp8": {"recipe": "mxfp8"},
    "tensorwise": {"recipe": "tensorwise"},
    "rowwise, all FP8": {"recipe": "rowwise", "weight_grad": "fp8"},
    "block, all FP8": {"recipe": "block", "weight_grad": "fp8"},
    "mxfp8, all FP8": {"recipe": "mxfp8", "weight_grad": "fp8"},
    "tensorwise, all FP8": {"recipe": "tensorwise", "weight_grad": "fp8"},
    "rowwise, BF16 backward": {"recipe": "rowwise", "backward": "bf16"},
    "tensorwise, E4M3 gradients": {"recipe": "tensorwise", "backward": "e4m3"},
}
BLOCKS, DIM, SEQ = 4, 64, 32
# Rounding to nearest: the largest relative error of a normal number, and half of the smallest step below them.
HALF = {E4M3: (2.0**-4, 2.0**-10), E5M2: (2.0**-3, 2.0**-17)}
BF16, FP32 = 2.0**-8, 2.0**-24  # one rounding of each, with room for a tie


def precision_of(fp8: str) -> PrecisionRecipe:
    return PrecisionRecipe(compute="fp8", fp8=Fp8Recipe(bf16_first_blocks=0, bf16_last_blocks=0, **RECIPES[fp8]))


def gradients(topology: str, precision: PrecisionRecipe, check=None) -> tuple[float, dict[str, Tensor]]:
    recipe = ModelRecipe(
        topology=topology,
        dim=DIM,
        num_heads=4,
        num_blocks=BLOCKS,
        seq_len=SEQ,
        vocab_size=64,
        **beside_others(topology),
    )
    assembled = build_model(recipe, precision)
    if check is not None:
        check(assembled.model)
    copy_weights([assembled.model], precision, assembled.context)
    tokens = torch.randint(64, (2, SEQ + 1), generator=torch.Generator().manual_seed(0))
    nll, objective = assembled.model(tokens[:, :-1], labels_BS=tokens[:, 1:], scale=1 / (2 * SEQ))
    differentiate(objective)
    return nll.item() / (2 * SEQ), {name: p.grad for name, p in assembled.parameters().items()}


def off(values: Tensor, q: Fp8) -> Tensor:
    """The most by which rounding may have moved each value, given the scale that its code has."""
    relative, step = HALF[q.codes.dtype]
    ones = q._replace(codes=torch.ones(q.codes.shape))
    return torch.maximum(relative * values.abs(), step * dequantize(ones, torch.float64))


class Checked(Fp8Linear):
    """Compares each of its products with that of the values before they were rounded, in FP64.

    With |a^ - a| <= e and |b^ - b| <= f for the rounded operands, |a^ b^ - a b| <= e |b| + |a| f + e f, element by
    element of the sum; the sum in FP32 adds K 2^-24 of that of absolute values, and a result in BF16 is rounded once.
    Where roundings are independent the squares of the errors add up; the root mean square of one is less than half of
    its bound.
    """

    counted = 0

    def write(self, add_norm, args):
        """Let add_norm hand values over."""
        return add_norm(args)

    def rows(self, x: Rows) -> Fp8:
        q = super().rows(x)
        if isinstance(x, Tensor):
            self.values = x.double()
        return q

    def gradient(self, dy: Tensor) -> OutputGradient:
        self.dy = dy.double()
        return super().gradient(dy)

    def within(self, got: Tensor, a: Tensor, e: Tensor, b: Tensor, f: Tensor, rounding: float) -> None:
        exact, whole = a @ b.t(), (a.abs() + e) @ (b.abs() + f).t()
        bound = whole - a.abs() @ b.abs().t() + (len(b.t()) * FP32 + rounding) * whole
        error = (got.double() - exact).abs()
        assert (error <= bound).all()
        usual = (e / 2).square() @ b.square().t() + a.square() @ (f / 2).square().t() + (rounding / 2 * exact).square()
        assert error.square().sum() <= 1.3 * usual.sum()
        type(self).counted += 1

    def forward(self, x: Rows, operand: Tensor, bias: Tensor | None) -> Tensor:
        y = super().forward(x, operand, bias)
        weight = operand.detach().double()
        assert bias is None
        self.within(y, self.values, off(self.values, x), weight, off(weight, self.weight), BF16)
        return y

    def input_grad(self, dy: OutputGradient, operand: Tensor) -> Tensor:
        dx = super().input_grad(dy, operand)
        weight = operand.detach().double()
        f = off(weight, self.weight)
        if dy.codes is None:
            e = torch.zeros_like(self.dy)
        elif dy.codes.form == TENSOR or self.forms.weight != ROW:
            e = off(self.dy, dy.codes)
        else:  # rounded with the weight's scales in it
            folded = self.dy * self.weight.inverse.double().t()
            e = off(folded, dy.codes) / self.weight.inverse.double().t()
        if self.forms.weight == MX:  # codes that were scaled anew along the outputs
            f = f + 2.0**-10 * weight.abs().amax() / 224
        self.within(dx, self.dy, e, weight.t(), f.t(), BF16)
        return dx

    def weight_grad(self, dy: OutputGradient, x: Rows, dtype: torch.dtype) -> Tensor:
        dw = super().weight_grad(dy, x, dtype)
        e, f, rounding = torch.zeros_like(self.dy), off(self.values, x), BF16
        if self._weight_grad_in_fp8:
            relative, step = HALF[dy.codes.codes.dtype]
            top = {E4M3: 224.0, E5M2: 28672.0}[dy.codes.codes.dtype]  # at least, of the largest with a scale of its own
            e = torch.maximum(relative * self.dy.abs(), step * self.dy.abs().amax() / top)
            f = f + 2.0**-10 * self.values.abs().amax() / 224
        self.within(dw, self.dy.t(), e.t(), self.values.t(), f.t(), rounding)
        return dw


def check_all(model) -> None:
    for _, kernel in fp8_layers([model]).values():
        kernel.__class__ = Checked


PAIRS = [(topology, fp8) for topology in TOPOLOGIES for fp8 in RECIPES]
IN_CI = [(topology, list(RECIPES)[i % len(RECIPES)]) for i, topology in enumerate(TOPOLOGIES)]


@pytest.mark.parametrize(
    ("topology", "fp8"), [pair if pair in IN_CI else pytest.param(*pair, marks=pytest.mark.slow) for pair in PAIRS]
)
def test_every_product_is_within_the_rounding_of_its_operands_and_gradients_within_that_of_all(topology, fp8):
    """Of every linear layer of a model: each output, input's gradient and weight's gradient (``Checked``).

    Of the whole model: roundings are independent, and add in squares. A rounding of E4M3 moves a number by 2.7 % (root
    mean square), one of E5M2 by 5.3 %. On the way through four blocks there are 32 forward, an input and a weight for
    each linear layer, and 32 backward; nonlinear parts may double what they are given.
    """
    before = Checked.counted
    loss, got = gradients(topology, precision_of(fp8), check_all)
    assert Checked.counted - before == 3 * 4 * BLOCKS
    exact_loss, exact = gradients(topology, PrecisionRecipe(compute="fp64"))
    squares = sum((got[name].double() - t).square().sum().item() for name, t in exact.items())
    distance = (squares / sum(t.square().sum().item() for t in exact.values())) ** 0.5
    e5m2 = precision_of(fp8).fp8.gradients == "e5m2"
    assert distance < 2 * 0.027 * (32 + 16 + 16 * (4 if e5m2 else 1)) ** 0.5
    assert abs(loss - exact_loss) < 0.03 * exact_loss
