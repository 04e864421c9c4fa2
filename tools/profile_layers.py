#!/usr/bin/env python3
"""The same as ``megaresnorm profile``, for those who look for it here."""

import sys

from megaresnorm.cli import main

if __name__ == "__main__":
    sys.exit(main(["profile", *sys.argv[1:]]))
