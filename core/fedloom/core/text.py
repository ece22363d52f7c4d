r"""What a peer says, made harmless for whoever reads it: the one place that does it.

A coordinator's error, a client's name or its reason for leaving ends up in a log, on a terminal or on a page. There a
newline begins a line that nobody has written, an escape moves the cursor or clears the screen, and a bidirectional
override makes text read as another. None of that is printable in Unicode's sense, and what is not printable is shown
by its code. It is done twice: where a peer's text comes in, since it may leave again through another program's log,
and where a log or a terminal is written, since something may have come in by another way.

>>> clean("done\n2030-01-01 WARNING \x1b[2Jforged \u202egpj.exe")
'done\\n2030-01-01 WARNING \\x1b[2Jforged \\u202egpj.exe'
"""

__all__ = ["MOST_LETTERS", "clean", "clean_lines"]

MOST_LETTERS = 2000
"""Longest text of a peer that is shown."""


def clean(text: str, most: int | None = MOST_LETTERS) -> str:
    """One line of printable letters.

    Args:
        text: From anybody.
        most: Letters that are kept of it; None keeps all.
    """
    cut = most is not None and len(text) > most
    shown = text[:most] if cut else text
    if not shown.isprintable():
        shown = "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in shown)
    return f"{shown}…" if cut else shown


def clean_lines(text: str) -> str:
    """The same for a text that has lines of its own, such as a traceback or a report."""
    return "\n".join(clean(line, None) for line in text.split("\n"))
