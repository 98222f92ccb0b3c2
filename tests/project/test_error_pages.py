"""Every error has a page, prints whole sentences, and survives the way between processes."""

from __future__ import annotations

import ast
import inspect
import pickle
import re
from pathlib import Path

import pytest

from app_db import errors
from app_db.errors import AppDbError, Problem
from harness.paths import ROOT

PAGES = ROOT / "docs" / "errors"

CLASSES = sorted(
    (found for found in vars(errors).values() if inspect.isclass(found) and issubclass(found, AppDbError)),
    key=lambda found: found.__name__,
)

PROBLEMS = [
    Problem("APP_DB_CONNECTIONS__WRITER__URL", "is no URL. Write it as sqlite:///shop.db"),
    Problem("APP_DB_ATOMICITY", "is neither 'strict' nor 'best_effort'. Choose one"),
]

EXAMPLES: list[AppDbError] = [
    errors.SettingsError(PROBLEMS),
    errors.SettingsError(PROBLEMS[:1]),
    errors.NothingConfigured(PROBLEMS[:1]),
    errors.UnknownVariable(PROBLEMS[:1]),
    errors.ContradictorySettings(PROBLEMS),
    errors.UnknownConnection("writter_session", ["writer", "reader", "writer_session"]),
    errors.UnknownConnection("writer", []),
    errors.ConnectionNotConfigured("warehouse", ["warehous", "writer"]),
    errors.ConnectionNotConfigured("warehouse", []),
    errors.UnknownModel("the model Order", ["warehouse", "writer"]),
    errors.UnknownModel("the model Order", []),
    errors.UnknownModel("the model Order", ["warehouse", "writer"], "warehous"),
    errors.SpansDatabases([("orders", "shop"), ("facts.sales", "warehouse")]),
    errors.NotReflected("Order", "warehouse"),
    errors.CannotReflect([errors.Unreflectable("Order", "orders", "shop", "is not there")]),
    errors.CannotReflect([errors.Unreflectable(model, "t", "shop", "is not there") for model in "AB"]),
    errors.UnknownTable("order", "warehouse", ["orders"]),
    errors.NotWired("shop.place_order", "shop"),
    errors.NotWired("shop.place_order", "shop", "session", "Provide['writter_session']"),
    errors.NoUnitOfWork(),
    errors.NoUnitOfWork("The 'writer' session"),
    errors.UnitOfWorkEnded("The 'writer' session"),
    errors.ForeignUnitOfWork("The 'writer' session", "the task 'a'", "the task 'b'"),
    errors.ForeignUnitOfWork("The unit of work", "task 'a'", "task 'b'"),
    errors.ForeignUnitOfWork("The unit of work", "task 'a'", "thread 'b'"),
    errors.UnitOfWorkInUse("thread 'b'", "thread 'a'"),
    errors.AlreadyInUnitOfWork(),
    errors.AwaitRequired("The 'writer' async session", "Begin its unit of work with `async with container.transaction():`"),
    errors.SessionIsManaged("writer", "commit"),
    errors.SessionIsManaged("writer", "begin"),
    errors.SessionIsManaged("writer", "rollback"),
    errors.UnitOfWorkDoomed("an inner unit failed with ValueError"),
    errors.UnitOfWorkTimeout(2.5),
    errors.ReplicaUnavailable("reader", "writer"),
    errors.InvalidUse("attempts=3 was given to an inner unit", "Give it to the outermost one"),
    errors.ReadOnlyViolation("reader", "INSERT"),
    errors.ReadOnlyViolation("writer", "INSERT", whole_unit=True),
    errors.NotAtomic(["warehouse", "writer"]),
    errors.PartialCommit(["log"], "writer", ["warehouse"]),
    errors.PartialCommit([], "writer", []),
    errors.TransactionLost("writer"),
    errors.OutcomeUnknown("writer"),
    errors.OutcomeUnknown("writer", ["log"]),
    errors.OutcomeUnknown("the file /srv/decisions", prepared=["warehouse", "writer"]),
    errors.CommitUnconfirmed(["warehouse"]),
    errors.AbortedByRecovery("xLaKBZ1xUODgcZR7TrHPMI"),
    errors.TwoPhaseUnavailable(PROBLEMS),
    errors.DecisionFileUnusable("/srv/decisions", "it is on nfs4", "Put it on a disk of this host"),
    errors.DecisionFileUnusable("/srv/decisions", "it was moved", "Put it back", undecided=False),
    errors.DecisionFileDamaged("/srv/decisions", "SQLite says, database disk image is malformed"),
    errors.DecisionFileFull("/srv/decisions"),
    errors.UnexpectedStatements(["2 statements were sent, and 1 was expected."], ["'writer' from shop.py:31 in total: SELECT 1"]),
    errors.UnexpectedStatements(["No statements were sent, and 1 was expected."], []),
    errors.LiveServerError("The server did not start", "Look at the log"),
    errors.CannotMakeDatabase("writer", "shop_gw0", "permission denied to create database"),
    errors.CannotMakeTables("writer", "there is 'orders' already", "Give the tests another database"),
    errors.AlembicMissing(),
    errors.UnusableMigrations("writer", "there is no revision 'a1'", "The revisions are: b2"),
    errors.MigrationFailed("writer", "a1", "ProgrammingError: no such column", errors.MigrationAccount()),
    errors.MigrationFailed("log", "", "OperationalError: gone", errors.MigrationAccount({"writer": ["a1"]}, ["log"], ["web"])),
    errors.MigrationFailed("log", "b2", "OperationalError: gone", errors.MigrationAccount(is_partial=True)),
    errors.MigrationLockTimeout("writer", 60.0, "the connection 42 (shop, since 2026-01-02 03:04:05 UTC)"),
    errors.MigrationLockTimeout("writer", 0.5, "another process", ["log"]),
    errors.CannotIsolate("writer", "A COMMIT sent as SQL", "Use SQLAlchemy's own methods"),
    errors.IsolationTimeout("writer", ["the thread 'MainThread', which uses 'writer'"], 5.0),
    errors.IsolationTimeout("", [], 5.0),
    errors.IsolationBroken(["writer: a connection is still checked out"]),
    errors.NotIsolated("writer", "shop.py:27 in place_order", "the test test_shop.py::test_one", "Isolate the test"),
    errors.NotIsolated("writer", None, "", "Isolate the test"),
    errors.HookFailed([ValueError("no mail server"), OSError("disk full")]),
]

