"""A pipeline sends tuples of tensors from stage to stage, and their gradients back."""

import pytest
import torch
from torch import Tensor, nn

from megaresnorm.parallel.mesh import ParallelContext, Sizes
from megaresnorm.parallel.pipeline import Pipeline
from megaresnorm.testing import run_ranks

MICROBATCHES, ROWS = 6, 3


class Stage(nn.Module):
    """Two streams of different widths and types that read each other, as hyper-connections have them."""

    def __init__(self, number: int, num_stages: int) -> None:
        super().__init__()
        self.is_last = number == num_stages - 1
        g = torch.Generator().manual_seed(number)
        self.number = number
        self.wide = nn.Parameter(torch.randn(6, 4, generator=g, dtype=torch.float64))
        self.narrow = nn.Parameter(torch.randn(4, 6, generator=g, dtype=torch.float64))

    def forward(self, *received: Tensor, tokens_BS: Tensor, labels_BS: Tensor) -> tuple[Tensor, ...]:
        if self.number == 0:
            received = (tokens_BS.double() @ torch.ones(2, 6, dtype=torch.float64), tokens_BS.float().repeat(1, 2))
        x, y = received
        x, y = x + torch.tanh(y.double() @ self.narrow), (y.double() + torch.tanh(x @ self.wide)).to(y.dtype)
        return (x.sum(-1, keepdim=True) * y, labels_BS) if self.is_last else (x, y)


def wire(batch: int, seq: int) -> tuple[Tensor, ...]:
    return (
        torch.empty((batch, 6), dtype=torch.float64, device="meta"),
        torch.empty((batch, 4), dtype=torch.float32, device="meta"),
    )


def loss(returned: tuple[Tensor, Tensor]) -> Tensor:
    y, labels = returned
    return (y.sum(-1) * labels.sum(-1)).sum()


TOKENS = torch.arange(2 * MICROBATCHES * ROWS).view(-1, 2) % 7 - 3


def gradients(rank: int, schedule: str) -> dict[int, list[Tensor]]:
    context = ParallelContext.create(Sizes(pp=2), "cpu")
    num_stages = 4 if schedule == "interleaved" else 2
    modules: dict[int, nn.Module] = {number: Stage(number, num_stages) for number in range(rank, num_stages, 2)}
    pipeline = Pipeline(modules, num_stages, context.pp, schedule, wire, torch.device("cpu"))
    pipeline.run(TOKENS, TOKENS, MICROBATCHES, loss, backward=True)
    return {number: [p.grad.clone() for p in module.parameters()] for number, module in modules.items()}


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe", "interleaved"])
def test_stages_of_two_streams_have_the_gradients_of_one_process(schedule):
    num_stages = 4 if schedule == "interleaved" else 2
    stages = [Stage(number, num_stages) for number in range(num_stages)]
    for tokens in TOKENS.split(ROWS):
        carried: tuple[Tensor, ...] = ()
        for stage in stages:
            carried = stage(*carried, tokens_BS=tokens, labels_BS=tokens)
        loss(carried).backward()
    found = run_ranks(2, gradients, schedule)
    for number, stage in enumerate(stages):
        for got, parameter in zip(found[number % 2][number], stage.parameters(), strict=True):
            assert torch.equal(got, parameter.grad), number
