"""Products in FP8: torch's and Transformer Engine's against the emulation, and all of them against FP64."""

import importlib

import pytest
import torch
import torch.nn.functional as F
from standins import installed
from torch.nn.functional import ScalingType

from megaresnorm.errors import ConfigError
from megaresnorm.kernels import load_backends
from megaresnorm.kernels.fp8 import torch_product
from megaresnorm.kernels.fp8.formats import BLOCK, E4M3, E5M2, MX, ROW, TENSOR, TILE, dequantize, quantize, transposed
from megaresnorm.kernels.fp8.product import KINDS, RECIPES, emulated, kind_of
from megaresnorm.kernels.fp8.quantize import REFERENCE
from megaresnorm.kernels.gpu import packages
from megaresnorm.kernels.registry import choose_kernel, kernel_named
from megaresnorm.parallel.linear_kernel import PLAIN
from megaresnorm.precision.fp8 import FORMS, Fp8Linear
from megaresnorm.recipe import Fp8Recipe

load_backends()
BF16, F32 = torch.bfloat16, torch.float32
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
TORCH, TE = kernel_named("fp8_product", "torch"), kernel_named("fp8_product", "te")
PAIRS = {  # recipe -> forms of a and b in the products of a model
    "tensorwise": [(TENSOR, TENSOR)],
    "rowwise": [(ROW, ROW)],
    "block": [(BLOCK, TILE), (BLOCK, BLOCK)],
    "mxfp8": [(MX, MX)],
}
SHAPES = [(1, 1, 1), (5, 7, 9), (1, 130, 144), (33, 48, 272), (64, 17, 1024)]
ALIGNED = [(1, 16, 16), (5, 32, 128), (3, 144, 272), (130, 16, 640), (32, 48, 135)]  # N as GPUs take it; K is padded
TYPES = [(E4M3, E4M3), (E5M2, E4M3), (E4M3, E5M2), (E5M2, E5M2)]


