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
        """The tests since rows were counted."""
        self._own: Collection[str] = ()
        self._earlier: list[str] = []
        """Sentences about tests before the next one."""

    def note_other(self, test: str) -> None:
        """Note a test that is not isolated. It may have changed rows, too, if rows were not counted since."""
        if self._tests[-1:] != [test]:
            self._tests.append(test)

    def pause(self) -> None:
        """Let something change rows that several tests share, such as a fixture of a module: `before_test` counts them anew.

        What the tests before it have changed is told with the next test.
        """
        if self._counts is None or self._container.core.coordinator().rehearsal is not None:
            return
        if self._tests and self._activity == activity():
            by = f", by one of the tests before this one after which rows were not counted: {_named(self._tests)}"
            self._earlier += [f"{sentence}{by}" for sentence in self._counts.moved_on(self._own)]
        self._counts = None

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
        self._own = own
        if suspect or self._activity != activity():
            del self._tests[:-1]  # it was this one, as far as can be seen
            return self.differences(own, connections)
        if monotonic() - self._counted_at > _RARELY:
            return self.differences(own, connections)
        return self._take_earlier()

    def at_end(self, own: Collection[str] = ()) -> list[str]:
        """Return the sentences for the last tests, unless something other than an isolated test may have changed rows since."""
        return self.differences(own) if self._activity == activity() else self._take_earlier()

    def differences(self, own: Collection[str] = (), connections: Collection[str] | None = None) -> list[str]:
        """Count rows, and return the sentences. Each names the tests that may have changed the rows, if there are several."""
        if self._counts is None:
            return self._take_earlier()
        suspects = self._suspects()
        found = self._take_earlier() + [f"{sentence}{suspects}" for sentence in self._counts.moved_on(own, connections)]
        self._note_count()
        return found

    def _suspects(self) -> str:
        *others, _ = self._tests or [""]
        if not others:
            return ""
        return f", by this test or one before it after which rows were not counted: {_named(others)}"

    def _take_earlier(self) -> list[str]:
        found, self._earlier = self._earlier, []
        return found

    def _note_count(self) -> None:
        self._tests.clear()
        self._counted_at = monotonic()
        self._activity = activity()


def _named(tests: list[str]) -> str:
    shown = ", ".join(islice(reversed(tests), _SHOWN))
    return shown + (f" and {len(tests) - _SHOWN} more" if len(tests) > _SHOWN else "")
