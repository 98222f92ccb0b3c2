"""A network loses a word of the commit, or the answer to it: the unit is in all databases or in none, and its error is true.

One of the databases is behind a proxy that loses something once. What it is to the unit, its role, decides what is said to it:

    branch          it is prepared, and then told that the unit commits
    deciding        its log is the configured one, so that it isn't prepared, and its COMMIT is the decision
    last resource   it can't be prepared, and its COMMIT is the decision
    log             the unit has written nothing to it, and the decision is all that it is told
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.exc import OperationalError

from app_db._units.manager import retryable
from app_db.errors import CommitUnconfirmed, OutcomeUnknown
from harness.leftovers import Site, left_in
from harness.proxies import Fault, Loss, Proxy
from harness.servers import PostgresServer, Server
from harness.two_phasing import TwoPhaseApplication, two_phasing, without

_numbers = count(1)

STALL = 0.6
"""Seconds after which a connection that hangs is closed: longer than any wait of the committer's without a look around."""

WORDS = {
    "postgresql": {
        "PREPARE": rb"PREPARE TRANSACTION",
        "INSERT": rb"INSERT INTO app_db_decisions",
        "COMMIT": rb"COMMIT\x00",
        "COMMIT PREPARED": rb"COMMIT PREPARED",
    },
    "mariadb": {
        "END": rb"XA END",
        "PREPARE": rb"XA PREPARE",
        "INSERT": rb"INSERT INTO app_db_decisions",
        "COMMIT": rb"\x03COMMIT$|XA COMMIT .* ONE PHASE",
        "COMMIT PREPARED": rb"XA COMMIT",
    },
}
"""How each kind of server is told what matters, as a regular expression."""

QUESTION = {
    "END": rb"ROLLBACK PREPARED|XA ROLLBACK|'abort'",
    "PREPARE": rb"ROLLBACK PREPARED|XA ROLLBACK",
    "INSERT": rb"INSERT INTO app_db_decisions",
    "COMMIT": rb"'abort'|INSERT INTO app_db_decisions",
    "COMMIT PREPARED": rb"COMMIT PREPARED|XA COMMIT",
}
"""What the committer says next to find out what became of a word of which it has heard nothing."""

NOTHING_RAISED = "no error"
UNCONFIRMED = "CommitUnconfirmed"
REFUSED = "an ordinary error"
UNKNOWN = "OutcomeUnknown"


@dataclass(frozen=True)
class Case:
    """What is lost on the way to, or from, the database behind the proxy, and where the decision is."""

    kind: str
    role: str
    word: str
    log: str

    def __str__(self) -> str:
        return f"{self.kind}-{self.role}-{self.word}-log in {self.log}".replace(" ", "_")

    @property
    def pattern(self) -> bytes:
        return WORDS[self.kind][self.word]

    @property
    def is_of_decision(self) -> bool:
        """Whether it is said at a moment from which on the unit may have committed."""
        return self.role == "log" or self.word == "COMMIT"

    def expected(self, lost: Loss) -> set[str]:
        """The endings that are true when the committer reaches the database again."""
        if self.word == "COMMIT PREPARED" and self.kind == "mariadb" and lost == "request":
            return {NOTHING_RAISED, UNCONFIRMED}  # whether or not the server has noticed by then that the client is gone
        if self.word == "COMMIT PREPARED" or self.role == "log" or (self.word == "COMMIT" and lost == "answer"):
            return {NOTHING_RAISED}
        return {REFUSED}

    def expected_if_unreachable(self) -> set[str]:
        """The one that is true when it does not reach it."""
        if self.word == "COMMIT PREPARED":
            return {UNCONFIRMED}
        return {UNKNOWN} if self.is_of_decision else {REFUSED}

    def expected_if_held(self, lost: Loss) -> set[str]:
        """The one that is true when it reaches a server for which it is still connected and may go on."""
        return self.expected("answer") if lost == "answer" else self.expected_if_unreachable()


def cases_of(kind: str) -> Iterator[Case]:
    ends = ["END"] if kind == "mariadb" else []
    for log in ("another branch", "a table", "a file"):
        for word in (*ends, "PREPARE", "COMMIT PREPARED"):
            yield Case(kind, "branch", word, log)
    for word in ("INSERT", *ends, "COMMIT"):
        yield Case(kind, "deciding", word, "itself")
    for log in ("another branch", "a file"):
        for word in ("INSERT", "COMMIT"):
            yield Case(kind, "last resource", word, log)
    for word in ("INSERT", *(["COMMIT"] if kind == "mariadb" else [])):
        yield Case(kind, "log", word, "itself")


CASES = [case for kind in WORDS for case in cases_of(kind)]