def values(rows, columns, seed, device="cpu"):
    """Numbers whose rows, and whose blocks along a row, are of different sizes."""
    g = torch.Generator().manual_seed(seed)
    sizes = torch.exp2(torch.randint(-6, 7, (rows, 1), generator=g) + torch.arange(columns) // 32 % 3)
    return (torch.randn(rows, columns, generator=g) * sizes).to(device)


def operands(forms, shape, types=(E4M3, E4M3), device="cpu"):
    (rows, outputs, summed), (form_a, form_b) = shape, forms
    return (
        quantize(values(rows, summed, 1, device), form_a, types[0]),
        quantize(values(outputs, summed, 2, device), form_b, types[1]),
        torch.randn(outputs, generator=torch.Generator().manual_seed(3)).to(device),
    )


def exact(a, b):
    """Their product in FP64, and the sums of the sizes of its terms."""
    wide_a, wide_b = (dequantize(q).double() for q in (a, b))
    return wide_a @ wide_b.t(), wide_a.abs() @ wide_b.abs().t()


def check_against_the_emulation(product, forms, shape, types, device="cpu", relative=5e-6):
    a, b, bias = operands(forms, shape, types, device)
    sizes = exact(a, b)[1] + bias.abs()
    for added in (None, bias):
        want = emulated(a, b, added, F32, precise=True)
        got = product(a, b, added, F32, precise=True)
        assert got.dtype == F32 and got.shape == shape[:2]
        assert (got - want).norm() <= relative * sizes.norm() and ((got - want).abs() <= relative * sizes).all()
        for precise in (False, True):
            got = product(a, b, added, BF16, precise=precise)
            # Rounded once: half a unit of BF16 from the sum in FP32, whose bias is in BF16; and the sums may differ.
            sum_32 = emulated(a, b, None if added is None else added.to(BF16).float(), F32, precise=True)
            assert got.dtype == BF16
            assert ((got - sum_32).abs() <= 2.0**-8 * sum_32.abs() + relative * sizes).all()


# --- torch ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
@pytest.mark.parametrize("types", TYPES)
def test_torch_multiplies_as_the_emulation_does(recipe, types):
    if reason := TORCH.refusal(CPU, BF16, recipe):
        pytest.skip(reason)
    for shape in SHAPES:
        check_against_the_emulation(TORCH.function, *PAIRS[recipe], shape, types)


@pytest.mark.parametrize("recipe", RECIPES)
def test_sums_are_within_a_rounding_of_each_term_of_fp64(recipe):
    """Products of codes are exact in FP32, and scales are powers of two: K sums, each rounded to 24 bits."""
    kernels = [emulated] + ([TORCH.function] if TORCH.refusal(CPU, BF16, recipe) is None else [])
    for types in TYPES:
        for shape in SHAPES:
            for forms in PAIRS[recipe]:
                a, b, _ = operands(forms, shape, types)
                want, sizes = exact(a, b)
                for kernel in kernels:
                    got = kernel(a, b, None, F32, precise=True)
                    assert ((got - want).abs() <= shape[2] * 2.0**-24 * sizes).all()


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_so(recipe, bad):
    kernels = [emulated] + ([TORCH.function] if TORCH.refusal(CPU, BF16, recipe) is None else [])
    for form_a, form_b in PAIRS[recipe]:
        x, w = values(6, 160, 1), values(32, 160, 2)
        x[2, 40] = bad
        for kernel in kernels:
            for dtype in (F32, BF16):
                y = kernel(quantize(x, form_a), quantize(w, form_b), None, dtype, precise=True)
                assert not y[2].isfinite().any()
                assert recipe == "tensorwise" or y[[0, 1, 3, 4, 5]].isfinite().all()
                y = kernel(quantize(w, form_a), quantize(x, form_b), None, dtype, precise=True)
                assert not y[:, 2].isfinite().any()


def cuda_scaled_mm(
    mat_a, mat_b, scale_a, scale_recipe_a, scale_b, scale_recipe_b, swizzle_a=None, swizzle_b=None, bias=None,
    output_dtype=BF16, contraction_dim=(), use_fast_accum=False,
):  # fmt: skip
    """F.scaled_mm as GPUs of compute capability 9.0 have it: what its source checks, and values as the emulation's."""
    (rows, summed), outputs = mat_a.shape, mat_b.shape[1]
    assert mat_a.is_contiguous() and mat_b.t().is_contiguous(), "row-major times column-major"
    assert summed % 16 == 0 and outputs % 16 == 0 and mat_b.shape[0] == summed
    assert {mat_a.dtype, mat_b.dtype} != {E5M2}, "Multiplication of two Float8_e5m2 matrices is not supported"
    assert bias is None or (output_dtype == BF16 == bias.dtype and bias.shape == (outputs,))
    assert scale_a.dtype == scale_b.dtype == F32
    tiles = -(-summed // 128)
    if scale_recipe_a == scale_recipe_b == ScalingType.TensorWise:
        assert scale_a.numel() == scale_b.numel() == 1
        a, b = mat_a.float() * scale_a, mat_b.float() * scale_b
    elif scale_recipe_a == scale_recipe_b == ScalingType.RowWise:
        assert scale_a.shape == (rows, 1) and scale_b.shape == (1, outputs) and scale_b.stride(1) == 1
        assert scale_a.stride(0) == 1 and output_dtype == BF16 and mat_b.dtype == E4M3, "of CUTLASS"
        a, b = mat_a.float() * scale_a, mat_b.float() * scale_b
    else:
        assert mat_a.dtype == mat_b.dtype == E4M3 and not use_fast_accum
        assert scale_recipe_a == ScalingType.BlockWise1x128
        assert scale_a.shape == (rows, tiles) and scale_a.stride() == (1, rows)
        a = mat_a.float() * scale_a.repeat_interleave(128, 1)[:, :summed]
        if scale_recipe_b == ScalingType.BlockWise1x128:
            assert scale_b.shape == (outputs, tiles) and scale_b.stride() == (1, outputs)
            b = mat_b.float() * scale_b.repeat_interleave(128, 1)[:, :summed].t()
        else:
            assert scale_recipe_b == ScalingType.BlockWise128x128
            padded = -(-tiles // 4) * 4
            assert scale_b.shape == (padded, -(-outputs // 128)) and scale_b.stride() == (1, padded)
            spread = scale_b[:tiles].repeat_interleave(128, 0)[:summed].repeat_interleave(128, 1)[:, :outputs]
            b = mat_b.float() * spread
    return (a @ b + (0.0 if bias is None else bias.float())).to(output_dtype)


@pytest.fixture
def like_cuda(monkeypatch):
    """F.scaled_mm of a GPU, as its source describes it, in the place of the one that runs here."""
    monkeypatch.setattr(F, "scaled_mm", cuda_scaled_mm)
    monkeypatch.setattr(torch_product, "_has_scaled_mm_on_cpus", lambda: True)
    torch_product._failure.cache_clear()
    yield
    torch_product._failure.cache_clear()


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "block"])
def test_scales_are_laid_out_as_gpus_read_them(like_cuda, recipe):
    assert TORCH.refusal(CPU, BF16, recipe) is None
    for forms in PAIRS[recipe]:
        for shape in ALIGNED:
            for types in TYPES[: 1 if recipe == "block" else 2]:
                check_against_the_emulation(TORCH.function, forms, shape, types)


@pytest.mark.parametrize(
    ("recipe", "backward", "kernel"),
    [(r, b, "torch") for r in RECIPES[:3] for b in ("e4m3", "e5m2", "bf16") if (r, b) != ("block", "e5m2")]
    + [("tensorwise", "e5m2", "te"), ("tensorwise", "e4m3", "te"), ("block", "e4m3", "te")],
)
def test_all_products_of_a_layer_are_such_as_gpus_take(like_cuda, recipe, backward, kernel):
    """K and N in multiples of 16, which are no blocks, and T tokens; the numbers are the emulation's."""
    settings = Fp8Recipe(recipe=recipe, backward=backward, weight_grad="bf16" if backward == "bf16" else "fp8")
    x, dy, bias = values(13, 144, 1).to(BF16), values(13, 32, 2).to(BF16), values(1, 32, 3)[0]
    w = quantize(values(32, 144, 4), FORMS[recipe].weight)
    found = []
    for backend in (emulated, kernel_named("fp8_product", kernel).function):
        layer = Fp8Linear(settings, backend, REFERENCE, PLAIN)
        layer.weight = w
        with installed():
            rows, gradient = layer.rows(x), layer.gradient(dy)
            y = layer.forward(rows, bias, bias)
            found.append((y, layer.input_grad(gradient, bias), layer.weight_grad(gradient, rows, F32)))
    for want, got in zip(*found, strict=True):
        assert got.dtype == want.dtype and got.shape == want.shape
        assert (got.float() - want.float()).norm() <= (5e-6 if got.dtype == F32 else 2.0**-8) * want.float().norm() != 0


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "block"])
def test_torch_on_a_gpu(recipe):
    if reason := TORCH.refusal(CUDA, BF16, recipe):
        pytest.skip(reason)
    for forms in PAIRS[recipe]:
        for shape in [*ALIGNED, (512, 1024, 4096)]:
            for types in TYPES[: 1 if recipe == "block" else 2]:  # tensor cores keep 13 bits and more of a sum
                check_against_the_emulation(TORCH.function, forms, shape, types, "cuda", relative=2.0**-11)


# --- choice -----------------------------------------------------------------------------------------------------------


def test_on_cpus_auto_takes_the_emulation_and_says_why():
    for kind in KINDS:
        kernel, line = choose_kernel("fp8_product", "auto", CPU, BF16, kind)
        assert kernel.backend == "emulated"
        assert ("several times slower than the emulation" in line) == (TORCH.refusal(CPU, BF16, kind) is None)
        assert "te" not in line.split()


def test_on_gpus_auto_takes_torch_where_the_device_has_the_form(monkeypatch):
    reasons = {"tensorwise": None, "rowwise": None, "block": "this GPU has none"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch_product, "_failure", lambda recipe, device: reasons[recipe])
    for kind, backend in {"tensorwise": "torch", "rowwise": "torch", "block": "emulated", "mxfp8": "emulated"}.items():
        kernel, line = choose_kernel("fp8_product", "auto", CUDA, BF16, kind)
        assert kernel.backend == backend
        assert backend == "torch" or reasons.get(kind, "has no mxfp8") in line
    with pytest.raises(ConfigError, match=r"kernels\.fp8_product=torch cannot run on cuda: this GPU has none"):
        choose_kernel("fp8_product", "torch", CUDA, BF16, "block")


def test_a_product_that_fails_or_is_wrong_is_not_taken(like_cuda, monkeypatch):
    def fails(*tensors, **options):
        raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED\nwhen calling")

    def swaps_blocks(a, b, scale_a, recipe_a, scale_b, recipe_b, **options):
        return cuda_scaled_mm(a, b, scale_a.flip(1), recipe_a, scale_b, recipe_b, **options)

    for broken, wanted in (
        (fails, r"no block product here \(CUBLAS_STATUS_NOT_SUPPORTED\)"),
        (swaps_blocks, "computes block products otherwise"),
    ):
        monkeypatch.setattr(F, "scaled_mm", broken)
        torch_product._failure.cache_clear()
        with pytest.raises(ConfigError, match=wanted) as error:
            choose_kernel("fp8_product", "torch", CPU, BF16, "block")
        assert "\n" not in str(error.value)


def test_gradients_in_e5m2_are_another_kind_for_blocks_alone():
    assert [kind_of(recipe, "e5m2") for recipe in RECIPES] == ["tensorwise", "rowwise", "block-e5m2", "mxfp8"]
    assert [kind_of(recipe, "bf16") for recipe in RECIPES] == list(RECIPES)
    assert set(KINDS) == set(kernel_named("fp8_product", "emulated").kinds)


# --- Transformer Engine -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["tensorwise", "block"])
def test_transformer_engine_is_called_as_its_source_says(recipe):
    with installed():
        for forms in PAIRS[recipe]:
            for shape in ALIGNED:
                for types in TYPES[: 1 if recipe == "block" else 3]:
                    check_against_the_emulation(TE.function, forms, shape, types)
                a, b, _ = operands(forms, shape)
                y = TE.function(transposed(transposed(a)) if forms[0] == TENSOR else a, b, None, F32, precise=False)
                assert torch.equal(y, TE.function(a, b, None, F32, precise=True))


def test_how_sums_are_kept_reaches_transformer_engine(monkeypatch):
    asked = []
    with installed():
        te = importlib.import_module("megaresnorm.kernels.fp8.te")
        gemm = te.general_gemm

        def noted(*tensors, **options):
            asked.append(options["use_split_accumulator"])
            return gemm(*tensors, **options)

        monkeypatch.setattr(te, "general_gemm", noted)
        a, b, _ = operands((TENSOR, TENSOR), (16, 16, 16))
        for precise in (True, False):
            TE.function(a, b, None, BF16, precise=precise)
    assert asked == [True, False]


@pytest.mark.parametrize(
    ("version", "capability", "kind", "says"),
    [
        ("2.11.0", (9, 0), "block", "it needs Transformer Engine 2.12 or newer, this is 2.11.0"),
        ("2.12.0+abc", (9, 0), "block", None),
        ("2.20.2", (8, 9), "tensorwise", None),
        ("2.20.2", (8, 9), "block", "it needs compute capability 9.0, this GPU has 8.9"),
        ("2.20.2", (8, 0), "tensorwise", "it needs compute capability 8.9, this GPU has 8.0"),
        ("2.20.2", (9, 0), "rowwise", "has no rowwise fp8_product"),
        (None, (9, 0), "block", "Transformer Engine is not installed whole"),
    ],
)
def test_transformer_engine_where_it_cannot_run(version, capability, kind, says, monkeypatch):
    def found(name):
        if version is None:
            raise packages.importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(packages.importlib.metadata, "version", found)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with installed():
        reason = TE.refusal(CUDA, BF16, kind)
    assert (reason is None) == (says is None) and (says or "") in (reason or "")
    assert TE.avoid(CUDA, BF16) == "chosen only by name"


@pytest.mark.te
@pytest.mark.parametrize("recipe", ["tensorwise", "block"])
def test_with_transformer_engine_itself(recipe):
    if reason := TE.refusal(CUDA, BF16, recipe):
        pytest.skip(reason)
    for forms in PAIRS[recipe]:
        for shape in [*ALIGNED[1:], (512, 1024, 4096)]:
            for types in TYPES[: 1 if recipe == "block" else 2]:
                check_against_the_emulation(TE.function, forms, shape, types, "cuda", relative=2.0**-11)
