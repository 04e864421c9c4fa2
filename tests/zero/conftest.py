"""The model, its batches and its layouts are those of tests/parallel."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1] / "parallel")]
