"""The program: `heliograph`, or `python -m heliograph`."""

import sys


def main() -> None:
    """Runs the command line; Ctrl-C ends it quietly even while that is being imported."""
    try:
        from heliograph.cli import main as run

        run()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
