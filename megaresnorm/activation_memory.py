"""Activations of a run's pipeline stages, under whatever blocks are recomputed: arithmetic on the recipe and the ranks.

Recomputation is timed by a model, in floating-point operations of a token on one rank: the products that a policy runs
again, and every byte that it moves as so many operations as the device does meanwhile (``PER_BYTE``). What messages of
tensor parallelism take is left out: ``norm``, ``attention``, ``ffn`` and ``branch`` send none that backward would not
send anyway. Products that nothing needs again are not counted, as they are not run again: the last one of a branch, and
that of a span.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from math import ceil
from typing import Any

from megaresnorm.layout import WHOLE_ROWS, gathers_stream, logit_rows_of, split_stages
from megaresnorm.model.activations import Activations, BlockKind, logit_bytes
from megaresnorm.model.branches import Attention, FeedForward
from megaresnorm.model.transformer import Stage, has_embedding_norm
from megaresnorm.offload import LEAST
from megaresnorm.parallel.mesh import Sizes
from megaresnorm.parallel.stages import most_under_way, smallest_batch, stages_of_rank
from megaresnorm.precision.dtypes import DTYPES, weight_dtype
from megaresnorm.precision.fp8 import FORMS, fp8_blocks
from megaresnorm.recipe import Recipe
from megaresnorm.recompute_budget import SPAN, Choice, Group, Held, Plan, Run, held
from megaresnorm.recompute_budget import Stage as StageCost
from megaresnorm.recompute_plan import Segment
from megaresnorm.schedule import batch_size

# Operations that a device does while it moves one byte of its memory: half of an H100's peak in BF16 (989 TFLOP/s) and
# of a CPU core's in FP32 (about 100 GFLOP/s), beside 3.35 TB/s and 10 GB/s.
PER_BYTE = {"cuda": 150, "cpu": 5}
Segments = Mapping[int, Sequence[Segment]]  # by stage


class ActivationMemory:
    """Activations, logits and receive buffers of one recipe in one layout.

    Attributes:
        tokens: of one microbatch.
        num_microbatches: that a rank has in a step.
    """

    def __init__(self, recipe: Recipe, sizes: Sizes, device_type: str) -> None:
        self.recipe, self.sizes, self.model = recipe, sizes, recipe.model
        self.on_cpu = device_type == "cpu"
        self.logit_rows = logit_rows_of(recipe, sizes.tp, device_type)
        self.compute = DTYPES[recipe.precision.branches].itemsize
        self.stream = DTYPES[recipe.precision.stream].itemsize
        self.stages = split_stages(recipe.model, recipe.parallel)
        fp8 = recipe.precision.fp8
        in_fp8 = fp8_blocks(fp8, recipe.model.num_blocks) if recipe.precision.compute == "fp8" else range(0)
        self.kinds = [BlockKind.of(recipe.model, i, in_fp8=i in in_fp8) for i in range(recipe.model.num_blocks)]
        self.scaled = FORMS[fp8.recipe].rows.columns
        data = sizes.dp_replicate * sizes.dp_shard
        samples = ceil(batch_size(recipe.train.steps - 1, recipe.train) / data)
        micro = recipe.train.micro_batch_of(data, sizes.pp)
        self.tokens = micro * recipe.model.seq_len
        self.num_microbatches = ceil(samples / micro)
        if sizes.pp > 1:  # a pipeline fills small batches up
            self.num_microbatches = smallest_batch(self.num_microbatches, sizes.pp, recipe.parallel.pipeline)
        self.of = self._of_blocks()
        self._choices: dict[BlockKind, dict[str, Choice]] = {}

    def _of_blocks(self) -> Activations:
        parallel, precision = self.recipe.parallel, self.recipe.precision
        gathers = gathers_stream(parallel, precision)
        layout: Any = parallel.tensor_layout
        layout = layout if layout != "columns" else "gather" if gathers else "merge"
        keeps = self.recipe.recompute.gathered == "keep"
        if self.recipe.train.compile != "none" and parallel.tensor_layout == "columns":
            keeps = keeps or gathers
        writes = self.on_cpu or self.compute > 4  # FP64 goes to the reference
        return Activations(self.model, self.sizes.tp, layout, keeps, self.compute, self.stream, writes, self.scaled)

    def of_rank(self, rank: int, segments: Segments) -> tuple[Held, int]:
        """Activations of a pipeline rank, and those of them that are in host memory instead of a GPU's."""
        numbers = self.stages_of(rank)
        costs = [self.stage(number) for number in numbers]
        plan = [list(self._runs(costs[i], segments[number])) for i, number in enumerate(numbers)]
        return held(costs, plan), self._offloaded(numbers, plan)

    def _offloaded(self, numbers: list[int], plan: Plan) -> int:
        """Bytes that are on the host (offload.py): of every span one tensor, but for what a stage has received in a
        buffer, and for two spans' of the latest microbatch, which wait on the device."""
        size = self._stored * self.tokens
        if not self.recipe.recompute.offload or self.on_cpu or size < LEAST:
            return 0
        tensors = 0
        for number, runs in zip(numbers, plan, strict=True):
            spans = sum(len(run.blocks) // run.every for run in runs if run.policy == SPAN)
            received = bool(runs) and runs[0].policy == SPAN and not self.stages[number].has_embedding
            tensors += self.under_way(number) * (spans - received)
        return size * max(0, tensors - 2)

    def stages_of(self, rank: int) -> list[int]:
        """Numbers of a pipeline rank's stages."""
        return stages_of_rank(rank, self.sizes.pp, len(self.stages))

    def stage(self, number: int) -> StageCost:
        """A stage as ``recompute_budget`` takes it."""
        stage = self.stages[number]
        groups = (list(blocks) for _, blocks in groupby(stage.blocks, key=lambda block: self.kinds[block]))
        return StageCost(
            tuple(
                Group(range(blocks[0], blocks[-1] + 1), self._choices_of(self.kinds[blocks[0]])) for blocks in groups
            ),
            self.under_way(number),
            self.tokens * self._ends(stage),
        )

    def segments(self, rank: int, plan: Plan) -> dict[int, list[Segment]]:
        """A choice of ``recompute_budget`` as the segments of a rank's stages."""
        return {number: list(_segments(runs)) for number, runs in zip(self.stages_of(rank), plan, strict=True)}

    def received(self, number: int) -> int:
        """Buffers for the activations of each microbatch under way and the gradient of one (parallel/pipeline.py)."""
        forward = self.under_way(number) if number > 0 else 0
        backward = 1 if number < len(self.stages) - 1 else 0
        return (forward + backward) * self._stored * self.tokens

    def under_way(self, number: int) -> int:
        """Microbatches that a stage has begun and not ended."""
        pp, order = self.sizes.pp, self.recipe.parallel.pipeline
        return most_under_way(number, len(self.stages), pp, self.num_microbatches, order)

    def logits(self) -> int:
        """Logits and their gradient; of large vocabularies those of some rows, and what is made of them meanwhile."""
        model, tp, rows = self.model, self.sizes.tp, self.logit_rows
        backend = self.recipe.kernels.cross_entropy
        pieces = (not self.on_cpu or tp > 1) if backend == "auto" else backend not in WHOLE_ROWS
        most, kept = logit_bytes(model, tp, self.compute, in_place=pieces)
        if backend == "reference":  # and log p, and the gradient apart
            most = kept = max(most, 3 * max(4, self.compute) * model.padded_vocab_size)
        gpipe = self.sizes.pp > 1 and self.recipe.parallel.pipeline == "gpipe"
        waiting = self.num_microbatches - 1 if gpipe else 0
        if rows is None or rows >= self.tokens:
            return (most + waiting * kept) * self.tokens
        # Gradients of the rows and of the matrix are made with the loss; one of the matrix is what ``passing`` counts.
        word = weight_dtype(self.recipe.precision.compute).itemsize
        matrix = word * (model.padded_vocab_size // tp) * model.dim
        return most * rows + (1 + waiting) * self.compute * self.tokens * model.dim + waiting * matrix

    @property
    def _stored(self) -> int:
        """Bytes per token of the stream on a rank; sequence parallelism shards the tokens instead of its columns."""
        parts = 1 if self.recipe.parallel.tensor_layout == "full" else self.sizes.tp
        return self.model.dim // parts * self.stream

    def _ends(self, stage: Stage) -> int:
        """Bytes per token that a stage keeps beside its blocks: for the embedding's norm, and for what it returns.

        What it has received lies in a buffer that is counted by itself, though its first block keeps it.
        """
        if not stage.blocks:
            return 0
        first, last = self.kinds[stage.blocks[0]], self.kinds[stage.blocks[-1]]
        is_read = first.attention.norm_in or self.compute == self.stream
        start = -self._stored if is_read else 0
        if stage.has_embedding:
            start = self.of.embedding(has_embedding_norm(self.model))
        return start + (self.of.head(last) if stage.has_head else self._stored)

    def _choices_of(self, kind: BlockKind) -> dict[str, Choice]:
        if kind not in self._choices:
            of, tokens = self.of, self.tokens
            self._choices[kind] = {
                policy: Choice(tokens * of.of_block(kind, policy), tokens * of.working(kind, policy), *found)
                for policy, found in self._operations(kind).items()
            }
        return self._choices[kind]

    def _operations(self, kind: BlockKind) -> dict[str, tuple[float, float]]:
        """Operations of running a block again, by policy; of policy ``every`` also those of a span's last block."""
        model, tp, c = self.model, self.sizes.tp, self.compute
        byte = PER_BYTE["cpu" if self.on_cpu else "cuda"]
        q, kv = model.num_heads * model.head_width, model.kv_heads * model.head_width
        read, width = model.dim * c, model.ffn_width
        first = width * (1 + model.gated_ffn)
        moved = byte * self._stored * (1 + c / self.stream)
        remade = [term.part for term in self.of.terms(kind) if term.remade and term.name == "branch input"]
        inputs = {part: moved * (part in remade) for part in ("open", "add")}
        activation = byte * c * (first + width) / tp
        kept_activation = any(term.name == "activation" and not term.remade for term in self.of.terms(kind))
        out, down = 2 * q * model.dim / tp + byte * read, 2 * width * model.dim / tp + byte * read
        attention = (Attention.flops(model) - 2 * q * model.dim) / tp + byte * (read + c * (3 * q + 4 * kv) / tp)
        ffn = (FeedForward.flops(model) - 2 * width * model.dim) / tp + byte * (read + c * first / tp) + activation
        add = byte * self._stored * (3 + c / self.stream)
        norm = inputs["open"] + inputs["add"] + (0.0 if kept_activation else activation)
        gated = {branch: getattr(kind, branch).gates_tokens for branch in ("attention", "ffn")}
        of_attention = norm + attention + out * gated["attention"]
        of_ffn = norm - (0.0 if kept_activation else activation) + ffn + down * gated["ffn"]
        both = inputs["open"] + inputs["add"] + attention + ffn
        block = both + out + add
        again = {"none": 0.0, "norm": norm, "attention": of_attention, "ffn": of_ffn}
        again["branch"] = both + out * gated["attention"] + down * gated["ffn"]
        last = block + down * (kind.ffn.closes or gated["ffn"])
        return {policy: (found, 0.0) for policy, found in again.items()} | {SPAN: (block + down + add, last)}

    def _runs(self, stage: StageCost, segments: Iterable[Segment]) -> Iterator[Run]:
        """Segments as runs, none of which has blocks of two kinds but for spans."""
        for blocks, policy in segments:
            for group in stage.groups:
                mine = range(max(blocks.start, group.blocks.start), min(blocks.stop, group.blocks.stop))
                if policy == SPAN and blocks and group.blocks.start <= blocks.start < group.blocks.stop:
                    yield Run(blocks, SPAN, group, len(blocks))
                elif policy != SPAN and mine:
                    yield Run(mine, SPAN if policy == "block" else policy, group)


def _segments(runs: Iterable[Run]) -> Iterator[Segment]:
    for policy, same in groupby(runs, key=lambda run: "block" if run.policy == SPAN and run.every == 1 else run.policy):
        together = list(same)
        if policy != SPAN:
            yield Segment(range(together[0].blocks.start, together[-1].blocks.stop), policy)
            continue
        for run in together:
            for start in range(run.blocks.start, run.blocks.stop, run.every):
                yield Segment(range(start, start + run.every), SPAN)
