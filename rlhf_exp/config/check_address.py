"""Rules for a service behind an address."""

from __future__ import annotations

import os
from urllib.parse import urlsplit

from rlhf_exp.config.problems import Findings


def check_address(found: Findings, section: str, example: str) -> None:
    """Report an address or a key that cannot be used; nobody is asked.

    Args:
        found: Collects the problems.
        section: Has the fields `url` and `key_env`.
        example: A valid address.
    """
    key = f"{section}.url"
    try:
        url = urlsplit(found.value(key) or "")
        whole = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:  # a port that is no number
        found.add(key, f"needs an address such as {example}.")
        return
    found.unless(whole, key, f"needs an address such as {example}.")
    if url.username or url.password:
        found.add(key, f"must not hold a password; see {section}.key_env.")
    name = found.value(f"{section}.key_env")
    if name is not None and not os.environ.get(name) and not found.config.plan:
        message = "no such environment variable is set, or it is empty."
        found.add(f"{section}.key_env", message)
