"""What a fixture gives in `make test`, and what only in `make test-all`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def mostly(values: Iterable[str], *, exhaustive: str) -> list[Any]:
    """Return the parameters of a fixture. With the one called `exhaustive`, tests run in `make test-all` alone."""
    return [pytest.param(value, marks=pytest.mark.exhaustive) if value == exhaustive else value for value in values]
