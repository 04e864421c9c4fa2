"""The rows of a weight that a rank of FSDP2 has, in FP8, without the ranks: as many of them as one likes."""

from types import SimpleNamespace

import pytest
import torch

from megaresnorm.kernels.fp8.formats import E4M3, Fp8, dequantize, exponents, quantize
from megaresnorm.kernels.fp8.product import FORMS
from megaresnorm.parallel.mesh import Axis
from megaresnorm.precision.fp8_shards import _Shard


@pytest.mark.parametrize("recipe", FORMS)
@pytest.mark.parametrize(("rows", "ranks"), [(128, 14), (300, 4), (256, 27), (5, 8)])
def test_shards_of_any_size_make_up_the_codes_of_the_whole_weight(recipe, rows, ranks):
    """Some ranks have no rows, and begin behind the last tile of 128."""
    form, weight = FORMS[recipe].weight, torch.randn(rows, 160) * torch.logspace(-3, 3, rows).unsqueeze(1)
    each = -(-rows // ranks)
    shards = []
    for rank in range(ranks):
        mine = weight[each * rank : each * (rank + 1)]
        layer = SimpleNamespace(weight=_Sharded(weight, mine))
        shards.append(_Shard(layer, SimpleNamespace(forms=FORMS[recipe]), Axis("dp_shard", ranks, rank)))
    if recipe in ("tensorwise", "block"):
        amax = torch.stack([shard.amax() for shard in shards]).amax(0)
        for shard in shards:
            shard.round(amax)
    else:
        everyone = torch.cat([exponents(shard.round(None)) for shard in shards])
        for shard in shards:
            shard.take_scales(everyone)
    codes = torch.cat([shard.codes for shard in shards])[:rows].view(E4M3)
    for shard in shards:
        assert torch.equal(dequantize(Fp8(codes, shard.inverse, form)), dequantize(quantize(weight, form)))


class _Sharded:
    """As much of a sharded parameter as is looked at."""

    def __init__(self, whole: torch.Tensor, mine: torch.Tensor) -> None:
        self.shape, self._local_tensor = whole.shape, mine

    def detach(self) -> torch.Tensor:
        return self._local_tensor
