"""The search: a covering sweep first, then Hypothesis, then the smallest case."""
