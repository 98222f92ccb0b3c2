"""How the shop writes to its customers. This one keeps the letters; one of yours would send them."""

from __future__ import annotations

sent: list[tuple[str, str]] = []


def send(customer: str, text: str) -> None:
    """Send a letter."""
    sent.append((customer, text))
