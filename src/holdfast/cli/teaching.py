"""What the help says beyond the options: examples, exit codes, the rules of retention."""

from __future__ import annotations

from collections.abc import Mapping

from holdfast.cli.exits import CODES

__all__ = ["HELP", "epilog", "rules"]

HELP = """
Look at training runs, check and mend them, copy them, prune them, and take weights out of them.

A RUN is a directory or URL (s3://, gs://, az://) where a Checkpointer or holdfast.save wrote, or a mirror of
one. RUN@STEP and RUN@TAG name one of its checkpoints; RUN alone means the newest.
"""

_EXAMPLES = {
    "holdfast ls runs/": "the runs below a directory",
    "holdfast show runs/digits@best": "what is in a checkpoint",
    "holdfast diff runs/digits 100 200": "what changed in between",
    "holdfast verify runs/digits": "read every byte",
    "holdfast scrub s3://bucket/digits --rate 50MB": "read again what was proven longest ago",
    "holdfast repair runs/digits --from s3://bucket/digits": "mend it from a copy",
    "holdfast undo runs/digits 200": "bring back what was deleted",
    "holdfast plan runs/digits --hours 72": "what saving and keeping would cost",
    "holdfast prune runs/digits --keep 'last(3)' -n": "what would go",
}
_RULES = {
    "last(3)": "the newest three",
    'best("val_loss", mode="min", k=2)': "the two best",
    "every(steps=1000)": "one per interval; also epochs=, hours=, ...",
    "within(days=7)": "those of the last week before the newest",
    "thin(hourly=24, daily=7)": "fewer with age",
    'tagged("release-*")': "by tag",
    "demote(every(steps=100))": "the weights alone",
    'limit("200GB")': "a cap on what the others keep",
}


def epilog() -> str:
    """Return examples and exit codes."""
    codes = {str(code): meaning for code, meaning in CODES.items()}
    return _listing("Examples", _EXAMPLES) + "\n\n" + _listing("Exit codes", codes)


def rules() -> str:
    """Return what a rule may be made of."""
    return _listing("Rules, joined with |, & and ~", _RULES)


def _listing(title: str, rows: Mapping[str, str]) -> str:
    """Return two columns; the \\b in front keeps the help from filling the lines anew."""
    width = max(map(len, rows)) + 2
    return f"\b\n{title}:\n" + "\n".join(f"  {left.ljust(width)}{right}" for left, right in rows.items())
