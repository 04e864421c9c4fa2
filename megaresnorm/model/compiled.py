"""torch.compile of a model's blocks: which ones are one graph, and when it is used.

Equal blocks share their code. For that all that differs between them reaches a block as a tensor (weights, their BF16
copies, the keys of dropout masks); only a topology's constants are compiled in.
"""

import os
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from megaresnorm.errors import ConfigError
from megaresnorm.model.block import Block
from megaresnorm.model.dropout import DropoutMasks
from megaresnorm.model.sequence import SequenceInfo
from megaresnorm.model.spans import Span
from megaresnorm.model.stream import AddNorm, Stream
from megaresnorm.model.topology import SUBLAYERS, residual_at
from megaresnorm.recipe import ModelRecipe
from megaresnorm.recompute import Keeper, Region

if TYPE_CHECKING:
    from megaresnorm.model.transformer import Transformer

# A call of compiled code costs a CPU what a small matrix product does, and compiling takes longer the more blocks are
# one graph: at width 64, 8 blocks together were 12 % faster than one by one, 20 no faster than 8.
BLOCKS_PER_GRAPH = 8
WIDEST, MOST_KINDS = 512, 3  # model.dim and kinds of blocks up to which ``auto`` compiles on a CPU


class BlockRun(nn.Module):
    """Consecutive blocks as one function to compile.

    Args:
        add_norm: closes the add that the last block leaves pending; None: it stays pending.
    """

    def __init__(self, blocks: Sequence[Block], add_norm: AddNorm | None = None) -> None:
        super().__init__()
        self.blocks, self.add_norm = nn.ModuleList(blocks), add_norm

    def forward(self, stream: Stream, rows: SequenceInfo, masks: DropoutMasks | None) -> Stream:
        """The stream after the last of them."""
        for number, block in enumerate(self.blocks):
            stream = block(stream, rows, None if masks is None else masks.of_blocks(number, 1))
        return stream if self.add_norm is None else Stream(self.add_norm.trunk(stream))


class CompiledSpan:
    """Compiled blocks of which one tensor is kept: the same code is run again in backward (see ``Span``).

    Args:
        runs: by the number of their first block.
    """

    def __init__(self, runs: dict[int, BlockRun], keeper: Callable[[], Keeper] | None) -> None:
        self.runs, self.keeper = runs, keeper

    @property
    def num_blocks(self) -> int:
        """Number of blocks."""
        return sum(len(run.blocks) for run in self.runs.values())

    def __call__(self, stream: Stream, rows: SequenceInfo, masks: DropoutMasks | None) -> Stream:
        """The stream after the last of them. Its own add must be closed."""
        assert stream.delta is None
        with Region(None if self.keeper is None else self.keeper()) as region:
            x_again = region.keep(stream.x)
            region.begin(lambda: self._run(Stream(x_again()), rows, masks))
            return self._run(stream, rows, masks)

    def _run(self, stream: Stream, rows: SequenceInfo, masks: DropoutMasks | None) -> Stream:
        start = min(self.runs)
        for first, run in self.runs.items():
            own = None if masks is None else masks.of_blocks(first - start, len(run.blocks))
            stream = run(stream, rows, own)
        return stream


