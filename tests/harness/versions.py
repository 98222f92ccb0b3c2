"""What older versions of the libraries underneath are known to do otherwise, which app_db can't mend.

The tests run on them (py311-lowest in tox.ini), and say what holds there.
"""

from __future__ import annotations

import re
import sys
from importlib.metadata import version


def is_before(distribution: str, *least: int) -> bool:
    """Whether the version that is installed is older than `least`."""
    return tuple(map(int, re.findall(r"\d+", version(distribution))[: len(least)])) < least


STRANDS_CONNECTIONS = is_before("SQLAlchemy", 2, 0, 53)
"""Where something fails, or is cancelled, that sets a new connection up, nobody closes that but the garbage collector."""

RESET_LOSES_PLACES = is_before("SQLAlchemy", 2, 1)
"""A connection loses its place in the pool when a listener to "reset" is interrupted by an exception that is no `Exception`."""

NOTIFIES_IS_DEAF = is_before("psycopg", 3, 2, 4)
"""`Connection.notifies()` doesn't hear of what arrived with the answer to a statement."""


def waits_in_tasks(driver: str) -> bool:
    """Whether a driver waits by what `asyncio.wait_for` was before Python 3.12, as psycopg does before 3.3.6.

    That waits in a task of its own, which an ending loop cancels; and where its own task is cancelled as the answer arrives, it
    returns the answer, and nobody ever hears of the cancellation.
    """
    return driver == "psycopg" and sys.version_info < (3, 12) and is_before("psycopg", 3, 3, 6)
