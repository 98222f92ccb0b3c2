"""What app_db knows of modules that are being imported."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

import pytest

from app_db._compat.importing import is_being_imported

ASKS = """
from app_db._compat.importing import is_being_imported

told = is_being_imported(__name__), is_being_imported(f"{__name__}.below")
"""


def test_a_module_is_being_imported_until_its_code_has_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it, a record that is logged meanwhile would have a container be looked for that is not there yet."""
    (tmp_path / "asks_while_imported.py").write_text(ASKS)
    monkeypatch.syspath_prepend(tmp_path)
    try:
        assert import_module("asks_while_imported").told == (True, True)
        assert not is_being_imported("asks_while_imported")
        assert not is_being_imported("asks_while_imported.below")
    finally:
        sys.modules.pop("asks_while_imported", None)


def test_a_module_that_is_not_imported_is_not_being_imported() -> None:
    assert not is_being_imported("no_such_module_here.db")
