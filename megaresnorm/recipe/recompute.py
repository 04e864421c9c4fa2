"""Settings of recomputation: what backward makes again, so that less is kept until then."""

from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError
from typing_extensions import Self

from megaresnorm.limits import MAX_BLOCKS
from megaresnorm.reading import bytes_of_size
from megaresnorm.recipe.section import Blocks, BlocksOr0, Section, refuse_ignored

BlockPolicy = Literal["none", "norm", "attention", "ffn", "branch", "block"]
Policy = Literal["none", "norm", "attention", "ffn", "branch", "block", "every", "auto"]
SHARE = 0.9  # of the memory that ``auto`` may use where no budget is given


def _budget(value: Any) -> float | int | str:
    """A size as text or a whole number of bytes, or a share of the memory; as it was given."""
    wanted = "a size such as 20GiB, or a share of the device's memory above 0 and at most 1, such as 0.9"
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise PydanticCustomError("budget", wanted)
    try:
        usable = bytes_of_size(value) > 0 if isinstance(value, str) else 0 < value <= 1 or isinstance(value, int)
    except ValueError:
        usable = False
    if not usable or (not isinstance(value, str) and not 0 < value < 2**60):
        raise PydanticCustomError("budget", wanted)
    return value


_BUDGET_SCHEMA = {"anyOf": [{"type": "string"}, {"type": "number", "exclusiveMinimum": 0}]}
Budget = Annotated[Any, PlainValidator(_budget), WithJsonSchema(_BUDGET_SCHEMA)]


class RecomputeBlocks(Section):
    """Consecutive blocks with a policy of their own."""

    first: BlocksOr0
    """Global number of the first of them, from 0."""
    last: BlocksOr0
    """Global number of the last of them."""
    policy: BlockPolicy
    """As recompute.policy, for these blocks."""

    @model_validator(mode="after")
    def _is_a_range(self) -> Self:
        if self.first > self.last:
            raise ValueError(
                f"recompute.blocks: first={self.first} is after last={self.last}; blocks are numbered from 0"
            )
        return self


class RecomputeRecipe(Section):
    """What backward makes again, to keep less until then; the numbers stay the same to the bit."""

    policy: Policy = "none"
    """What is dropped after forward and made again in backward. norm: inputs of branches and of the last matrix of an
    FFN, which one cheap kernel makes of what is kept; attention, ffn, branch: all inside the attention branch, the FFN
    branch or both; block: all but one tensor of each block; every: all but one tensor of ``every`` blocks; auto: as
    little as ``budget`` allows, chosen block by block. ``recompute: block`` is short for this key."""
    every: Blocks | None = None
    """policy every: blocks that keep one tensor together."""
    budget: Budget | None = None
    """policy auto: memory that a rank may use in all, as 20GiB or as a share of its device's, as 0.9; unset: 0.9."""
    gathered: Literal["again", "keep"] = "again"
    """tensor_layout tokens or columns: gather a branch's input again in backward, so that a rank keeps its share of the
    rows, or keep whole rows: tp times the memory for branch inputs, one message less. Blocks that are compiled keep
    them under columns, gather."""
    offload: bool = False
    """policy block or every: keep the tensors between blocks in host memory instead of the device's, copied beside the
    computation."""
    blocks: Annotated[list[RecomputeBlocks], Field(max_length=MAX_BLOCKS)] = []
    """Ranges of blocks with another policy than ``policy``, which has the rest."""

    @model_validator(mode="before")
    @classmethod
    def _short(cls, values: Any) -> Any:
        return {"policy": values} if isinstance(values, str) else values

    @model_validator(mode="after")
    def _nothing_is_ignored(self) -> Self:
        why = f"recompute.policy={self.policy}"
        if self.policy != "every":
            refuse_ignored(self, "recompute", why, "every")
        elif self.every is None:
            raise ValueError(
                "recompute.policy=every needs recompute.every, the blocks that keep one tensor together; the least "
                "memory is at about the square root of model.num_blocks"
            )
        if self.policy != "auto":
            refuse_ignored(self, "recompute", why, "budget")
        policies = self.policies
        if self.offload and not policies & {"block", "every"}:
            raise ValueError(
                f"recompute.offload=true has no effect with {why}, which keeps no tensor between blocks alone; use "
                "policy block or every"
            )
        if policies <= {"block", "every"}:
            refuse_ignored(self, "recompute", why, "gathered")
        if self.blocks and self.policy == "auto":
            raise ValueError("recompute.blocks does not go with recompute.policy=auto, which chooses for every block")
        ordered = sorted(self.blocks, key=lambda some: some.first)
        for one, following in pairwise(ordered):
            if following.first <= one.last:
                raise ValueError(
                    f"recompute.blocks: {one.first}-{one.last} and {following.first}-{following.last} overlap; each "
                    "block can have one policy"
                )
        return self

    @property
    def policies(self) -> set[str]:
        """Every policy that is named."""
        return {self.policy, *(some.policy for some in self.blocks)}