BASES = {errors.AppDbError, errors.UnitOfWorkError, errors.CommitError, errors.IsolationError, errors.MigrationError}
"""Never raised themselves: names to catch a family by."""


def page_of(found: type[AppDbError]) -> Path:
    return ROOT / "docs" / f"{found.page}.md"


@pytest.mark.parametrize("found", CLASSES, ids=lambda found: found.__name__)
def test_an_error_has_a_page_that_names_it(found: type[AppDbError]) -> None:
    text = page_of(found).read_text()
    assert text.startswith(f"# {found.__name__}\n")
    assert re.search(r"^## What to do$", text, re.MULTILINE) or found in BASES


def test_no_two_errors_share_a_page() -> None:
    assert len({found.page for found in CLASSES}) == len(CLASSES)


def test_no_page_is_left_without_its_error() -> None:
    pages = {page for page in PAGES.glob("*.md") if page.name != "index.md"}
    assert pages == {page_of(found) for found in CLASSES}


def test_errors_live_on_one_page() -> None:
    """A subclass of an error anywhere else in app_db would escape these tests, and the reader."""
    names = {found.__name__ for found in CLASSES}
    elsewhere = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"
        for path in sorted((ROOT / "app_db").rglob("*.py"))
        if path.name != "errors.py"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef) and any(ast.unparse(base).rpartition(".")[2] in names for base in node.bases)
    ]
    assert elsewhere == []


def test_the_docstring_of_the_module_draws_the_tree_of_classes() -> None:
    drawn = re.findall(r"^    ([ │├└─]*)(\w+)(?: \((.*)\))?$", errors.__doc__ or "", re.MULTILINE)
    bases = {
        found: [base for base in found.__bases__ if not issubclass(base, AppDbError) and base is not Exception]
        for found in CLASSES
    }
    paths = {found: [base for base in reversed(found.__mro__) if base in CLASSES] for found in CLASSES}
    assert {(name, len(indent) // 5, beside) for indent, name, beside in drawn} == {
        (
            found.__name__,
            len(paths[found]) - 1,
            ", ".join(f"{base.__module__}.{base.__name__}".removeprefix("builtins.") for base in bases[found]),
        )
        for found in CLASSES
    }


def test_every_error_has_an_example_here() -> None:
    assert {type(example) for example in EXAMPLES} >= set(CLASSES) - BASES


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
def test_an_error_prints_whole_sentences(error: AppDbError) -> None:
    text = error.message
    assert not re.search(r"[{}]|\bNone\b|<class|\bobject at 0x", text), text
    assert text[-1] in ".)" or isinstance(error, (errors.SettingsError, errors.IsolationBroken, errors.UnexpectedStatements))
    assert str(error) == f"{text}\nSee https://app-db.readthedocs.io/en/stable/{error.page}.html"


def test_the_address_is_configurable_and_shown_once(monkeypatch: pytest.MonkeyPatch) -> None:
    both = errors.HookFailed([errors.UnitOfWorkTimeout(2.5)])
    assert str(both).count("See https://") == 1
    monkeypatch.setattr(AppDbError, "pages_at", "https://docs.example.com")
    assert str(both).endswith("\nSee https://docs.example.com/errors/hook-failed.html")
    monkeypatch.setattr(AppDbError, "pages_at", "https://docs.example.com/")
    assert str(both).endswith("\nSee https://docs.example.com/errors/hook-failed.html")
    monkeypatch.setattr(AppDbError, "pages_at", "")
    assert str(both) == both.message


def test_an_applications_own_error_has_the_page_of_its_base() -> None:
    class Refused(errors.InvalidUse):
        pass

    assert Refused.page == errors.InvalidUse.page


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
def test_an_error_survives_pickling(error: AppDbError) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert repr(vars(copy)) == repr(vars(error))


@pytest.mark.parametrize("found", CLASSES, ids=lambda found: found.__name__)
def test_an_error_says_in_its_docstring_what_it_means(found: type[AppDbError]) -> None:
    assert found.__doc__ is not None
    assert found.__doc__.strip().partition("\n")[0].endswith(".")