# ---- databases and a network --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def network_of() -> Iterator[Callable[[Server], Proxy]]:
    with ExitStack() as stack:
        yield cache(lambda server: stack.enter_context(Proxy(server)))


class Places:
    """Databases with items in them, used by one test after the other for as long as none leaves them in disorder."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._sites: dict[tuple[Server, int], Site] = {}

    def site(self, server: Server, number: int) -> Site:
        if (server, number) not in self._sites:
            self._sites[server, number] = Site(server.url(self._stack.enter_context(server.lend_database())), server)
        return self._sites[server, number]

    def drop(self) -> None:
        self._stack.close()
        self._sites.clear()


@pytest.fixture(scope="module")
def places() -> Iterator[Places]:
    places = Places()
    yield places
    places.drop()


class Scene:
    """An application one of whose databases, `hit`, is behind a proxy."""

    def __init__(self, app: TwoPhaseApplication, network: Proxy, written: list[str], sites: list[Site]) -> None:
        self.app = app
        self.network = network
        self._written = written
        self._sites = sites
        self._number = next(_numbers)
        self.is_in_order = False

    def commit(self, item: str) -> str:
        """Have a unit add an item to each database that is written to; return how that ended."""
        try:
            with self.app.unit():
                self._add(item)
        except CommitUnconfirmed as error:
            return UNCONFIRMED if error.connections == ("hit",) else f"{error}"
        except OutcomeUnknown:
            return UNKNOWN
        except OperationalError as error:
            return REFUSED if retryable(error) else f"{error}"
        return NOTHING_RAISED

    def rows(self, item: str) -> set[bool]:
        """Whether the item is there, in each database."""
        return {f"{item} {self._number}" in self.app.names(name) for name in self._written}

    def lose(self, what: Loss, word: bytes, **options: Any) -> Fault:
        return self.network.lose(what, to=word, **options)

    def check(self, item: str, ended: str) -> None:
        """See that what the caller was told is true, once the network is back and recovery has run."""
        self.network.cut()
        self._recover()
        [there] = self.rows(item)
        if ended != UNKNOWN:
            assert there == (ended in (NOTHING_RAISED, UNCONFIRMED))
        assert left_in(self._sites) == []
        assert self.app.leftovers() == []
        self.app.unit(attempts=5, backoff=0).run(self._add, "afterwards")
        assert self.rows("afterwards") == {True}
        self.is_in_order = True

    def _add(self, item: str) -> None:
        self.app.add_to_each(f"{item} {self._number}", *self._written)

    def _recover(self) -> None:
        """Recover until nothing is left: pools hold connections that were cut, and one of each is needed to find out."""
        settlement = self.app.recover()
        for _ in range(2):
            if settlement.left:
                settlement = self.app.recover()
        assert not settlement.left, settlement


@pytest.fixture
def scene(  # noqa: PLR0917  # pytest gives them by name
    case: Case,
    places: Places,
    network_of: Callable[[Server], Proxy],
    postgres: PostgresServer,
    request: pytest.FixtureRequest,
    tmp_path: Path,
) -> Iterator[Scene]:
    server: Server = postgres if case.kind == "postgresql" else request.getfixturevalue("mariadb")
    direct, other, third = places.site(server, 1), places.site(postgres, 2), places.site(postgres, 3)
    network = network_of(server)
    hit: dict[str, Any] = {"url": network.url(direct.url), **HABITS.get(request.node.originalname, {})}
    urls: dict[str, Any] = {"hit": hit, "other": other.url}
    if case.role in ("last resource", "log"):
        hit["two_phase"] = False
    if case.role == "log":
        urls["third"] = third.url
    elif case.log == "a table":
        urls["journal"] = without(third.url)
    log = {"another branch": "other", "a table": "journal", "a file": f"file:{tmp_path}/decisions", "itself": "hit"}[case.log]
    written = [name for name in urls if name != "journal" and (name, case.role) != ("hit", "log")]
    with two_phasing(log, **urls) as app:
        scene = Scene(app, network, written, [direct, other, third])
        try:
            assert scene.commit("before") == NOTHING_RAISED
            yield scene
        finally:
            network.cut()
            if not scene.is_in_order:
                places.drop()


HABITS = {
    "test_a_client_that_gives_up_before_its_server_does_is_told_the_truth": {"connect_args": {"read_timeout": 1.2}},
}
"""By test: how the application connects to the database behind the proxy."""


# ---- what is lost once --------------------------------------------------------------------------------------------------


@pytest.mark.representative(
    "postgresql-branch-PREPARE-log_in_another_branch-answer",
    "postgresql-branch-COMMIT_PREPARED-log_in_a_table-*",
    "postgresql-deciding-COMMIT-*-answer",
    "postgresql-last_resource-COMMIT-log_in_a_file-request",
    "postgresql-log-INSERT-*-answer",
    "mariadb-branch-PREPARE-log_in_a_file-answer",
    "mariadb-branch-COMMIT_PREPARED-log_in_another_branch-request",
    "mariadb-deciding-COMMIT-*-answer",
)
@pytest.mark.parametrize("lost", ["answer", "request"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_is_lost_with_its_connection_leaves_all_or_nothing_and_a_true_error(case: Case, lost: Loss, scene: Scene) -> None:
    fault = scene.lose(lost, case.pattern)
    ended = scene.commit("a")
    assert fault.happened
    assert ended in case.expected(lost)
    if case.kind == "postgresql":  # on MariaDB the committer may be too early to end it, and leaves it to recovery
        assert scene.app.prepared() == []
    scene.check("a", ended)


@pytest.mark.representative("postgresql-deciding-COMMIT-*-answer", "mariadb-branch-COMMIT_PREPARED-*-request")
@pytest.mark.parametrize("lost", ["answer", "request"])
@pytest.mark.parametrize(
    "case",
    [
        Case("postgresql", "branch", "PREPARE", "a file"),
        Case("postgresql", "branch", "COMMIT PREPARED", "a table"),
        Case("postgresql", "deciding", "COMMIT", "itself"),
        Case("postgresql", "last resource", "COMMIT", "a file"),
        Case("postgresql", "log", "INSERT", "itself"),
        Case("mariadb", "branch", "PREPARE", "another branch"),
        Case("mariadb", "branch", "COMMIT PREPARED", "a file"),
        Case("mariadb", "deciding", "COMMIT", "itself"),
        Case("mariadb", "last resource", "COMMIT", "another branch"),
        Case("mariadb", "log", "COMMIT", "itself"),
    ],
    ids=str,
)
def test_a_connection_that_stalls_until_it_is_cut_leaves_all_or_nothing_and_a_true_error(
    case: Case, lost: Loss, scene: Scene
) -> None:
    fault = scene.lose(lost, case.pattern, then="stall")
    began = time.monotonic()
    with cutting(scene.network, fault):
        ended = scene.commit("a")
    assert time.monotonic() - began > STALL, "it did not wait for the answer"
    assert ended in case.expected(lost)
    scene.check("a", ended)


@contextmanager
def cutting(network: Proxy, fault: Fault) -> Generator[None]:
    """Cut the network a while after it has lost something."""

    def cut() -> None:
        fault.wait()
        time.sleep(STALL)
        network.cut()

    thread = threading.Thread(target=cut)
    thread.start()
    try:
        yield
    finally:
        thread.join()


# ---- and what is asked afterwards is lost as well -------------------------------------------------------------------------


@pytest.mark.representative(
    "postgresql-branch-PREPARE-log_in_another_branch-answer",
    "postgresql-deciding-COMMIT-*-request",
    "mariadb-branch-COMMIT_PREPARED-log_in_a_table-answer",
)
@pytest.mark.parametrize("lost", ["answer", "request"])
@pytest.mark.parametrize(
    "case", [case for case in CASES if case.is_of_decision or case.word in ("PREPARE", "COMMIT PREPARED")], ids=str
)
def test_a_committer_that_asks_what_became_of_it_in_vain_says_so(case: Case, lost: Loss, scene: Scene) -> None:
    scene.lose(lost, case.pattern)
    after = 1 if case.word == "COMMIT" else 0  # of this transaction's own INSERT, which comes first
    asked = [scene.lose(lost, QUESTION[case.word], after=after) for _ in range(12)]
    ended = scene.commit("a")
    assert asked[0].happened
    assert ended in case.expected_if_unreachable()
    scene.check("a", ended)


# ---- and the server hears of it later than the client ---------------------------------------------------------------------


@pytest.mark.representative("mariadb-deciding-COMMIT-*-answer")
@pytest.mark.parametrize("lost", ["answer", "request"])
@pytest.mark.parametrize(
    "case",
    [
        Case("mariadb", "branch", "PREPARE", "a file"),
        Case("mariadb", "branch", "COMMIT PREPARED", "a file"),
        Case("mariadb", "deciding", "COMMIT", "itself"),
        Case("mariadb", "last resource", "COMMIT", "a file"),
    ],
    ids=str,
)
def test_a_client_that_gives_up_before_its_server_does_is_told_the_truth(case: Case, lost: Loss, scene: Scene) -> None:
    """Its transaction may still be open on the server then, hold its locks, and commit."""
    scene.app.container.core.decision_logs().of("hit")._lock_wait = 1.0
    scene.lose(lost, case.pattern, then="stall")
    ended = scene.commit("a")
    assert ended in case.expected_if_held(lost)
    scene.check("a", ended)
