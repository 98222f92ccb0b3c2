"""What a fixture gives in `make test`, and what only in `make test-all`."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import pytest


def turns(number: int) -> int:
    """Return how often a test does what `make soak` does so many times: `make test-all` does a tenth."""
    return number if os.environ.get("SOAK_WHOLE") else max(number // 10, 1)


def mostly(values: Iterable[str], *, exhaustive: str) -> list[Any]:
    """Return the parameters of a fixture. With the one called `exhaustive`, tests run in `make test-all` alone."""
    return [pytest.param(value, marks=pytest.mark.exhaustive) if value == exhaustive else value for value in values]
