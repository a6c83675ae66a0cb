"""The address of a server, and where its key is: read before anything is asked of it."""

from __future__ import annotations

import os
from urllib.parse import urlsplit

KEY = "BATCHINV_API_KEY"
"""The environment variable that holds the server's key, and the only place where one is looked for."""


def checked_url(url: str) -> str:
    """The address without a last slash; with "/v1" where it has no path. Raises ValueError for what is no plain address."""
    try:
        parts = urlsplit(url)
        is_one = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0 and url.isprintable()
    except ValueError:  # its words may hold what stands before an @
        is_one = False
    if not is_one:
        raise ValueError("the address of a server is like http://localhost:8000/v1")
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        raise ValueError(f"an address holds no user, key or query, for it is printed; put the key into the variable {KEY}")
    return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/') or '/v1'}"


def key() -> str:
    """The key; empty where there is none. Raises ValueError for what cannot be one."""
    given = os.environ.get(KEY, "")
    if given and (not given.isascii() or not given.isprintable() or " " in given):
        raise ValueError(f"the variable {KEY} holds no key: spaces, control or other characters are in it")
    return given
