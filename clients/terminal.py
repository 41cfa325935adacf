"""What goes to a terminal, or to the pipe or file in its place."""

from __future__ import annotations

from rich.console import Console


def printable(text: str) -> str:
    """`text` without the control characters that could steer a terminal; tabs and line ends stay."""
    return "".join(c if c in "\n\t" or c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def console(*, stderr: bool = False) -> Console:
    """Standard output or standard error, without markup. A terminal wraps long lines itself; a pipe or a file gets them
    whole, and tables as wide as they are."""
    made = Console(stderr=stderr, highlight=False, markup=False, soft_wrap=True)
    if not made.is_terminal:
        made.width = 10_000
    return made
