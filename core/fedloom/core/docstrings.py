"""What a Google-style docstring says: its summary, its text and its arguments."""

import re

__all__ = ["arguments", "prose", "summary"]


def summary(text: str) -> str:
    """The first line."""
    return text.strip().partition("\n")[0]


def prose(text: str) -> str:
    """All that comes before the parts called "Args:" and "Raises:"."""
    return re.split(r"\n\s*(?:Args|Raises):\n", text)[0].strip()


def arguments(text: str) -> dict[str, str]:
    """What the "Args:" part says of each argument, each in one line."""
    _, _, part = text.partition("\nArgs:\n")
    part = re.split(r"\n\S", part)[0]
    return {name: " ".join(about.split()) for name, about in re.findall(r"^    (\w+): (.*(?:\n {5,}.*)*)", part, re.M)}
