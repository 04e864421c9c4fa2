"""A norm sharded over the hidden dimension: its kernels put together are the whole norm, by every backend."""

import pytest
import torch

from megaresnorm.kernels import load_backends
from megaresnorm.kernels.add_norm.reference import NormWeights, normalize
from megaresnorm.kernels.add_norm.sharded import REFERENCE, ShardedNormKernels, merge_stats, normalize_blocks
from megaresnorm.kernels.add_norm.spec import sharded_norm_kernels
from megaresnorm.kernels.cpu import build
from megaresnorm.kernels.registry import backends

load_backends()
KINDS = ["layernorm", "rmsnorm"]
SIZES = [(1, 2), (5, 24), (300, 256), (3, 2080)]
DTYPES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.float32),
]


def put_together(
    kernels: ShardedNormKernels, kind: str, z, dy, weight, bias, parts: int, out_dtype: torch.dtype
) -> list[torch.Tensor]:
    """y and the gradients of z, weight and bias, as ``parts`` ranks compute them."""
    columns, eps = z.shape[1], 1e-5
    local = [[t.chunk(parts, dim=-1)[i].contiguous() for t in (z, dy, weight, bias)] for i in range(parts)]
    stats = merge_stats(torch.stack([kernels.stats(zi, kind) for zi, *_ in local]), kind, columns, eps)
    y = [kernels.apply(zi, stats, wi, bi if kind == "layernorm" else None, kind, out_dtype) for zi, _, wi, bi in local]
    local = [
        (zi, torch.cat((di, di), 1)[:, : di.shape[1]], wi, bi) for zi, di, wi, bi in local
    ]  # dy is a slice of a message
    sums = sum(kernels.grad_sums(di, zi, stats, wi, kind) for zi, di, wi, _ in local)
    dz = [kernels.grad_apply(di, zi, stats, sums, wi, kind, columns) for zi, di, wi, _ in local]
    weights = [kernels.grad_weights(di, zi, stats, kind) for zi, di, *_ in local]
    return [torch.cat(y, 1), torch.cat(dz, 1), *(torch.cat([w[i] for w in weights]) for i in (0, 1))]


def check(
    kernels: ShardedNormKernels, kind: str, rows: int, columns: int, dtypes, device: str = "cpu", mean: float = 3.0
) -> None:
    generator = torch.Generator().manual_seed(rows + columns)
    z = (torch.randn(rows, columns, generator=generator) + mean).to(dtypes[0])
    dy = torch.randn(rows, columns, generator=generator).to(dtypes[1])
    weight, bias = 1 + torch.randn(2, columns, generator=generator)
    inputs = [t.to(device) for t in (z, dy, weight, bias)]
    leaves = [t.double().requires_grad_() for t in (z, weight, bias)]
    norm = NormWeights(kind, leaves[1], leaves[2] if kind == "layernorm" else None, 1e-5)
    exact = normalize(leaves[0], norm)
    exact.backward(dy.double())
    db = dy.double().sum(0) if kind == "rmsnorm" else leaves[2].grad
    got = put_together(kernels, kind, *inputs, 2, dtypes[1])
    bf16 = torch.bfloat16 in dtypes
    for what, mine, wanted in zip(
        ("y", "dz", "dw", "db"), got, (exact, leaves[0].grad, leaves[1].grad, db), strict=True
    ):
        tolerance = 8e-3 if bf16 and what in ("y", "dz") else 1e-5
        scale = max(wanted.abs().max().item(), 0.01)
        assert (mine.cpu().double() - wanted).abs().max() / scale < tolerance, (what, kind, rows, columns, dtypes)


def check_blocks(kernels: ShardedNormKernels, kind: str, rows: int, columns: int, dtype, device: str = "cpu") -> None:
    """The norm of gathered columns, and its gradient as two ranks send it, against FP64."""
    generator = torch.Generator().manual_seed(rows + columns)
    message = (torch.randn(2, rows + 3, columns // 2, generator=generator) + 3.0).to(
        dtype
    )  # with rows behind the columns
    z, du = message[:, :rows], torch.randn(rows, columns, generator=generator).to(dtype)
    weight, bias = 1 + torch.randn(2, columns, generator=generator)
    bias = bias if kind == "layernorm" else None
    wide = [None if t is None else t.double().requires_grad_() for t in (z, weight, bias)]
    norm = NormWeights(kind, weight.to(device), None if bias is None else bias.to(device), 1e-5)
    exact, exact_statistics = normalize_blocks(wide[0], NormWeights(kind, wide[1], wide[2], 1e-5))
    got, statistics = kernels.normalize_blocks(message.to(device)[:, :rows], norm)
    tolerance = 8e-3 if dtype == torch.bfloat16 else 1e-5
    assert got.dtype == dtype and got.is_contiguous() and statistics.dtype == torch.float32
    torch.testing.assert_close(statistics.cpu().double(), exact_statistics, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.cpu().double(), exact.detach(), rtol=tolerance, atol=tolerance)
    blocks, sums = kernels.pack_gradient(du.to(device), got, norm, 2)
    if sums is None:
        blocks, beside = blocks.split((columns // 2, 2 if bias is not None else 1), dim=2)
        assert torch.equal(beside[0], beside[1])
        sums = beside[0]
    assert torch.equal(blocks.cpu(), du.view(rows, 2, -1).transpose(0, 1))
    rounded = got.cpu().double() - (0 if bias is None else wide[2].detach())
    wanted = [(du.double() * rounded).sum(-1)] + ([du.double() @ wide[1].detach()] if bias is not None else [])
    torch.testing.assert_close(sums.cpu().double(), torch.stack(wanted, -1), rtol=1e-4, atol=2e-5 * columns)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gathered_columns(kind, dtype):
    for rows, columns in SIZES:
        check_blocks(REFERENCE, kind, rows, columns, dtype)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtypes", DTYPES)
def test_pieces_make_the_norm(backend, kind, dtypes):
    if backend == "cpu" and (reason := build.unavailable()):
        pytest.skip(reason)
    kernels = sharded_norm_kernels(backend)
    assert (kernels is REFERENCE) == (backend == "reference")
    for rows, columns in SIZES:
        check(kernels, kind, rows, columns, dtypes)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_rows_far_from_zero(backend):
    if backend == "cpu" and (reason := build.unavailable()):
        pytest.skip(reason)
    check(sharded_norm_kernels(backend), "layernorm", 64, 1024, DTYPES[0], mean=100.0)


def test_c_takes_no_fp8():
    if reason := build.unavailable():
        pytest.skip(reason)
    with pytest.raises(TypeError, match=r"shard_apply: out is torch.float8_e4m3fn"):
        sharded_norm_kernels("cpu").apply(
            torch.ones(2, 4), torch.ones(2, 2), torch.ones(4), None, "rmsnorm", torch.float8_e4m3fn
        )


def test_other_backends_of_add_norm_take_the_reference():
    assert sharded_norm_kernels("te") is REFERENCE and {
        kernel.backend for kernel in backends("add_norm") if kernel.implementation
    } == {"cpu", "triton"}


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtypes", DTYPES)
def test_triton_pieces_on_a_gpu(kind, dtypes):
    for rows, columns in [*SIZES, (8192, 4096)]:
        check(sharded_norm_kernels("triton"), kind, rows, columns, dtypes, device="cuda")
        check_blocks(sharded_norm_kernels("triton"), kind, rows, columns, dtypes[0], device="cuda")
