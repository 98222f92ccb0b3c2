"""Watches the committed rows of a container over many tests, and says which test has changed them.

Counting rows takes longer than a test that does nothing. So they are counted only after a test that has used a connection outside
of the isolation, and from time to time: other libraries and other processes write as well, and are not seen.
"""

from __future__ import annotations

from collections.abc import Collection
from itertools import islice
from typing import TYPE_CHECKING

from app_db._compat.clocks import monotonic
from app_db.testing._outside import activity, checkouts
from app_db.testing._row_counts import RowCounts

if TYPE_CHECKING:
    from app_db.container import DatabaseContainer

_RARELY = 0.5
"""Seconds after which rows are counted although nothing was seen that may have written some."""

_SHOWN = 8
"""How many tests a sentence names."""


class RowWatch:
    """Watches the rows of the models' tables: call `before_test` before each isolated test, and `after_test` after it."""

    def __init__(self, container: DatabaseContainer) -> None:
        checkouts.watch()
        self._container = container
        self._counts: RowCounts | None = None
        self._counted_at = 0.0
        self._activity: object = None
        self._tests: list[str] = []
        """The isolated tests since rows were counted."""

    def before_test(self, test: str) -> None:
        """Note a test. Rows are counted if something other than an isolated test may have changed them since the last one."""
        if self._counts is None or self._activity != activity():
            self._counts = RowCounts(self._container)
            self._note_count()
        self._tests.append(test)

    def after_test(
        self, own: Collection[str] = (), connections: Collection[str] | None = None, *, suspect: bool = False
    ) -> list[str]:
        """Return a sentence for each table whose number of rows has changed, if the test may have changed it.

        `own` is as for RowCounts. `connections` names those that were isolated; without it, all were.
        Rows are counted in any case if the test is `suspect`.
        """
        if suspect or self._activity != activity():
            del self._tests[:-1]  # it was this one, as far as can be seen
            return self.differences(own, connections)
        return self.differences(own, connections) if monotonic() - self._counted_at > _RARELY else []

    def at_end(self, own: Collection[str] = ()) -> list[str]:
        """Return the sentences for the last tests, unless something other than an isolated test may have changed rows since."""
        return self.differences(own) if self._activity == activity() else []

    def differences(self, own: Collection[str] = (), connections: Collection[str] | None = None) -> list[str]:
        """Count rows, and return the sentences. Each names the tests that may have changed the rows, if there are several."""
        if self._counts is None:
            return []
        suspects = self._suspects()
        found = [f"{sentence}{suspects}" for sentence in self._counts.moved_on(own, connections)]
        self._note_count()
        return found

    def _suspects(self) -> str:
        *others, _ = self._tests or [""]
        if not others:
            return ""
        shown = ", ".join(islice(reversed(others), _SHOWN))
        more = f" and {len(others) - _SHOWN} more" if len(others) > _SHOWN else ""
        return f", by this test or one before it after which rows were not counted: {shown}{more}"

    def _note_count(self) -> None:
        self._tests.clear()
        self._counted_at = monotonic()
        self._activity = activity()
