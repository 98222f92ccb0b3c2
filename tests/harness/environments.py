"""The environment of tests."""

from __future__ import annotations

import os

import pytest


def forget_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget the developer's settings, and the variables that say how tests are run, which look like settings."""
    for variable in list(os.environ):
        if variable.upper().startswith("APP_DB_") or variable.upper() == "DATABASE_URL":
            monkeypatch.delenv(variable)
