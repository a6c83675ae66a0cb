"""torch's global flags in the mode, each restored to what it was.

float32 means IEEE float32, what is left to cuBLAS is deterministic, and what would take the place of operators that the table
covers is off: cuDNN, oneDNN, and the fused fast path of ``nn.TransformerEncoderLayer`` and ``nn.MultiheadAttention``.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

Setting = tuple[str, str]  # backend, operator
# A setting that is "none" takes its parent's value, and reads as that.
_PARENTS: tuple[Setting, ...] = (("generic", "all"), ("cuda", "all"), ("mkldnn", "all"))
_CHILDREN: tuple[Setting, ...] = tuple((backend, op) for backend in ("cuda", "mkldnn") for op in ("matmul", "conv", "rnn"))


@contextlib.contextmanager
def in_force() -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        stack.enter_context(_ieee_float32())
        for read, write, value in _flags():
            stack.callback(write, read())
            write(value)
        yield


def _flags() -> Iterator[tuple[Callable[[], Any], Callable[[Any], None], Any]]:
    """How to read each flag, how to write it, and its value in the mode.

    By the functions behind the properties of ``torch.backends``, which ``torch.backends.disable_global_flags`` freezes:
    torch's own test utilities call it when they are imported.
    """
    c, mha = torch._C, torch.backends.mha
    yield c._get_cudnn_benchmark, c._set_cudnn_benchmark, False
    yield c._get_cudnn_deterministic, c._set_cudnn_deterministic, True
    yield c._get_cudnn_enabled, c._set_cudnn_enabled, False
    yield c._get_mkldnn_enabled, c._set_mkldnn_enabled, False
    yield mha.get_fastpath_enabled, mha.set_fastpath_enabled, False
    for name in ("allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction", "allow_fp16_accumulation"):
        yield _reader(name), _writer(name), False


def _reader(name: str) -> Callable[[], Any]:
    matmul = torch.backends.cuda.matmul

    def read() -> Any:
        value, split_k = getattr(matmul, name), getattr(matmul, f"{name}_split_k", None)
        return value if split_k is None else (value, split_k)

    return read


def _writer(name: str) -> Callable[[Any], None]:
    return lambda value: setattr(torch.backends.cuda.matmul, name, value)


@contextlib.contextmanager
def _ieee_float32() -> Iterator[None]:
    """Every float32 precision is "ieee": torch's settings, and the two older flags that stand beside them.

    Where those disagree with the settings, reading ``cudnn.allow_tf32`` or ``get_float32_matmul_precision`` is an error,
    and ``torch.export`` reads them.
    """
    read, write = torch._C._get_fp32_precision_getter, torch._C._set_fp32_precision_setter
    before: dict[Setting, str] = {}
    for setting in _PARENTS:
        before[setting] = read(*setting)
        write(*setting, "none")  # so that its children read as what they are themselves
    for setting in _CHILDREN:
        before[setting] = read(*setting)
        write(*setting, "ieee")
    matmul, cudnn = torch.get_float32_matmul_precision(), _cudnn_allows_tf32()
    try:
        _write_older_flags("highest", False)
        for setting in before:
            write(*setting, "ieee")
        yield
    finally:
        _write_older_flags(matmul, cudnn)  # which writes settings too
        for setting, value in before.items():
            write(*setting, value)


def _write_older_flags(matmul: str, cudnn: bool) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Please use the new API settings")
        torch.set_float32_matmul_precision(matmul)
        torch._C._set_cudnn_allow_tf32(cudnn)


def _cudnn_allows_tf32() -> bool:
    """cuDNN's older flag. It cannot be read where it disagrees with the settings, which are "ieee" now."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Please use the new API settings")
            return bool(torch._C._get_cudnn_allow_tf32())
    except RuntimeError:
        return True
