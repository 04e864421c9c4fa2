"""What several tests here share lies beside them (cases.py) and among the tools (bench_parallel.py)."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2] / "tools")]
