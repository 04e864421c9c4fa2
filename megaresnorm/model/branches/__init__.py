"""The branches F that a residual connection goes around. Each computes, and describes its parameters and its cost."""

from megaresnorm.model.branches.attention import Attention
from megaresnorm.model.branches.branch import Branch
from megaresnorm.model.branches.ffn import FeedForward

__all__ = ["BRANCHES", "Attention", "Branch", "FeedForward"]

BRANCHES: dict[str, type[Branch]] = {"attention": Attention, "ffn": FeedForward}
