"""The model and batches of tests/parallel are these tests', too."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "parallel"))