class CompiledBlocks:
    """A model's blocks compiled, for training passes over batches of one shape: the first one's.

    Whatever else runs through the blocks (evaluation, generation, the smaller last batch) is left to them as they are,
    since each shape would be minutes of compiling.

    Args:
        runs: the blocks and spans as they run otherwise, by the number of their first block.
        add_norm: of the stream.
        per_graph: blocks in one graph, at most.
    """

    def __init__(self, recipe: ModelRecipe, runs: dict[int, Block | Span], add_norm: AddNorm, per_graph: int) -> None:
        self.runs: dict[int, BlockRun | CompiledSpan] = {}
        before_span = {first - 1 for first, run in runs.items() if isinstance(run, Span)}
        alone: dict[int, Block] = {}
        for first, run in [*runs.items(), (-1, None)]:
            if isinstance(run, Block):
                alone[first] = run
                if first not in before_span:
                    continue
            self.runs |= _compiled_runs(recipe, alone, add_norm if before_span & alone.keys() else None, per_graph)
            alone = {}
            if isinstance(run, Span):
                blocks = {first + i: block for i, block in enumerate(run.blocks)}
                self.runs[first] = CompiledSpan(_compiled_runs(recipe, blocks, add_norm, per_graph), run.keeper)
        self._shape: tuple[int, int] | None = None

    def serves(self, rows: SequenceInfo) -> bool:
        """Whether this pass is theirs; the first one in training decides on the shape."""
        if rows.cache is not None or not torch.is_grad_enabled():
            return False
        self._shape = self._shape or (rows.batch, rows.seq)
        return self._shape == (rows.batch, rows.seq)

    def __call__(self, stream: Stream, rows: SequenceInfo, masks: DropoutMasks | None) -> Stream:
        """The stream after the last block."""
        for first, run in self.runs.items():
            count = run.num_blocks if isinstance(run, CompiledSpan) else len(run.blocks)
            stream = run(stream, rows, None if masks is None else masks.of_blocks(first, count))
        return stream


def _compiled_runs(
    recipe: ModelRecipe, blocks: dict[int, Block], add_norm: AddNorm | None, per_graph: int
) -> dict[int, BlockRun]:
    """Consecutive blocks in graphs of equal ones, the last of which closes its add where ``add_norm`` is given."""
    found: dict[int, BlockRun] = {}
    for numbers in equal_runs(recipe, list(blocks), per_graph, lambda number: blocks[number].recomputes):
        closes = add_norm if numbers[-1] == max(blocks) else None
        found[numbers[0]] = run = BlockRun([blocks[number] for number in numbers], closes)
        run.compile(fullgraph=True, dynamic=False)
    return found


def num_kinds(recipe: ModelRecipe) -> int:
    """Number of different blocks in a model: each is code of its own."""
    return len({_wiring(recipe, block) for block in range(recipe.num_blocks)})


