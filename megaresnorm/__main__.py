"""python -m megaresnorm"""

import sys

from megaresnorm.cli import main

sys.exit(main())
