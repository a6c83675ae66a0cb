"""Compiled code of which no kernel can be watched: torch's own bisection, which compiles the graph again and again in parts.

torch turns one part of the compiler off at a time (decompositions, passes, lowerings), and halves the number of what that part
does until the bits part. Source: ``torch._inductor.compiler_bisector``.
"""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Callable

import torch
from torch._inductor.compiler_bisector import CompilerBisector

from pytest_batchinv.subjects.base import Subject
from pytest_batchinv.subjects.compiled import COMPILE_MODES

SECONDS = 90.0


class _TooLong(Exception):
    pass


def told(subject: Subject, holds: Callable[[Subject], bool]) -> str:
    """Which part of the compiler parts the bits, as a sentence. holds: whether they are equal in a subject compiled anew.

    Drops Dynamo's compiled code, that of other subjects, too: the bisector is asked when code is compiled, and never later.
    """
    if not hasattr(subject, "in_compile_mode") or subject.info.compile_mode not in COMPILE_MODES:
        return "it cannot be bisected: only what is compiled by its compile mode can be compiled again in parts"
    deadline = time.monotonic() + SECONDS

    def is_equal() -> bool:
        if time.monotonic() > deadline:
            raise _TooLong
        torch._dynamo.reset()
        return holds(subject.in_eager_mode().in_compile_mode(subject.info.compile_mode))  # type: ignore[attr-defined]

    log = io.StringIO()
    try:
        with contextlib.redirect_stdout(log):
            found = CompilerBisector.do_bisect(is_equal)
    except _TooLong:
        last = (log.getvalue().strip().splitlines() or [""])[-1]
        return f"bisection took longer than {SECONDS:.0f} s; it had come to: {last}"
    except Exception as error:  # of the subject, compiled in a part of the compiler that no one compiles it in
        return f"bisection failed: {type(error).__name__}: {error}"
    finally:
        torch._dynamo.reset()
    if found is None:
        return "bisection: compiled again, it gives equal bits"
    where = f"bisection: the bits part with torch's backend {found.backend!r}"
    if found.subsystem is None:
        return f"{where}, whichever of its parts is turned off"
    if not found.bisect_number:
        return f"{where}, and not where its {found.subsystem} is turned over"
    return f"{where}, at number {found.bisect_number} of its {found.subsystem}: {found.debug_info or 'not named'}"
