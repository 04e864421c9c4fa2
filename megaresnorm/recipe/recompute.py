"""Settings of recomputation: what backward makes again, so that less is kept until then."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, PlainValidator, WithJsonSchema, model_validator
from pydantic_core import PydanticCustomError
from typing_extensions import Self

from megaresnorm.limits import MAX_BLOCKS
from megaresnorm.reading import bytes_of_size
from megaresnorm.recipe.section import Blocks, BlocksOr0, Section

SHARE = 0.9  # of the memory that ``auto`` may use where no budget is given
LEAST_BUDGET = 1 << 20  # bytes; a smaller number was meant as something else
_BLOCK_POLICIES = Literal["none", "norm", "attention", "ffn", "branch", "block"]
_POLICIES = Literal["none", "norm", "attention", "ffn", "branch", "block", "every", "auto"]
_MEANT = (  # what others say, and our policy for it
    ({"full", "true", "yes", "on", "all", "layer", "layers"}, "block (all but one tensor of each block)"),
    ({"selective", "op", "ops"}, "norm (what is cheap), or attention or ffn (all inside a branch)"),
    ({"layernorm", "rmsnorm", "norms"}, "norm"),
    ({"attn", "core_attn", "self_attn"}, "attention"),
    ({"mlp", "feed_forward", "moe"}, "ffn"),
    ({"uniform"}, "every, with recompute.every"),
    ({"memory_budget", "budget"}, "auto, with recompute.budget"),
    ({"false", "no", "off", "null"}, "none"),
)


def _meant(value: Any) -> str:
    """'; did you mean X?' for what others say in the place of a policy, or nothing."""
    word = "null" if value is None else str(value).strip().lower() if isinstance(value, str | bool) else ""
    return next((f"; did you mean {ours}?" for words, ours in _MEANT if word in words), "")


def _one_of(policies: Sequence[str]) -> BeforeValidator:
    def check(value: Any) -> Any:
        wanted = f"one of {', '.join(policies)}"
        if value in ("every", "auto") and value not in policies:
            raise PydanticCustomError("policy", f"{wanted}; every and auto are for recompute.policy alone")
        if value not in policies and (meant := _meant(value)):
            raise PydanticCustomError("policy", f"{wanted}{meant}")
        return value

    return BeforeValidator(check)


BlockPolicy = Annotated[_BLOCK_POLICIES, _one_of(get_args(_BLOCK_POLICIES))]
Policy = Annotated[_POLICIES, _one_of(get_args(_POLICIES))]


def _budget(value: Any) -> float | int | str:
    """A size as text or a whole number of bytes, or a share of the memory; as it was given."""
    wanted = "a size such as 20GiB, or a share of the device's memory above 0 and at most 1, such as 0.9"
    try:
        size = bytes_of_size(value) if isinstance(value, str) else value
    except ValueError:
        raise PydanticCustomError("budget", wanted) from None
    if isinstance(size, float) and 0 < size <= 1:
        return value
    if isinstance(size, bool) or not isinstance(size, int) or not 0 < size < 2**60:
        raise PydanticCustomError("budget", wanted)
    if size < LEAST_BUDGET:
        meant = f"; did you mean {'1.0' if size == 1 else f'{size}GiB'}?" if size < 1000 else ""
        raise PydanticCustomError("budget", f"{wanted}; a number without unit is in bytes, at least 1MiB{meant}")
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
                f"recompute.blocks: first={self.first} is after last={self.last}; give the smaller number first"
            )
        return self


def _ranges(value: Any) -> Any:
    if isinstance(value, list) and all(isinstance(one, dict | RecomputeBlocks) for one in value):
        return value
    raise PydanticCustomError("ranges", "a list of ranges, as in '[{first: 0, last: 9, policy: block}]'")


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
    blocks: Annotated[list[RecomputeBlocks], BeforeValidator(_ranges), Field(max_length=MAX_BLOCKS)] = []
    """Ranges of blocks with another policy than ``policy``, which has the rest."""

    @model_validator(mode="before")
    @classmethod
    def _short(cls, values: Any) -> Any:
        if isinstance(values, dict | RecomputeRecipe):
            return values
        if isinstance(values, str):
            return {"policy": values}
        wanted, meant = f"a policy, one of {', '.join(get_args(_POLICIES))}, or a section with keys", _meant(values)
        if isinstance(values, int) and not isinstance(values, bool) and 1 <= values <= MAX_BLOCKS:
            meant = f"; did you mean '{{policy: every, every: {values}}}'?"
        elif isinstance(values, float) and 0 < values <= 1:
            meant = f"; did you mean '{{policy: auto, budget: {values}}}'?"
        raise PydanticCustomError("recompute", wanted + meant)

    @model_validator(mode="after")
    def _nothing_is_ignored(self) -> Self:
        why = f"recompute.policy={self.policy}"
        for key, policy in (("every", "every"), ("budget", "auto")):
            value = getattr(self, key)
            if value is not None and self.policy != policy:
                raise ValueError(
                    f"recompute.{key}={value} has no effect with {why}; use policy {policy}, or recompute.{key}=null"
                )
        if self.policy == "every" and self.every is None:
            raise ValueError(
                "recompute.policy=every needs recompute.every, the blocks that keep one tensor together; the least "
                "memory is at about a quarter of the square root of model.num_blocks"
            )
        policies = self.policies
        if self.offload and not policies & {"block", "every"}:
            raise ValueError(
                f"recompute.offload=true has no effect with {why}: it moves the tensors between blocks of policy "
                "block or every; use one of these"
            )
        if policies <= {"block", "every"} and self.gathered == "keep":
            raise ValueError(
                f"recompute.gathered=keep does not go with {why}: whole rows would be a second tensor beside the one "
                "that is kept; use gathered again"
            )
        return self

    @model_validator(mode="after")
    def _blocks_have_one_policy(self) -> Self:
        if self.blocks and self.policy == "auto":
            raise ValueError(
                "recompute.blocks does not go with recompute.policy=auto, which chooses for every block; remove one"
            )
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
