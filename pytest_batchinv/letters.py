"""The relations by letter, in words: for options and reports, which import no torch and so no relation."""

from collections.abc import Iterable

WORDS = {
    "R": "run to run",
    "S": "other content beside it",
    "I": "alone == in a batch",
    "L": "in any layout",
    "C": "whole == in chunks",
    "D": "whole == decoded",
    "G": "gradients alone == in a batch",
    "T": "on any number of ranks",
    "X": "eager == compiled",
}


def in_order(letters: Iterable[str]) -> list[str]:
    """Ours in the order in which they are checked, then those of other packages and of later versions."""
    asked = set(letters)
    return [*(letter for letter in WORDS if letter in asked), *sorted(asked - WORDS.keys())]


def titled(letter: str) -> str:
    """ "I alone == in a batch"; of a relation of another package its letter alone."""
    return f"{letter} {WORDS.get(letter, '')}".strip()