def equal_runs(
    recipe: ModelRecipe, blocks: Sequence[int], per_graph: int, also: Callable[[int], object] = lambda block: None
) -> list[list[int]]:
    """Consecutive equal blocks in lists of at most ``per_graph``, all of one length where that is possible.

    Args:
        also: what else of a block is compiled in.
    """
    found: list[list[int]] = []
    for _, group in groupby(blocks, key=lambda block: (_wiring(recipe, block), also(block))):
        same = list(group)
        lengths = range(min(per_graph, len(same)), max(1, per_graph // 2), -1)
        length = min(lengths, key=lambda n: -len(same) % n, default=per_graph)
        found += [same[i : i + length] for i in range(0, len(same), length)]
    return found


def _wiring(recipe: ModelRecipe, block: int) -> tuple[str, ...]:
    """What of the residual connections of a block is compiled in."""
    specs = (residual_at(recipe, block, kind) for kind in SUBLAYERS)
    return tuple(
        repr((s.norm_in, s.norm_in_scale, s.norm_inner, s.norm_branch, s.norm_out, s.alpha, s.gate)) for s in specs
    )


class Compiling(NamedTuple):
    """What ``train.compile`` has come to.

    Attributes:
        mode: none, blocks or cuda_graphs.
        why: in a few words.
        per_graph: blocks in one graph, at most; 0: each is compiled as it is, for FSDP2, whose hooks are between them.
        fused: ops whose reference the compiler fuses with what is around it, faster than a call of a kernel of ours.
    """

    mode: str
    why: str
    per_graph: int = 1
    fused: tuple[str, ...] = ()

    def choices(self, device_type: str) -> dict[str, str]:
        """Its line among those of the kernels; none where nobody has asked for anything."""
        silent = self.mode == "none" and self.why == "asked for"
        return {} if silent else {"compile": f"compile on {device_type}: {self.mode} ({self.why})"}


def resolve_compile_mode(
    setting: str, recipe: ModelRecipe, device_type: str, *, tp: int = 1, sharded: bool = False,
    opaque: str | None = None,
) -> Compiling:  # fmt: skip
    """What a setting of ``train.compile`` comes to.

    ``auto`` compiles on a CPU where that was measured to pay: narrow models whose blocks are of few kinds. On a GPU it
    takes compiled blocks, which were not measured there yet.

    Args:
        tp: ranks of tensor parallelism.
        sharded: whether FSDP2 or ZeRO-3 will shard the blocks.
        opaque: what no compiler sees through, as key=value; None where there is nothing.

    Raises:
        ConfigError: no code can be generated here, or not with this kernel.
    """
    cpu, why = device_type == "cpu", "asked for"
    if setting == "auto":
        kinds = num_kinds(recipe)
        reasons = {
            f"at model.dim={recipe.dim} products take nearly all the time": cpu and recipe.dim > WIDEST,
            "not measured with parallel.tp": tp > 1,
            "hooks that gather weights stand between the blocks": sharded,
            f"{opaque} cannot be compiled into a block": opaque is not None,
            f"its blocks are of {kinds} kinds, each of which would be compiled": kinds > MOST_KINDS,
        }
        against = next((reason for reason, holds in reasons.items() if holds), None) or _cannot_generate(device_type)
        if against is not None:
            return Compiling("none", f"auto: {against}")
        setting, why = "blocks", "auto: narrow, equal blocks on a CPU" if cpu else "auto on a GPU"
    if setting == "none":
        return Compiling("none", why)
    if opaque is not None:
        raise ConfigError(f"train.compile={setting}: {opaque} cannot be compiled into a block; use train.compile=none")
    if broken := _cannot_generate(device_type):
        raise ConfigError(f"train.compile={setting}: {broken}")
    fused = ("activation", "rotary") if not cpu else ("add_norm", "activation", "rotary") if tp == 1 else ()
    return Compiling(setting, why, 0 if sharded else BLOCKS_PER_GRAPH if cpu else 1, fused)


def _cannot_generate(device_type: str) -> str | None:
    """Why torch.compile can generate no code here; None where it can."""
    from torch._inductor.cpp_builder import get_cpp_compiler  # which imports much
    from torch._inductor.exc import InvalidCxxCompiler
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    try:
        folder = cache_dir()
        if not os.access(folder, os.W_OK):
            raise PermissionError(f"{folder} cannot be written")
    except OSError as e:
        return f"TORCHINDUCTOR_CACHE_DIR, where generated code is kept, cannot be used ({e})"
    try:
        if device_type == "cpu":
            get_cpp_compiler()
    except (InvalidCxxCompiler, OSError):
        return "no C++ compiler was found (CXX, or g++)"
    return None


def compile_blocks(model: "Transformer", compiling: Compiling) -> None:
    """torch.compile a model's blocks, equal ones with the same code.

    Raises:
        ConfigError: FSDP2 will shard them, and whole blocks are run again.
    """
    if compiling.mode == "none":
        return
    # Blocks may differ in a topology's constants: each then needs code of its own, and none may fall back silently.
    limits, wanted = torch._dynamo.config, 8 + 2 * model.recipe.num_blocks
    limits.recompile_limit = max(limits.recompile_limit, wanted)
    limits.accumulated_recompile_limit = max(limits.accumulated_recompile_limit, 8 * wanted)
    if compiling.per_graph:
        model.compiled = CompiledBlocks(model.recipe, model.runs, model.add_norm, compiling.per_graph)
        return
    if any(isinstance(run, Span) for run in model.runs.values()):
        raise ConfigError(
            "train.compile=blocks with parallel.dp_shard: whole blocks are run again around FSDP2's hooks; use "
            "recompute.policy=branch, or train.compile=none"
        )
    for block in model.blocks.values():
        block.compile()
