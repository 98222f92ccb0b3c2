"""Whether a response commits what its request has written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

VETO_HEADER = "x-tm"
"""The response header by which a route decides itself. pyramid_tm knows it, too."""


class CommitRule(Protocol):
    """Decides whether a response commits. The names of the headers are in lower case."""

    def __call__(self, status: int, headers: Mapping[str, str], exception: BaseException | None, /) -> bool: ...


def commit_rule(status: int, headers: Mapping[str, str], exception: BaseException | None = None) -> bool:
    """Return whether a response commits: below 400 it does. The header `X-Tm: commit` or `X-Tm: abort` wins.

    `exception` is the error that the response stands for, if the framework tells it.

    >>> from app_db.integrations import commit_rule
    >>> commit_rule(201, {})
    True
    >>> commit_rule(409, {})
    False
    >>> commit_rule(409, {"x-tm": "commit"})
    True
    """
    word = headers.get(VETO_HEADER, "").strip().lower()
    if word in ("commit", "abort"):
        return word == "commit"
    return status < 400
