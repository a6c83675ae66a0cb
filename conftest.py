"""Keeps the checkout root off ``sys.path``: a bare ``kernels`` there is taken for the Hugging Face package of that name."""

import signal
import sys
from pathlib import Path

_ROOT = Path(__file__).parent
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != _ROOT]

# A shell starts what runs in its background with Ctrl-C ignored, and children inherit that: tests of interrupts would see none.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

pytest_plugins = ["pytester"]
