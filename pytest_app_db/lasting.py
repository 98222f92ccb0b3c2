"""What lasts from one run to the next: databases that are made anew, kept, or kept because a test has failed."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from pytest_app_db.options import is_worker

if TYPE_CHECKING:
    from app_db import DatabaseContainer
    from app_db.testing import FreshDatabases

_notes = pytest.StashKey[list[str]]()
"""What app_db.testing has told, for the end of the report."""
_failed_in = pytest.StashKey[str]()
"""The phase in which a test has failed: `setup` or `call`."""
_has_kept = pytest.StashKey[bool]()
"""Whether the databases of a failed test are kept."""

HAS_COPIES = pytest.StashKey[bool]()
"""Whether a test has copies of the databases, by `app_db_fresh`."""

_NOTES_OF_WORKER = "app_db_notes"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("app_db", "databases of app_db")
    for name, what in _OPTIONS.items():
        group.addoption(f"--app-db-{name}", action="store_true", default=False, help=what)
        parser.addini(f"app_db_{name.replace('-', '_')}", f"the same as --app-db-{name}", type="bool", default=False)


_OPTIONS = {
    "create": "make databases that are missing, and make anew what an earlier run of tests has left",
    "reuse": "keep the databases and tables for the next run, and use those of the last one unless the models have changed",
    "keep-failed": "keep the databases of the first test that fails, with its rows, and print how to look at them",
}


def is_on(config: pytest.Config, name: str) -> bool:
    """Return whether `create`, `reuse` or `keep-failed` was given, as an option or in the configuration of pytest."""
    name = name.replace("-", "_")
    return bool(config.getoption(f"app_db_{name}") or config.getini(f"app_db_{name}"))


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_notes] = []
    if is_on(config, "keep-failed"):
        config.pluginmanager.register(_Failing(), "app_db_failing")


def pytest_report_header(config: pytest.Config) -> list[str]:
    return [f"app_db: --app-db-{name}: {what}" for name, what in _OPTIONS.items() if is_on(config, name)]


# ---- notes --------------------------------------------------------------------------------------------------------------


def tell(config: pytest.Config, note: str) -> None:
    """Take a note for the end of the report."""
    config.stash[_notes].append(note)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    if is_worker(session.config):
        output: dict[str, object] = vars(session.config)["workeroutput"]  # of pytest-xdist
        output[_NOTES_OF_WORKER] = session.config.stash[_notes]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take over the notes of a worker of pytest-xdist."""
    notes: list[str] = getattr(node, "workeroutput", {}).get(_NOTES_OF_WORKER, [])
    config: pytest.Config = node.config
    for note in notes:
        tell(config, note)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    notes = config.stash[_notes]
    for note in dict.fromkeys(notes):
        terminalreporter.write_line(f"app_db: {note}", yellow=True)


# ---- the databases of a failed test ---------------------------------------------------------------------------------------


class _Failing:
    """The hook that notes which tests have failed."""

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        if report.failed:
            item.stash[_failed_in] = report.when
        return report


def keeps_failed(config: pytest.Config) -> bool:
    """Return whether the databases of the next test are kept if it fails."""
    return config.pluginmanager.has_plugin("app_db_failing") and not config.stash.get(_has_kept, False)


def has_failed(item: pytest.Item) -> bool:
    """Return whether a test has failed so far."""
    return _failed_in in item.stash


@contextmanager
def copies_to_keep(container: DatabaseContainer) -> Generator[FreshDatabases]:
    """Give a container copies of its databases, which can be kept."""
    from app_db import AppDbError
    from app_db.testing import fresh_databases

    copies, problem = fresh_databases(container, name="failed"), ""
    try:
        copies.__enter__()
    except AppDbError as error:
        problem = str(error)
    if problem:  # not in the `except`, or pytest would show the error twice
        pytest.fail(problem, pytrace=False)
    with ExitStack() as stack:
        stack.push(copies.__exit__)
        yield copies


def keep(copies: FreshDatabases, item: pytest.Item, *, whole: bool = True) -> None:
    """Keep the databases of a failed test, and print beside its failure how to look at them."""
    copies.kept = True
    item.config.stash[_has_kept] = True
    lines = [f"The databases of {item.nodeid} are kept as they were when it failed. Look at them with:", *copies.ways_to_look()]
    if not whole:
        lines.append("What was written in an event loop that has ended could not be kept.")
    item.add_report_section("teardown", "app_db", "\n".join(lines))
    in_setup = item.stash.get(_failed_in, "") == "setup"
    if in_setup or item.config.getoption("showcapture") != "all" or item.config.getoption("tbstyle") in ("line", "no"):
        tell(item.config, "\n".join(lines))  # pytest does not show the section then
