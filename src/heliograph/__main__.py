"""`python -m heliograph`."""

from heliograph.cli import main

if __name__ == "__main__":
    main()
