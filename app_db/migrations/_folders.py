"""Where the migrations are: a folder for each connection, in one folder for all of them."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import cast

from app_db.errors import InvalidUse
from app_db.settings._project import project_file

DEFAULT = "migrations"


def folder_of(directory: str | Path | None) -> Path:
    """Return the folder of all chains: `directory`, `[tool.app_db] migrations` of pyproject.toml, or ./migrations.

    The pyproject.toml is the one in the working directory, or the nearest above it. What it names is seen from there.
    """
    if directory is not None:
        return Path(directory).absolute()
    file = project_file()
    configured = None if file is None else _configured(file)
    return Path.cwd() / DEFAULT if file is None or configured is None else file.parent / configured


def _configured(file: Path) -> str | None:
    try:
        read = tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidUse(f"{file} is no valid TOML ({error})", "Correct it") from None
    tool = read.get("tool")
    own: object = cast("dict[str, object]", tool).get("app_db") if isinstance(tool, dict) else None
    if own is None:
        return None
    found = cast("dict[str, object]", own).get("migrations") if isinstance(own, dict) else ()  # no table
    if not isinstance(found, str | None):
        raise InvalidUse(
            f"[tool.app_db] in {file} does not name the folder of the migrations",
            'Write it as a table with a text in it: migrations = "migrations"',
        )
    return found
