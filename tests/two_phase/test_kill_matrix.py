"""A unit of work over several databases is in all of them or in none, whoever died and whenever, once recovery has run.

Its client is killed at every step of the commit, and its servers are. Units that died at other steps lie about in the same
databases when recovery is called, which is called as an operator would call it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Self

import pytest
from sqlalchemy import make_url
from sqlalchemy.exc import DBAPIError

from app_db._two_phase.decision_file import FileLog
from app_db._two_phase.decisions import Verdict
from harness.crashing import Application, Outcome, Settings, Zygote
from harness.leftovers import Site, left_in, rows_of
from harness.requiring import Servers
from harness.servers import MariaDBServer, PostgresServer, Server

_numbers = count(1)


@dataclass(frozen=True)
class Layout:
    """The kinds of the databases that are written to, by connections a, b, c, d, and where decisions go.

    The log is one of those connections, or "file", or a kind: then it is in a database of its own.
    """

    kinds: str
    log: str

    def __str__(self) -> str:
        return f"{self.kinds.replace(' ', '-')}-log-in-{self.log}"


class Scene:
    """Databases of a layout, and the settings of an application that uses them."""

    def __init__(self, layout: Layout, servers: Servers, directory: Path, drivers: str = "") -> None:
        # All of them before a database is lent: one that is missing skips the test.
        self._servers = {kind: servers[kind] for kind in (*layout.kinds.split(), layout.log) if kind in servers}
        self._directory = directory
        self._stack = ExitStack()
        self.sites = dict(zip("abcd", map(self._site, layout.kinds.split()), strict=False))
        connections: dict[str, object] = {
            name: {"url": _by_way_of(drivers, number, site), **({} if site.server is None else {"two_phase": "true"})}
            for number, (name, site) in enumerate(self.sites.items())
        }
        self.log_file: Path | None = None
        self.log_site: Site | None = None
        self.settings: Settings = {"connections": connections, "decision_log": layout.log}
        if layout.log == "file":
            self.log_file = directory / f"decisions_{next(_numbers)}"
            self.settings["decision_log"] = f"file:{self.log_file}"
        elif layout.log not in self.sites:
            self.log_site = self._site(layout.log)
            connections["log"] = {"url": self.log_site.url}
            self.settings["decision_log"] = "log"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def _site(self, kind: str) -> Site:
        if kind == "sqlite":
            return Site(f"sqlite:///{self._directory / f'kill_{next(_numbers)}.db'}?timeout=0.2")
        server = self._servers[kind]
        return Site(server.url(self._stack.enter_context(server.lend_database())), server)

    def all_sites(self) -> list[Site]:
        return [*self.sites.values(), *([] if self.log_site is None else [self.log_site])]

    def decided_to_commit(self) -> list[str]:
        """The units of which somebody still keeps that they are to commit."""
        found: list[str] = []
        for site in self.all_sites():
            with contextlib.suppress(DBAPIError):  # there is no table
                found += [unit for (unit,) in site.query("SELECT unit FROM app_db_decisions WHERE verdict = 'commit'")]
        if self.log_file is not None:
            found += [decision.unit for decision in FileLog(self.log_file).decisions() if decision.verdict is Verdict.COMMIT]
        return found

    def drop_logs(self) -> None:
        """Take every decision and every table of decisions away."""
        for site in self.all_sites():
            site.query("DROP TABLE IF EXISTS app_db_decisions")

    def contradictions(self, outcomes: Sequence[Outcome]) -> list[str]:
        """What is wrong with the units: a line each."""
        rows = rows_of([outcome.unit for outcome in outcomes], self.sites)
        return [wrong for outcome in outcomes if (wrong := outcome.contradicts(rows[outcome.unit]))]

    def wait_for_servers(self) -> None:
        """Wait until the servers have noticed which clients are gone."""
        for site in self.all_sites():
            if site.server is not None:
                assert site.server.open_transactions(site.database, within=10) == []

    def check_after_recovery(self, application: Application, outcomes: Sequence[Outcome]) -> None:
        """See that nothing is left once recovery has run."""
        self.wait_for_servers()
        recovery = application.recover()
        assert recovery.returncode == 0, recovery.stdout + recovery.stderr
        assert self.contradictions(outcomes) == [], recovery.stdout
        assert left_in(self.all_sites()) == []
        application.settle(keep=0)
        assert self.decided_to_commit() == []


def _by_way_of(drivers: str, number: int, site: Site) -> str:
    """The URL of a site, with one of the drivers, which take turns."""
    if not drivers or site.server is None:
        return site.url
    url = make_url(site.url)
    turns = drivers.split()
    named = url.set(drivername=f"{url.get_backend_name()}+{turns[number % len(turns)]}")
    return named.render_as_string(hide_password=False)


@pytest.fixture(scope="module")
def servers() -> Iterator[Servers]:
    with closing(Servers(postgresql=new_postgres, other=new_postgres, mariadb=MariaDBServer)) as servers:
        yield servers


def new_postgres() -> PostgresServer:
    return PostgresServer(settings={"max_prepared_transactions": 200})


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    with Zygote() as zygote:
        yield zygote


@pytest.fixture(scope="module")
def rescuer() -> Iterator[Zygote]:
    # It meets locks of a process that waits for it, which would be in vain.
    with Zygote(PGOPTIONS="-c lock_timeout=300ms") as zygote:
        yield zygote


# ---- the matrix can fail ------------------------------------------------------------------------------------------------


@pytest.mark.exhaustive
@pytest.mark.parametrize("ending", ["ROLLBACK", "COMMIT"])
def test_without_decisions_no_rule_for_what_is_prepared_is_right(
    ending: str, zygote: Zygote, servers: Servers, tmp_path: Path
) -> None:
    with Scene(Layout("postgresql other", "a"), servers, tmp_path) as scene, zygote.application(scene.settings) as application:
        outcomes = list(application.die_at_every_step("unit", way="by hand"))
        assert outcomes[-1].committed
        scene.wait_for_servers()
        assert left_in(scene.all_sites(), within=0) != []
        for site in scene.sites.values():
            assert site.server is not None
            for gid in site.prepared():
                site.server.execute(f"{ending} PREPARED '{gid}'", database=site.database)  # not in a transaction
        assert scene.contradictions(outcomes) != []
        assert left_in(scene.all_sites()) == []


# ---- clients are killed -------------------------------------------------------------------------------------------------

TWO = [
    Layout("postgresql other", "a"),
    Layout("postgresql other", "other"),
    Layout("postgresql other", "file"),
    Layout("postgresql sqlite", "a"),
    Layout("sqlite postgresql", "file"),
    Layout("postgresql mariadb", "a"),
    Layout("postgresql mariadb", "b"),
    Layout("mariadb mariadb", "mariadb"),
    Layout("mariadb mariadb", "file"),
    Layout("mariadb sqlite", "postgresql"),
]
FOUR = [
    Layout("postgresql other postgresql other", "c"),
    Layout("postgresql mariadb other mariadb", "file"),
    Layout("postgresql mariadb sqlite other", "postgresql"),
    Layout("mariadb mariadb mariadb sqlite", "b"),
    Layout("mariadb mariadb mariadb mariadb", "postgresql"),
]


@pytest.mark.representative("sqlite-postgresql-log-in-file", "postgresql-mariadb-log-in-b")
@pytest.mark.parametrize("layout", TWO + FOUR, ids=str)
def test_the_databases_agree_wherever_in_its_commit_a_client_was_killed(
    layout: Layout, zygote: Zygote, servers: Servers, tmp_path: Path
) -> None:
    with Scene(layout, servers, tmp_path) as scene, zygote.application(scene.settings) as application:
        outcomes = [application.run("before"), *application.die_at_every_step("unit")]
        assert outcomes[0].committed, outcomes[0].message
        assert outcomes[-1].committed, outcomes[-1].message
        scene.wait_for_servers()
        assert left_in(scene.all_sites(), within=0) != [], "there is nothing to recover"
        scene.check_after_recovery(application, outcomes)


@pytest.mark.exhaustive
@pytest.mark.parametrize("layout", [Layout("postgresql other", "a"), Layout("postgresql mariadb sqlite", "file")], ids=str)
def test_the_databases_agree_wherever_a_client_was_killed_whose_session_finds_its_database(
    layout: Layout, zygote: Zygote, servers: Servers, tmp_path: Path
) -> None:
    with Scene(layout, servers, tmp_path) as scene, zygote.application(scene.settings) as application:
        outcomes = [application.run("before", way="routed"), *application.die_at_every_step("unit", way="routed")]
        assert outcomes[0].committed, outcomes[0].message
        assert outcomes[-1].committed, outcomes[-1].message
        scene.wait_for_servers()
        assert left_in(scene.all_sites(), within=0) != [], "there is nothing to recover"
        scene.check_after_recovery(application, outcomes)


@pytest.mark.exhaustive
@pytest.mark.parametrize("layout", [Layout("postgresql other", "a"), Layout("postgresql sqlite", "a")], ids=str)
def test_the_databases_agree_wherever_the_first_commit_of_all_was_killed(
    layout: Layout, zygote: Zygote, servers: Servers, tmp_path: Path
) -> None:
    """The first one makes the log, and each of these is the first one."""
    with Scene(layout, servers, tmp_path) as scene, zygote.application(scene.settings) as application:
        outcomes: list[Outcome] = []
        for outcome in application.die_at_every_step("unit"):
            outcomes.append(outcome)
            scene.wait_for_servers()
            application.settle()
            assert scene.contradictions([outcome]) == []
            assert left_in(scene.all_sites()) == []
            scene.drop_logs()
        assert outcomes[-1].committed, outcomes[-1].message


# ---- clients that await are killed --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Awaited:
    """A layout that coroutines write to by way of these drivers, threads taking part or not."""

    layout: Layout
    drivers: str
    way: str = "awaited"

    def __str__(self) -> str:
        return f"{self.layout}-{self.drivers.replace(' ', '-')}-{self.way}"


AWAITED = [
    Awaited(Layout("postgresql other", "a"), "psycopg"),
    Awaited(Layout("postgresql other", "other"), "asyncpg"),
    Awaited(Layout("postgresql other", "file"), "psycopg asyncpg"),
    Awaited(Layout("postgresql sqlite", "file"), "asyncpg"),
    Awaited(Layout("mariadb mariadb", "file"), "asyncmy"),
    Awaited(Layout("postgresql other postgresql other", "c"), "asyncpg"),
    Awaited(Layout("postgresql other postgresql sqlite", "postgresql"), "psycopg asyncpg"),
    Awaited(Layout("postgresql other postgresql", "file"), "psycopg asyncpg", "mixed"),
]


@pytest.mark.exhaustive
@pytest.mark.parametrize("awaited", AWAITED, ids=str)
def test_the_databases_agree_wherever_in_its_commit_a_client_that_awaits_was_killed(
    awaited: Awaited, zygote: Zygote, servers: Servers, tmp_path: Path
) -> None:
    with (
        Scene(awaited.layout, servers, tmp_path, awaited.drivers) as scene,
        zygote.application(scene.settings) as application,
    ):
        outcomes = [application.run("before", way=awaited.way), *application.die_at_every_step("unit", way=awaited.way)]
        assert outcomes[0].committed, outcomes[0].message
        assert outcomes[-1].committed, outcomes[-1].message
        assert any(step.startswith("before sending") for step in outcomes[-1].steps), "no step was counted on a line"
        scene.wait_for_servers()
        assert left_in(scene.all_sites(), within=0) != [], "there is nothing to recover"
        scene.check_after_recovery(application, outcomes)


# ---- servers are killed -------------------------------------------------------------------------------------------------


@pytest.mark.representative("postgresql-sqlite-log-in-a-postgresql-afterwards")
@pytest.mark.parametrize(
    ("layout", "victims", "back"),
    [
        (Layout("postgresql other", "a"), "postgresql", "at once"),
        (Layout("postgresql other", "a"), "postgresql", "afterwards"),
        (Layout("postgresql other", "a"), "other", "at once"),
        (Layout("postgresql other", "a"), "other", "afterwards"),
        (Layout("postgresql other", "file"), "postgresql other", "at once"),
        (Layout("postgresql other", "postgresql"), "postgresql", "afterwards"),
        (Layout("postgresql sqlite", "a"), "postgresql", "afterwards"),
        (Layout("postgresql mariadb", "b"), "mariadb", "at once"),
        (Layout("postgresql mariadb", "b"), "mariadb", "afterwards"),
        (Layout("postgresql other postgresql other", "b"), "other", "at once"),
    ],
    ids=str,
)
def test_the_databases_agree_wherever_in_a_commit_a_server_was_killed(  # noqa: PLR0917  # pytest gives them by name
    layout: Layout, victims: str, back: str, zygote: Zygote, servers: Servers, tmp_path: Path
) -> None:
    unlucky = [servers[name] for name in victims.split()]
    with Scene(layout, servers, tmp_path) as scene, zygote.application(scene.settings) as application:
        outcomes = [application.run("before")]
        for outcome in application.ask_at_every_step("unit", kill(unlucky, back)):
            outcomes.append(outcome)
            for server in unlucky:
                server.start()
        assert outcomes[-1].committed, outcomes[-1].message
        scene.wait_for_servers()
        # While a server is away, nobody can tell it; one that is back is told by the committer itself.
        assert back == "at once" or left_in(scene.all_sites(), within=0) != [], "there is nothing to recover"
        scene.check_after_recovery(application, outcomes)


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("awaited", "victims", "back"),
    [
        (Awaited(Layout("postgresql other", "file"), "psycopg asyncpg"), "postgresql other", "at once"),
        (Awaited(Layout("postgresql other", "a"), "asyncpg"), "other", "afterwards"),
    ],
    ids=str,
)
def test_the_databases_agree_wherever_in_a_commit_that_is_awaited_a_server_was_killed(  # noqa: PLR0917  # pytest gives them by name
    awaited: Awaited, victims: str, back: str, zygote: Zygote, servers: Servers, tmp_path: Path
) -> None:
    unlucky = [servers[name] for name in victims.split()]
    with Scene(awaited.layout, servers, tmp_path, awaited.drivers) as scene, zygote.application(scene.settings) as application:
        outcomes = [application.run("before", way=awaited.way)]
        for outcome in application.ask_at_every_step("unit", kill(unlucky, back), way=awaited.way):
            outcomes.append(outcome)
            for server in unlucky:
                server.start()
        assert outcomes[-1].committed, outcomes[-1].message
        scene.wait_for_servers()
        scene.check_after_recovery(application, outcomes)


def kill(servers: Sequence[Server], back: str) -> Callable[[], None]:
    def strike() -> None:
        for server in servers:
            server.stop("immediate")
        if back == "at once":
            for server in servers:
                server.start()

    return strike


# ---- nobody is killed, and recovery takes those that commit for dead ------------------------------------------------------


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("layout", "first"),
    [
        (Layout("postgresql other", "a"), True),
        (Layout("postgresql other", "a"), False),
        (Layout("postgresql other", "other"), True),
        (Layout("postgresql sqlite", "a"), True),
        (Layout("postgresql sqlite", "a"), False),
        (Layout("postgresql sqlite", "file"), False),
        (Layout("mariadb postgresql", "a"), False),
        (Layout("postgresql mariadb", "file"), True),
    ],
    ids=lambda value: {True: "which is the first", False: "which is not the first"}.get(value, str(value)),
)
def test_the_databases_agree_wherever_in_a_commit_a_recovery_ran(  # noqa: PLR0917  # pytest gives them by name
    layout: Layout, first: bool, zygote: Zygote, rescuer: Zygote, servers: Servers, tmp_path: Path
) -> None:
    with (
        Scene(layout, servers, tmp_path) as scene,
        zygote.application(scene.settings) as application,
        rescuer.application(scene.settings) as rescue,
    ):
        outcomes = [] if first else [application.run("before")]
        for outcome in application.ask_at_every_step("unit", lambda: rescue.settle(patience=0.2)):
            outcomes.append(outcome)
            if first:
                scene.drop_logs()
        assert outcomes[-1].committed, outcomes[-1].message
        # Who has written to SQLite shuts recovery out of the place where it would have to write the abort.
        assert {outcome.error for outcome in outcomes} == {"", *([] if "sqlite" in layout.kinds else ["AbortedByRecovery"])}
        assert scene.contradictions(outcomes) == []
        assert left_in(scene.all_sites()) == []
