"""The application's pyproject.toml."""

from __future__ import annotations

from pathlib import Path


def project_file() -> Path | None:
    """Return the nearest pyproject.toml, in the working directory or above it."""
    here = Path.cwd()
    return next((file for place in (here, *here.parents) if (file := place / "pyproject.toml").is_file()), None)
