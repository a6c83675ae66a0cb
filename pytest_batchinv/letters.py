"""The relations by letter, in words: for options and reports, which import no torch and so no relation."""

WORDS = {
    "R": "run to run",
    "S": "other content beside it",
    "I": "alone == in a batch",
    "L": "in any layout",
    "C": "whole == in chunks",
    "D": "whole == decoded",
    "G": "gradients alone == in a batch",
    "X": "eager == compiled",
}
