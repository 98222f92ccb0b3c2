"""What is known about installed distributions."""

from __future__ import annotations


def version_of(distribution: str) -> str:
    """Return the version of an installed distribution."""
    from importlib.metadata import version  # here, because it takes long to import

    return version(distribution)
