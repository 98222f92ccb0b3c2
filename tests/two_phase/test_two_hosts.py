"""Hosts that share servers, and each have a SQLite file of the same name, commit and recover beside each other.

The decision about a unit that wrote to the file is in the file, which the other host can't see: what it finds prepared by that
unit it must leave alone, whether its committer is alive or dead.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import make_url

from harness.crashing import Application, Outcome, Settings, Zygote
from harness.leftovers import Site, left_in, rows_of
from harness.requiring import Servers
from harness.servers import MariaDBServer, PostgresServer

_numbers = count(1)


class Host:
    """One of the hosts: an application on it, and the databases as it sees them."""

    def __init__(self, application: Application, sites: dict[str, Site]) -> None:
        self.application = application
        self.sites = sites

    def contradictions(self, outcomes: Sequence[Outcome]) -> list[str]:
        rows = rows_of([outcome.unit for outcome in outcomes], self.sites)
        return [wrong for outcome in outcomes if (wrong := outcome.contradicts(rows[outcome.unit]))]


@pytest.fixture(scope="module")
def servers() -> Iterator[Servers]:
    def postgresql() -> PostgresServer:
        return PostgresServer(settings={"max_prepared_transactions": 200})

    with closing(Servers(postgresql=postgresql, mariadb=MariaDBServer)) as servers:
        yield servers


@pytest.fixture(scope="module")
def zygotes() -> Iterator[list[Zygote]]:
    # The second meets locks of a process that waits for it, which would be in vain.
    with Zygote() as first, Zygote(PGOPTIONS="-c lock_timeout=300ms") as second:
        yield [first, second]


@contextmanager
def hosts(zygotes: list[Zygote], servers: Servers, kinds: str, log: str, directory: Path) -> Generator[list[Host]]:
    """Two hosts with settings that differ in the path of the SQLite file only, as the directories differ that they run in.

    Their databases are a, b, ... of these kinds, and `lite`. The log is one of these, or a file of each host.
    """
    with ExitStack() as stack:
        shared: dict[str, Site] = {}
        needed = [servers[kind] for kind in kinds.split()]  # before a database is lent: a missing one skips the test
        for name, server in zip("abc", needed, strict=False):
            shared[name] = Site(server.url(stack.enter_context(server.lend_database())), server)
        application = f"hosts{next(_numbers)}"
        found: list[Host] = []
        for number, zygote in enumerate(zygotes):
            own = directory / str(number)
            own.mkdir()
            sites = {**shared, "lite": Site(f"sqlite:///{own}/lite.db?timeout=0.2")}
            connections = {
                name: {"url": site.url, **({} if site.server is None else {"two_phase": "true"})} for name, site in sites.items()
            }
            settings: Settings = {
                "application": application,
                "connections": connections,
                "decision_log": f"file:{own}/decisions" if log == "file" else log,
            }
            found.append(Host(stack.enter_context(zygote.application(settings)), sites))
        yield found


LAYOUTS = [
    ("postgresql postgresql", "a"),
    ("postgresql", "file"),
    ("mariadb", "a"),  # where units move, as in the next one
    ("mariadb postgresql", "file"),
    ("mariadb", "lite"),
]


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("kinds", "log", "first"), [*((*layout, False) for layout in LAYOUTS[::2]), (*LAYOUTS[0], True), (*LAYOUTS[2], True)]
)
def test_a_recovery_on_another_host_takes_nothing_apart_at_any_step_of_a_commit(  # noqa: PLR0917  # pytest gives them by name
    kinds: str, log: str, first: bool, zygotes: list[Zygote], servers: Servers, tmp_path: Path
) -> None:
    with hosts(zygotes, servers, kinds, log, tmp_path) as (here, there):
        outcomes = [] if first else [here.application.run("before"), there.application.run("there")]
        for outcome in here.application.ask_at_every_step("unit", lambda: there.application.settle(patience=0.2)):
            outcomes.append(outcome)
            if first:
                for site in here.sites.values():
                    site.query("DROP TABLE IF EXISTS app_db_decisions")
        assert {outcome.error for outcome in outcomes} == {""}, "nobody may abort a unit that is not its own"
        ours = [outcome for outcome in outcomes if outcome.unit != "there"]
        assert here.contradictions(ours) == []
        assert left_in(list(here.sites.values())) == []


@pytest.mark.exhaustive
@pytest.mark.parametrize(("kinds", "log"), LAYOUTS)
def test_what_died_at_any_step_of_a_commit_is_settled_on_its_own_host(
    kinds: str, log: str, zygotes: list[Zygote], servers: Servers, tmp_path: Path
) -> None:
    with hosts(zygotes, servers, kinds, log, tmp_path) as (here, there):
        theirs = [there.application.run("there")]
        outcomes = [here.application.run("before"), *here.application.die_at_every_step("unit")]
        assert outcomes[-1].committed, outcomes[-1].message
        wait_for_servers(here)
        prepared = prepared_at(here)
        assert prepared != [], "there is nothing to recover"

        recovery = there.application.recover()
        assert recovery.returncode == 1, recovery.stdout + recovery.stderr
        assert "LEFT IN DOUBT, because its decision is in another log" in recovery.stdout
        assert prepared_at(here) == prepared

        recovery = here.application.recover()
        assert recovery.returncode == 0, recovery.stdout + recovery.stderr
        assert here.contradictions(outcomes) == [], recovery.stdout
        assert there.contradictions(theirs) == []
        assert left_in(list(here.sites.values())) == []


def wait_for_servers(host: Host) -> None:
    for site in host.sites.values():
        if site.server is not None:
            assert site.server.open_transactions(site.database, within=10) == []


def prepared_at(host: Host) -> list[Any]:
    return sorted({gid for site in host.sites.values() for gid in site.prepared()})


@pytest.mark.exhaustive
def test_the_hosts_differ_in_nothing_but_the_directory(zygotes: list[Zygote], servers: Servers, tmp_path: Path) -> None:
    with hosts(zygotes, servers, "postgresql", "a", tmp_path) as both:
        paths = [Path(str(make_url(host.sites["lite"].url).database)) for host in both]
    assert paths[0] != paths[1]
    assert {path.name for path in paths} == {"lite.db"}
