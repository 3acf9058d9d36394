"""Floor 6: the command line. One file per verb; each parses, calls and prints, without logic of its own."""

from holdfast.cli.app import main

__all__ = ["main"]
