"""Whether a model of the Hugging Face hub can be had here, told in seconds: its own client tries for a minute."""

from __future__ import annotations

import os
import threading

SECONDS = 3.0


def out_of_reach(model: str) -> str:
    """Why this hub id can be loaded neither from the local cache nor from the hub; empty where one of them may have it."""
    if _is_cached(model):
        return ""
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        return "it is not in the local cache, and HF_HUB_OFFLINE is set"
    address = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    return "" if _answers(address) else f"it is not in the local cache, and {address} cannot be reached from here"


def _is_cached(model: str) -> bool:
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError:
        return False
    return isinstance(try_to_load_from_cache(model, "config.json"), str)


def _answers(address: str) -> bool:
    """Any answer will do, also by way of a proxy. In a thread of its own: the resolver has no time-out that could be set."""
    answered = threading.Event()

    def ask() -> None:
        import ssl
        import urllib.error
        import urllib.request

        try:
            urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=SECONDS).close()
        except urllib.error.HTTPError:
            answered.set()
        except urllib.error.URLError as error:
            if isinstance(error.reason, ssl.SSLError):  # the hub's client has certificates of its own
                answered.set()
        except (OSError, ValueError):
            pass
        else:
            answered.set()

    threading.Thread(target=ask, daemon=True).start()
    return answered.wait(SECONDS)
