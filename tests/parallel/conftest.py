"""What several tests here share lies beside them (cases.py), in resilience (launched.py) and among the tools (ranks.py)."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "resilience"), str(HERE.parents[1] / "tools")]
