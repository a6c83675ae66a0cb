"""One rank: joins its group, then answers requests until nobody asks any more."""

import ctypes
import os
import signal
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any, NoReturn

_PR_SET_PDEATHSIG = 1


def serve(rank: int, connection: Connection, target: Callable[..., Any], words: dict[str, Any]) -> NoReturn:
    """The first request is the arguments of ``target``; its answer is None."""
    code = 1
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # with the launcher, however that ends
        world_size = len(words["ranks"])
        _answer(connection, lambda args: _started(rank, world_size, target, words, args))
        while True:
            _answer(connection, _handler[0])
    except EOFError:
        code = 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # not by way of the launcher's frames


_handler: list[Callable[[Any], Any]] = []


def _started(rank: int, world_size: int, target: Callable[..., Any], words: dict[str, Any], args: tuple[Any, ...]) -> None:
    _join(rank, world_size, words)
    _handler.append(target(rank, world_size, *args))


def _join(rank: int, world_size: int, words: dict[str, Any]) -> None:
    import torch
    from torch import distributed

    on_gpus = words["device"] == "cuda"
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the host's name need not be known to any resolver
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")  # multicast adds on its way through the switch
    torch.set_num_threads(max(1, torch.get_num_threads() // world_size))
    if on_gpus:
        torch.cuda.set_device(rank)
    distributed.init_process_group(
        "nccl" if on_gpus else "gloo",
        store=torch._C._distributed_c10d.FileStore(words["store"], world_size),
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=words["seconds"]),
    )


def _answer(connection: Connection, handle: Callable[[Any], Any]) -> None:
    request = connection.recv()
    try:
        answer = "done", handle(request)
    except Exception as error:
        where = "".join(traceback.format_exception(error)[-_FRAMES:])
        answer = "error", (type(error).__name__, str(error), where)
    connection.send(answer)


_FRAMES = 4
