"""What `app_db.testing` asks the program that runs the tests. The pytest plugin answers; other runners need not."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass

from app_db.container import DatabaseContainer

_log = logging.getLogger("app_db")


def _nothing(container: DatabaseContainer) -> None:
    """Leave a container its own databases."""


@dataclass(frozen=True)
class Runner:
    """What a program that runs tests decides about the databases. The default is what `python -m unittest` has."""

    prepare: Callable[[DatabaseContainer], None] = _nothing
    """Gives a container the databases of the run. It is called again and again, and does that once."""
    prepare_case: Callable[[DatabaseContainer], None] = _nothing
    """Does the same for an IsolatedTestCase, and makes the tables of the models if they are missing."""
    tell: Callable[[str], None] = _log.warning
    """Takes a note for the person who runs the tests."""
    create: bool = False
    """Whether what an earlier run has left is dropped and made anew."""
    reuse: bool = False
    """Whether tables are kept at the end, for the next run."""


_runners = [Runner()]


def runner() -> Runner:
    """Return the runner under which the tests run."""
    return _runners[-1]


@contextmanager
def running_under(runner: Runner) -> Generator[None]:
    """Let a runner answer, for the length of the block. Plugins of test runners use this."""
    _runners.append(runner)
    try:
        yield
    finally:
        _runners.remove(runner)
