"""Effects of depth on a topology before and in the first step: signal, gradient, and the model update ||dF||."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from math import nan
from statistics import median

import torch
from torch import Tensor

from megaresnorm.assemble import Assembled, build_model
from megaresnorm.model.topology import beside_others
from megaresnorm.optim import Optimizer
from megaresnorm.parallel.branch_input import whole_rows
from megaresnorm.recipe import InitRecipe, ModelRecipe, OptimRecipe, PrecisionRecipe, TopologyOptions
from megaresnorm.telemetry.depth.watch import DepthWatch

LEARNING_RATE = 1e-3


@dataclass(frozen=True)
class ProbeSetting:
    """The model that is probed. The defaults are those of the figures in the documentation."""

    dim: int = 64
    num_heads: int = 2
    ffn_dim: int = 128
    vocab_size: int = 256
    seq_len: int = 64
    batch: int = 4
    base_dim: int = 64
    base_num_blocks: int = 1

    def model(self, topology: str, num_blocks: int) -> ModelRecipe:
        """A GELU model without biases, with learned positions and what the topology needs beside others."""
        options = TopologyOptions(base_dim=self.base_dim, base_num_blocks=self.base_num_blocks)
        return ModelRecipe(
            dim=self.dim,
            num_blocks=num_blocks,
            num_heads=self.num_heads,
            ffn_dim=self.ffn_dim,
            vocab_size=self.vocab_size,
            seq_len=self.seq_len,
            topology=topology,
            topology_options=options if topology == "completep" else TopologyOptions(),
            norm="layernorm",
            norm_bias=False,
            positions="learned",
            ffn="gelu",
            init=InitRecipe(embedding_std=1.0),
            **beside_others(topology),
        )


@dataclass(frozen=True)
class ProbeResult:
    """One model at initialisation and after one step of each optimizer on one batch of random tokens, in FP64.

    Both steps change only the matrices of the blocks, which DeepNet's bound is about. The weights of post-norms are
    left alone, since each of the 2N passes its own step on to the output, so that theirs alone grows with N.

    Attributes:
        stream_rms: RMS of the residual stream after the last block.
        gradient_ratio: ||dL/dx_0|| / ||dL/dx_L||, of the stream before the first and after the last block.
        angular_distance: of a block's input and output over pi, mean over tokens and blocks.
        effective_depth: how many of the 2N sub-layers do the work.
        sgd_update: RMS of dF / lr after one SGD step, F being the hidden state that the output matrix reads.
        adam_update: RMS of dF after one AdamW step of lr 1e-3 without weight decay, with the topology's multipliers.

    Source:
        DeepNet, arXiv:2203.00555, section 4.2.
    """

    topology: str
    num_blocks: int
    seed: int
    stream_rms: float
    gradient_ratio: float
    angular_distance: float
    effective_depth: float
    sgd_update: float
    adam_update: float


def probe(topology: str, num_blocks: int, seed: int, setting: ProbeSetting) -> ProbeResult:
    """Build the model and measure it."""
    recipe = setting.model(topology, num_blocks)
    generator = torch.Generator().manual_seed(seed)
    tokens, labels = torch.randint(setting.vocab_size, (2, setting.batch, setting.seq_len), generator=generator)
    assembled = build_model(recipe, PrecisionRecipe(compute="fp64"), seed=seed)
    model = assembled.model

    watch = DepthWatch(recipe, assembled)
    with watch.watching():
        model(tokens, labels_BS=labels, scale=1 / labels.numel())[1].backward()
    figures, hidden = watch.figures, _hidden(assembled, tokens)
    assert figures is not None
    angles = [angle for angle in figures.by_block["angular_distance"] if angle is not None]
    return ProbeResult(
        topology=topology,
        num_blocks=num_blocks,
        seed=seed,
        stream_rms=_known(figures.end_rms),
        gradient_ratio=_known(figures.whole["gradient_ratio"]),
        angular_distance=sum(angles) / len(angles),
        effective_depth=_known(figures.whole["effective_depth"]),
        sgd_update=_update(assembled, tokens, hidden, "sgd") / LEARNING_RATE,
        adam_update=_update(assembled, tokens, hidden, "adam"),
    )


def probe_all(
    topologies: Sequence[str], depths: Sequence[int], seeds: Sequence[int], setting: ProbeSetting
) -> Iterator[ProbeResult]:
    """Probe every combination, depths innermost."""
    for topology in topologies:
        for seed in seeds:
            for num_blocks in depths:
                yield probe(topology, num_blocks, seed, setting)


def summary_rows(results: Sequence[ProbeResult]) -> list[dict[str, float | str | int]]:
    """Medians over seeds, a row for each topology and depth."""
    rows: list[dict[str, float | str | int]] = []
    for topology, num_blocks in dict.fromkeys((r.topology, r.num_blocks) for r in results):
        same = [asdict(r) for r in results if (r.topology, r.num_blocks) == (topology, num_blocks)]
        measures = [name for name in same[0] if name not in ("topology", "num_blocks", "seed")]
        rows.append(
            {"topology": topology, "num_blocks": num_blocks, **{m: median(s[m] for s in same) for m in measures}}
        )
    return rows


@torch.no_grad()
def _update(assembled: Assembled, tokens: Tensor, before: Tensor, optimizer: str) -> float:
    """RMS of the change of the hidden state by one optimizer step with the present gradients; weights are restored."""
    matrices = {n: p for n, p in assembled.model.named_parameters() if n.startswith("blocks.") and p.dim() == 2}
    saved = {name: p.clone() for name, p in matrices.items()}
    if optimizer == "sgd":
        torch.optim.SGD(matrices.values(), lr=LEARNING_RATE).step()
    else:
        adam = Optimizer(matrices, assembled.table, OptimRecipe(lr=LEARNING_RATE, weight_decay=0.0))
        adam.collect()
        adam.step(LEARNING_RATE)
    change = _hidden(assembled, tokens) - before
    for name, parameter in matrices.items():
        parameter.copy_(saved[name])
    return _rms(change)


@torch.no_grad()
def _hidden(assembled: Assembled, tokens: Tensor) -> Tensor:
    """What the output matrix reads."""
    model = assembled.model
    rows = model.rows(tokens)
    return whole_rows(model.finish(model.run_blocks(model.embed(tokens, rows), rows)))


def _known(number: float | None) -> float:
    return nan if number is None else number


def _rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()
