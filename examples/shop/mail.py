"""How the shop writes to its customers. This one keeps the letters, and logs them; one of yours would send them."""

from __future__ import annotations

import logging

sent: list[tuple[str, str]] = []

_log = logging.getLogger(__name__)


def send(customer: str, text: str) -> None:
    """Send a letter."""
    sent.append((customer, text))
    _log.info("A letter to %s: %s", customer, text)
