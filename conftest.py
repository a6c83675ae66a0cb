"""Keeps the checkout root off ``sys.path``: a bare ``kernels`` there is taken for the Hugging Face package of that name."""

import sys
from pathlib import Path

_ROOT = Path(__file__).parent
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != _ROOT]

pytest_plugins = ["pytester"]
