"""The memory of the loss of a large vocabulary, counted allocation by allocation on the meta device."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megaresnorm.kernels import load_backends
from megaresnorm.kernels.cross_entropy import LogitForm, differentiate, loss_of
from megaresnorm.kernels.registry import kernel_named
from megaresnorm.layout import logit_rows_of
from megaresnorm.parallel.branch_input import BranchInput
from megaresnorm.parallel.head import HeadLoss, OutputMatrix
from megaresnorm.parallel.mesh import Axis
from megaresnorm.precision.half import HalfLinear
from megaresnorm.recipe.load import build_recipe

load_backends()
TOKENS, VOCABULARY, DIM, BF16 = 8192, 131_072, 1024, torch.bfloat16
FORMS = [LogitForm(VOCABULARY), LogitForm(VOCABULARY - 300, 0.5, 30.0)]
LOGITS, WEIGHT = 2 * TOKENS * VOCABULARY, 4 * VOCABULARY * DIM  # bytes in BF16 and in FP32


class Allocations(TorchDispatchMode):
    """Bytes of all tensors that operators make, but for those that were there before; ``peak`` is the most at once."""

    def __init__(self, *known):
        super().__init__()
        self.now = self.peak = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self._sizes = {}

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        made = function(*arguments, **(options or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return made

    def _count(self, storage):
        key = storage._cdata
        if key in self._known or key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, key)

    def _free(self, key):
        self.now -= self._sizes.pop(key)


class Outputs(torch.autograd.Function):
    """Hands logits on as a product would, and drops their gradient."""

    @staticmethod
    def forward(ctx, x, logits):
        return logits

    @staticmethod
    def backward(ctx, gradient):
        return None, None


def test_allocations_are_counted_and_freed():
    with Allocations() as found:
        first = torch.empty(100, device="meta")
        del first
        second = torch.empty(50, device="meta") + 1.0
    assert found.peak == 400 and found.now == 200 and second.numel() == 50


@pytest.mark.parametrize("form", FORMS, ids=["plain", "scaled, capped, padded"])
def test_the_loss_needs_little_beside_its_logits(form):
    """By the pieces in PyTorch, which need more than those in Triton: these have nothing but three numbers a row."""
    logits = torch.empty(TOKENS, VOCABULARY, dtype=BF16, device="meta")
    labels = torch.empty(TOKENS, dtype=torch.int64, device="meta")
    x = torch.empty(1, device="meta", requires_grad=True)
    loss = loss_of(kernel_named("cross_entropy", "chunked"), form)
    with Allocations(logits, labels, x) as found:
        differentiate(loss(Outputs.apply(x, logits), labels, 1e-4, 0.1)[1])
    assert 0 < found.peak < 0.3e9, found.peak


class Counting(HalfLinear):
    """HalfLinear that says what it was asked for."""

    def __init__(self):
        self.products = []

    def forward(self, x, operand, bias):
        self.products.append(("forward", operand.dtype))
        return super().forward(x, operand, bias)

    def input_grad(self, dy, operand):
        self.products.append(("input", operand.dtype))
        return super().input_grad(dy, operand)

    def add_weight_grad(self, total, dy, x):
        self.products.append(("weight", total.dtype))
        super().add_weight_grad(total, dy, x)


def test_parts_are_one_product_each_in_evaluation_and_cast_the_weight_once():
    kernel = Counting()
    head = OutputMatrix(8, 24, Axis("tp"), kernel=kernel)
    torch.nn.init.normal_(head.weight, generator=torch.Generator().manual_seed(0))
    head.loss = HeadLoss(loss_of(kernel_named("cross_entropy", "chunked"), LogitForm(24)), 2)
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(1)).to(BF16).requires_grad_()
    labels = torch.tensor([3, -1, 0, 23, 7])
    with torch.no_grad():
        evaluated = head(BranchInput(x), labels)[0]
    assert kernel.products == 3 * [("forward", BF16)]
    kernel.products.clear()
    nll, objective = head(BranchInput(x), labels)
    differentiate(objective)
    assert kernel.products == 3 * [("forward", BF16), ("input", BF16), ("weight", torch.float32)]
    assert torch.equal(nll, evaluated)


@pytest.mark.gpu
def test_a_product_adds_its_fp32_sums_on_a_gpu():
    g = torch.Generator("cuda").manual_seed(0)
    dy, x = (torch.randn(512, n, generator=g, device="cuda").to(BF16) for n in (384, 256))
    total = torch.randn(384, 256, generator=g, device="cuda")
    wanted = total.double() + dy.double().t() @ x.double()
    HalfLinear().add_weight_grad(total, dy, x)
    assert (total.double() - wanted).norm() < 1e-5 * wanted.norm()


@pytest.mark.skipif(torch.__version__ < "2.13", reason="on the meta device addmm of this torch does not know out_dtype")
@pytest.mark.parametrize("form", FORMS, ids=["plain", "scaled, capped, padded"])
def test_an_output_matrix_in_parts_never_has_all_logits(form):
    """Beside the gradient of the matrix itself, which is 0.54 GB here."""
    model = {"dim": DIM, "num_blocks": 1, "num_heads": 8, "seq_len": TOKENS, "vocab_size": VOCABULARY}
    recipe = build_recipe({"model": model, "data": {"path": "x"}, "train": {"output": "x", "steps": 1}})
    rows = logit_rows_of(recipe, 1, "cuda")
    assert rows == 512 and logit_rows_of(recipe, 1, "cpu") is None and logit_rows_of(recipe, 4, "cuda") is None
    with torch.device("meta"):
        head = OutputMatrix(DIM, VOCABULARY, Axis("tp"), kernel=HalfLinear())
        head.operand = torch.empty(VOCABULARY, DIM, dtype=BF16)
        x = torch.empty(TOKENS, DIM, dtype=BF16, requires_grad=True)
        labels = torch.empty(TOKENS, dtype=torch.int64)
    head.loss = HeadLoss(loss_of(kernel_named("cross_entropy", "chunked"), form), rows)
    with Allocations(head.weight, head.operand, x, labels) as found:
        differentiate(head(BranchInput(x), labels, 1e-4, 0.1)[1])
    assert x.grad is not None and head.weight.grad is not None
    assert WEIGHT < found.peak < WEIGHT + 0.6e9 < LOGITS, found.peak
