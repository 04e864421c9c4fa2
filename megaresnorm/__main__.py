"""``python -m megaresnorm`` is the megaresnorm command."""

import sys

if __name__ == "__main__":
    try:
        from megaresnorm.cli import main
    except KeyboardInterrupt:  # while it is being imported
        sys.stderr.write("megaresnorm: stopped\n")
        sys.exit(130)
    sys.exit(main())
