"""``python -m kbitc``."""

from kbitc.cli import main

if __name__ == "__main__":
    main()
