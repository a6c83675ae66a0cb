"""Whether a model of the Hugging Face hub can be had here, told in seconds: its own client tries for a minute."""

from __future__ import annotations

import os
import socket
import threading
from urllib.parse import urlsplit

SECONDS = 3.0


def out_of_reach(model: str) -> str:
    """Why this hub id can be loaded neither from the local cache nor from the hub; empty where one of them may have it."""
    if _is_cached(model):
        return ""
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        return "it is not in the local cache, and HF_HUB_OFFLINE is set"
    address = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    host, port = address.hostname or "huggingface.co", address.port or 443
    if _proxy_is_set() or _answers(host, port):
        return ""
    return f"it is not in the local cache, and {host} cannot be reached from here"


def _is_cached(model: str) -> bool:
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError:
        return False
    return isinstance(try_to_load_from_cache(model, "config.json"), str)


def _proxy_is_set() -> bool:
    return any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"))


def _answers(host: str, port: int) -> bool:
    """In a thread of its own: the resolver has no time-out that could be set."""
    answered = threading.Event()

    def connect() -> None:
        try:
            socket.create_connection((host, port), timeout=SECONDS).close()
            answered.set()
        except OSError:
            pass

    threading.Thread(target=connect, daemon=True).start()
    return answered.wait(SECONDS)
