#!/usr/bin/env python3
"""The same as ``megaresnorm convert to-hf``, for those who look for it here."""

import sys

from megaresnorm.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", "to-hf", *sys.argv[1:]]))
