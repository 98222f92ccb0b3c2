"""Phrases that several errors and reports use."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ` Did you mean 'x'?` if a known name is close to `name`, and an empty string otherwise."""
    close = get_close_matches(name, list(known), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def in_one_line(error: BaseException) -> str:
    """Return an error in one line: its class, and the first line of the driver's or system's message."""
    cause = getattr(error, "orig", None) or error
    return f"{type(cause).__name__}: {str(cause).strip().partition(chr(10))[0].rstrip('.')}"
