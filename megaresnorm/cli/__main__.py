"""python -m megaresnorm.cli"""

import sys

from megaresnorm.cli import main

sys.exit(main())
