"""`app-db pool`: who is connected to each database, as its server sees it."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING

from app_db.cli._calls import FINE, WRONG, Call, Commands
from app_db.cli._printing import Cell, Styled

if TYPE_CHECKING:
    from app_db._databases.inspection import ServerSession
    from app_db.container import DatabaseContainer

_PATIENCE = 5.0
"""Seconds that a database has to answer."""


def add_to(commands: Commands) -> None:
    """Add `pool`."""
    commands.add("pool", _pool).add_argument("names", nargs="*", metavar="NAME", help="a connection (default: all)")


def _pool(call: Call) -> int:
    """List who is connected to each database, those with the oldest transactions first: every process, as the server sees it.
    Which unit of work holds a connection only its own process knows: container.pools() tells it there, and so does the error
    of a full pool.
    """
    from app_db._findings.asking import at_once
    from app_db.cli._connections import mirrored_by

    settings = call.container.settings()
    names = list(dict.fromkeys(mirrored_by(settings, name) for name in call.names(call.options.names)))
    with call.out.progress("Asking the databases"):
        found = at_once({name: partial(_sessions, call.container, name) for name in names}, _PATIENCE)
    answers = {name: _silence() if answer is None else answer for name, answer in found.items()}
    rows = [row for name, answer in answers.items() if not isinstance(answer, str) for row in _rows(name, answer)]
    if rows:
        call.out.table(["connection", "id", "client", "host", "state", "for", "transaction", "waits for"], rows)
    for name, answer in answers.items():
        if isinstance(answer, str):
            call.out.line(f"{name}: {answer}", "bad")
        elif not answer:
            call.out.line(f"{name}: {_nobody(call.container, name)}")
    call.out.data(
        {
            "connections": [
                {"name": name, "error": answer, "sessions": []}
                if isinstance(answer, str)
                else {"name": name, "error": None, "sessions": [asdict(each) for each in answer]}
                for name, answer in answers.items()
            ]
        }
    )
    return WRONG if any(isinstance(answer, str) for answer in answers.values()) else FINE


def _sessions(container: DatabaseContainer, name: str) -> list[ServerSession] | str:
    """Return who is connected to a database, or why it can't be asked."""
    from sqlalchemy.exc import TimeoutError as PoolTimeoutError

    from app_db._databases.registry import database_of
    from app_db._databases.telling import described, secrets_of
    from app_db.cli._connections import url_of
    from app_db.errors import SettingsError, UnitOfWorkTimeout

    url = url_of(container, name)
    if database_of(url.get_backend_name()).file_of(url) is not None:
        return []  # connecting would create the file
    engine = container.core.decision_logs().engine(name)
    try:
        with engine.connect() as connection:
            return database_of(engine.dialect.name).inspection().sessions(connection)
    except (UnitOfWorkTimeout, PoolTimeoutError):
        return _silence()
    except SettingsError as error:
        return " ".join(map(str, error.problems))
    except Exception as error:  # noqa: BLE001  # whatever the driver or a password provider raises
        return described(error, secrets_of(container.settings().connection(name)))


def _nobody(container: DatabaseContainer, name: str) -> str:
    from app_db._databases.inspection import Inspection
    from app_db._databases.registry import database_of
    from app_db.cli._connections import url_of

    kind = url_of(container, name).get_backend_name()
    if kind == "sqlite":
        return "SQLite has no server that lists connections; container.pools() lists those of its own process"
    if type(database_of(kind).inspection()).sessions is Inspection.sessions:
        return f"app_db can't ask {kind} for its connections"
    return "there is no other connection that its user may see"


def _silence() -> str:
    return f"no answer within {_PATIENCE:g} s"


def _rows(name: str, sessions: list[ServerSession]) -> list[list[Cell]]:
    return [
        [
            name,
            str(each.id),
            each.client,
            each.host,
            each.state,
            f"{each.in_state:.1f} s",
            "" if each.in_transaction is None else Styled(f"{each.in_transaction:.1f} s", "warning"),
            ", ".join(map(str, each.blocked_by)),
        ]
        for each in sessions
    ]
