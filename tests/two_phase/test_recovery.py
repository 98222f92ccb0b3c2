"""Recovery brings what a crash left prepared to what was decided about it, touches nothing else, and says what it did."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import NullPool, create_engine, event, make_url, text
from sqlalchemy.exc import DBAPIError

from app_db import DatabaseContainer, DatabaseSettings, container_of
from app_db._two_phase.decision_table import TableLog
from app_db._two_phase.decisions import Verdict
from app_db._two_phase.recovery import KEEP_ABORTS, KEEP_COMMITS, BranchInDoubt, BranchState, Settlement, UnitInDoubt
from app_db._two_phase.xids import Xid, new_log_id, new_unit_id
from app_db._units import commit as commits
from app_db.errors import AbortedByRecovery
from harness.paths import run_python
from harness.servers import MariaDBServer, PostgresServer
from harness.stranded import Scene, sqlite_file, states, stranded

NewUrl = Callable[[], str]

NOWHERE = "postgresql+psycopg://app_db:secret@127.0.0.1:1/nowhere"


@pytest.fixture
def scene(new_postgres_url: NewUrl) -> Iterator[Scene]:
    """A writer, in whose database the log is, and a warehouse."""
    with stranded(writer=new_postgres_url(), warehouse=new_postgres_url()) as scene:
        scene.make_tables()
        yield scene


@pytest.fixture
def mixed(new_postgres_url: NewUrl, new_mariadb_url: NewUrl) -> Iterator[Scene]:
    with stranded(writer=new_postgres_url(), maria=new_mariadb_url()) as scene:
        scene.make_tables()
        yield scene


# ---- what was decided ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["scene", "mixed"])
def test_where_nothing_was_decided_all_branches_are_rolled_back(kind: str, request: pytest.FixtureRequest) -> None:
    scene: Scene = request.getfixturevalue(kind)
    names = tuple(scene.engines)
    unit = scene.prepare(scene.new_unit(), *names)
    settlement = scene.recover()
    assert states(settlement) == {unit: dict.fromkeys(names, "rolled back")}
    assert not settlement.left
    assert [scene.rows(name) for name in names] == [[], []]
    assert [scene.ours(name) for name in names] == [[], []]
    assert scene.decisions() == {unit: "abort"}


@pytest.mark.parametrize("kind", ["scene", "mixed"])
def test_where_it_was_decided_to_commit_all_branches_are_committed(kind: str, request: pytest.FixtureRequest) -> None:
    scene: Scene = request.getfixturevalue(kind)
    names = tuple(scene.engines)
    unit = scene.prepare(scene.new_unit(), *names)
    scene.decide(unit, *names)
    settlement = scene.recover()
    assert states(settlement) == {unit: dict.fromkeys(names, "committed")}
    assert not settlement.left
    assert [scene.rows(name) for name in names] == [[unit], [unit]]
    assert scene.decisions() == {unit: "commit"}


def test_a_decision_in_a_file_counts(new_postgres_url: NewUrl, tmp_path: Path) -> None:
    path = tmp_path / "decisions"
    with stranded(writer=new_postgres_url(), warehouse=new_postgres_url(), decision_log=f"file:{path}") as scene:
        scene.make_tables()
        committed, aborted = (scene.prepare(scene.new_unit(), "writer", "warehouse") for _ in "ab")
        scene.decide(committed, "warehouse", "writer")
        scene.recover()
        assert (scene.rows("writer"), scene.rows("warehouse")) == ([committed], [committed])
        assert scene.decisions() == {committed: "commit", aborted: "abort"}


@pytest.mark.parametrize("kind", ["sqlite", "postgres", "mariadb"])
def test_a_unit_is_decided_in_the_last_resource_with_whose_id_it_begins(
    kind: str, request: pytest.FixtureRequest, new_postgres_url: NewUrl
) -> None:
    url = request.getfixturevalue(f"new_{kind}_url")()
    with stranded(writer=new_postgres_url(), warehouse=new_postgres_url(), old={"url": url, "two_phase": False}) as scene:
        scene.make_tables()
        committed, aborted = (scene.prepare(scene.new_unit("old"), "writer", "warehouse") for _ in "ab")
        scene.decide(committed, "warehouse", "writer", place="old")
        scene.decide(aborted, "warehouse", "writer")  # which is nobody's word about it
        settlement = scene.recover()
        assert not settlement.left
        assert (scene.rows("writer"), scene.rows("warehouse")) == ([committed], [committed])
        assert scene.decisions("old") == {committed: "commit", aborted: "abort"}
        assert scene.decisions() == {aborted: "commit"}


@pytest.mark.parametrize("kind", ["sqlite", "postgres", "mariadb"])
def test_a_unit_that_has_moved_is_decided_where_it_has_moved_to(
    kind: str, request: pytest.FixtureRequest, new_postgres_url: NewUrl
) -> None:
    url = request.getfixturevalue(f"new_{kind}_url")()
    with stranded(writer=new_postgres_url(), warehouse=new_postgres_url(), old={"url": url, "two_phase": False}) as scene:
        scene.make_tables()
        committed, aborted = (scene.prepare(scene.new_unit(), "writer", "warehouse") for _ in "ab")
        for unit in (committed, aborted):
            scene.move(unit, "old", "warehouse", "writer")
        scene.decide(committed, "warehouse", "writer", place="old")
        settlement = scene.recover()
        assert not settlement.left
        assert (scene.rows("writer"), scene.rows("warehouse")) == ([committed], [committed])
        assert scene.decisions("old") == {committed: "commit", aborted: "abort"}
        assert scene.decisions() == {committed: "moved", aborted: "moved"}


def test_a_unit_that_has_moved_to_an_unknown_log_is_left(scene: Scene) -> None:
    unit = scene.prepare(scene.new_unit(), "writer", "warehouse")
    scene.log.decide(unit, Verdict.MOVED, [new_log_id(), "warehouse", "writer"])
    settlement = scene.recover()
    assert states(settlement) == {unit: {"writer": "prepared", "warehouse": "prepared"}}
    assert "another log" in settlement.units[0].reason
    assert scene.decisions() == {unit: "moved"}


def test_a_second_branch_on_one_connection_is_settled_with_the_first(scene: Scene) -> None:
    unit = scene.prepare(scene.new_unit(), "writer", "warehouse", "warehouse.2")
    scene.decide(unit, "warehouse", "writer")
    assert not scene.recover().left
    assert scene.rows("warehouse") == [unit, unit]


def test_a_last_resource_without_a_table_gets_none(new_postgres_url: NewUrl) -> None:
    """Whoever decides in a table makes it and then prepares, so where there is none after that, nobody decides."""
    with stranded(
        writer=new_postgres_url(), warehouse=new_postgres_url(), old={"url": new_postgres_url(), "two_phase": False}
    ) as scene:
        scene.make_tables()
        scene.prepare(scene.new_unit(), "writer", "warehouse")
        assert not scene.recover().left
        with pytest.raises(DBAPIError, match="app_db_decisions"):
            scene.run("old", "SELECT * FROM app_db_decisions")


# ---- what can't be asked ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["always", "when it is asked about the unit"])
def test_without_its_log_a_unit_is_left(
    when: str,
    new_postgres_url: NewUrl,
    new_postgres: Callable[..., PostgresServer],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server = new_postgres()
    server.create_database("log")
    with stranded(
        writer=new_postgres_url(),
        warehouse=new_postgres_url(),
        audit={"url": server.url("log"), "two_phase": False},
        decision_log="audit",
    ) as scene:
        scene.make_tables()
        unit = scene.prepare(scene.new_unit(), "writer", "warehouse")
        scene.log.decisions()
        if when == "always":
            server.stop()
        else:
            decision = TableLog.decision

            def gone(log: TableLog, unit: str) -> Any:
                server.stop("immediate")
                return decision(log, unit)

            monkeypatch.setattr(TableLog, "decision", gone)
        settlement = scene.recover()
        monkeypatch.undo()
        assert settlement.left
        assert states(settlement) == {unit: {"writer": "prepared", "warehouse": "prepared"}}
        if when == "always":
            assert "can't be reached" in settlement.units[0].reason
            assert list(settlement.unreachable) == ["the table app_db_decisions of 'audit'"]
        else:
            assert "'audit' (OperationalError" in settlement.units[0].reason
        assert len(scene.ours("writer")) == len(scene.ours("warehouse")) == 1
        server.start()
        assert not scene.recover().left


def test_units_of_a_damaged_file_are_left(new_postgres_url: NewUrl, tmp_path: Path) -> None:
    with stranded(writer=new_postgres_url(), warehouse=new_postgres_url(), decision_log=f"file:{tmp_path}/decisions") as scene:
        scene.make_tables()
        unit = scene.prepare(scene.new_unit(), "writer", "warehouse")
        (tmp_path / "decisions").write_text("damaged" * 20)
        settlement = scene.new_container().recovery().settle(grace=0)
        assert states(settlement) == {unit: {"writer": "prepared", "warehouse": "prepared"}}
        assert "DecisionFileDamaged" in str(settlement.unreachable)


def test_a_last_resource_that_can_not_be_asked_keeps_only_its_own_units(
    new_postgres_url: NewUrl, new_postgres: Callable[..., PostgresServer]
) -> None:
    server = new_postgres()
    server.create_database("old")
    old = {"url": server.url("old"), "two_phase": False}
    with stranded(writer=new_postgres_url(), warehouse=new_postgres_url(), old=old) as scene:
        scene.make_tables()
        own = scene.prepare(scene.new_unit("old"), "writer", "warehouse")
        moved, doubtful, committed = (scene.prepare(scene.new_unit(), "writer", "warehouse") for _ in "abc")
        scene.move(moved, "old", "warehouse", "writer")
        scene.decide(committed, "warehouse", "writer")
        server.stop("immediate")
        settlement = scene.recover()
        assert states(settlement) == {
            own: dict.fromkeys(["writer", "warehouse"], "prepared"),
            moved: dict.fromkeys(["writer", "warehouse"], "prepared"),
            doubtful: dict.fromkeys(["writer", "warehouse"], "rolled back"),
            committed: dict.fromkeys(["writer", "warehouse"], "committed"),
        }
        assert settlement.left
        server.start()
        assert not scene.recover().left


def test_a_sqlite_file_that_is_not_here_is_not_made_and_its_units_are_left(new_postgres_url: NewUrl, sqlite_url: str) -> None:
    """SQLite would make an empty one, in which nothing is decided: on another host, or in another directory."""
    with stranded(writer=new_postgres_url(), warehouse=new_postgres_url(), lite=sqlite_url) as scene:
        scene.make_tables("writer", "warehouse")
        scene.new_unit()
        unit = scene.prepare(new_unit_id(new_log_id()), "writer", "warehouse")
        for _ in "ab":
            settlement = scene.recover()
            assert states(settlement) == {unit: {"writer": "prepared", "warehouse": "prepared"}}
            assert "another log" in settlement.units[0].reason
            assert not sqlite_file(sqlite_url).exists()
            assert scene.decisions() == {}
        sqlite_file(sqlite_url).touch()
        assert states(scene.recover()) == {unit: {"writer": "prepared", "warehouse": "prepared"}}, "an empty one is no place"


def test_a_database_that_can_not_be_reached_keeps_the_others_from_nothing(scene: Scene) -> None:
    unit = scene.prepare(scene.new_unit(), "writer", "warehouse")
    connections = {**scene.given["connections"], "warehouse": {"url": NOWHERE, "two_phase": True}}
    container = scene.new_container(connections=connections)
    settlement = container.recovery().settle(grace=0)
    assert states(settlement) == {unit: {"writer": "rolled back"}}
    assert list(settlement.unreachable) == ["warehouse"]
    assert settlement.left
    assert "secret" not in str(settlement)
    assert states(scene.recover()) == {unit: {"warehouse": "rolled back"}}
    with pytest.raises(DBAPIError):
        container.recovery().in_doubt()


# ---- what is not ours ---------------------------------------------------------------------------------------------------


def test_what_others_have_prepared_is_not_touched(mixed: Scene) -> None:
    unit = new_unit_id(new_log_id())
    gids = [
        "somebody",
        "stranded:x:y",
        "_1_2",
        str(Xid("another", unit, "writer")),
        f"{mixed.settings.application}:{unit}",
        "ä:ö:ü",
    ]
    for number, gid in enumerate(gids):
        for name in mixed.engines:
            mixed.prepare_as(gid, name, str(number))
    before = [mixed.prepared(name) for name in mixed.engines]
    settlement = mixed.recover()
    assert (settlement.units, settlement.left) == ([], False)
    assert [mixed.prepared(name) for name in mixed.engines] == before
    for gid in gids:
        mixed.run("writer", f"ROLLBACK PREPARED '{gid}'")
        mixed.run("maria", f"XA ROLLBACK '{gid}'")


def test_what_is_decided_in_another_log_is_left_and_told(scene: Scene) -> None:
    """A decision that can't be found here may be there."""
    scene.new_unit()
    unit = scene.prepare(new_unit_id(new_log_id()), "writer", "warehouse")
    settlement = scene.recover()
    assert states(settlement) == {unit: {"writer": "prepared", "warehouse": "prepared"}}
    assert "another log" in settlement.units[0].reason
    assert settlement.left
    assert scene.decisions() == {}


def test_where_there_is_no_log_nothing_is_decided_and_none_is_made(scene: Scene) -> None:
    unit = scene.prepare(new_unit_id(new_log_id()), "writer")
    assert states(scene.recover()) == {unit: {"writer": "prepared"}}
    with pytest.raises(DBAPIError, match="app_db_decisions"):
        scene.run("writer", "SELECT * FROM app_db_decisions")


@pytest.mark.parametrize("log", ["writer", "file"])
def test_applications_that_share_a_log_settle_and_forget_nothing_of_each_other(
    log: str, new_postgres_url: NewUrl, tmp_path: Path
) -> None:
    """Both call a database `warehouse`, and it is another one: what is prepared in one says nothing about the other."""
    shared = new_postgres_url()
    where = f"file:{tmp_path}/decisions" if log == "file" else "writer"
    with (
        stranded(writer=shared, warehouse=new_postgres_url(), decision_log=where) as shop,
        stranded(writer=shared, warehouse=new_postgres_url(), decision_log=where) as billing,
    ):
        shop.make_tables()
        billing.make_tables()
        unit = billing.prepare(billing.new_unit(), "warehouse")
        billing.decide(unit, "warehouse")
        both = billing.prepare(billing.new_unit(), "writer", "warehouse")
        settlement = forgetting_at_once(shop.container)
        assert (settlement.units, settlement.forgotten) == ([], 0)
        assert states(billing.recover()) == {
            unit: {"warehouse": "committed"},
            both: {"writer": "rolled back", "warehouse": "rolled back"},
        }
        assert billing.rows("warehouse") == [unit]


def test_applications_that_share_a_last_resource_forget_nothing_of_each_other(new_postgres_url: NewUrl) -> None:
    old = {"url": new_postgres_url(), "two_phase": False}
    with (
        stranded(writer=new_postgres_url(), old=old) as shop,
        stranded(writer=new_postgres_url(), old=old) as billing,
    ):
        for scene in (shop, billing):
            scene.make_tables()
        unit = billing.prepare(billing.new_unit("old"), "writer")
        billing.decide(unit, "writer", place="old")
        shop.new_unit("old")
        assert forgetting_at_once(shop.container).forgotten == 0
        assert states(billing.recover()) == {unit: {"writer": "committed"}}


def forgetting_at_once(container: DatabaseContainer) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("app_db._two_phase.recovery.KEEP_COMMITS", -1)
        patch.setattr("app_db._two_phase.recovery.KEEP_ABORTS", -1)
        return container.recovery().settle(grace=0)


# ---- who may settle -----------------------------------------------------------------------------------------------------


@pytest.fixture
def clerk(postgres: PostgresServer) -> Iterator[str]:
    name = f"clerk_{time.monotonic_ns()}"
    postgres.execute(f"CREATE ROLE {name} LOGIN PASSWORD 'clerk'")
    yield name
    postgres.execute(f"DROP ROLE {name}")


def as_user(scene: Scene, name: str, user: str) -> str:
    scene.run(name, f"GRANT ALL ON t TO {user}", f"GRANT CREATE, USAGE ON SCHEMA public TO {user}")
    return make_url(scene.given["connections"][name]["url"]).set(username=user, password="clerk").render_as_string(False)


def test_a_branch_of_another_user_is_left_and_named(scene: Scene, clerk: str, request: pytest.FixtureRequest) -> None:
    unit = scene.prepare(scene.new_unit(), "writer", "warehouse")
    url = as_user(scene, "warehouse", clerk)
    request.addfinalizer(lambda: scene.run("warehouse", f"DROP OWNED BY {clerk}"))
    connections = {**scene.given["connections"], "warehouse": {"url": url, "two_phase": True}}
    settlement = scene.new_container(connections=connections).recovery().settle(grace=0)
    assert states(settlement) == {unit: {"writer": "rolled back", "warehouse": "not settled"}}
    left = next(branch for branch in settlement.units[0].branches if branch.state is BranchState.FAILED)
    assert left.owner == "app_db"
    assert "permission" in left.reason
    assert settlement.left
    assert not scene.recover().left


def test_of_several_connections_to_a_database_the_one_that_prepared_settles(
    scene: Scene, clerk: str, request: pytest.FixtureRequest
) -> None:
    """Only the user who has prepared may settle, and the database lists the branch to all."""
    url = as_user(scene, "warehouse", clerk)
    request.addfinalizer(lambda: scene.run("warehouse", f"DROP OWNED BY {clerk}"))
    connections = {
        "writer": scene.given["connections"]["writer"],
        "a_clerk": {"url": url, "two_phase": True},
        "warehouse": scene.given["connections"]["warehouse"],
        "z_clerk": {"url": url, "two_phase": True},
    }
    container = scene.new_container(connections=connections)
    unit = scene.prepare(scene.new_unit(), "warehouse")
    engine = create_engine(url, poolclass=NullPool)
    for name in ("a_clerk", "z_clerk"):
        scene.prepare_as(str(Xid(scene.settings.application, unit, name)), name, unit, engine=engine)
    settlement = container.recovery().settle(grace=0)
    assert states(settlement) == {unit: dict.fromkeys(["a_clerk", "warehouse", "z_clerk"], "rolled back")}
    assert scene.prepared("warehouse") == []


def test_connections_to_one_mariadb_server_list_a_branch_once(new_postgres_url: NewUrl, new_mariadb_url: NewUrl) -> None:
    with stranded(writer=new_postgres_url(), maria=new_mariadb_url(), other=new_mariadb_url()) as scene:
        scene.make_tables()
        unit = scene.prepare(scene.new_unit(), "maria", "other")
        scene.decide(unit, "maria", "other")
        assert states(scene.recover()) == {unit: {"maria": "committed", "other": "committed"}}
        assert scene.rows("maria") == scene.rows("other") == [unit]


def test_on_mariadb_a_branch_is_left_whose_connection_is_open(mixed: Scene) -> None:
    """The server knows it under its xid, and lets nobody else settle it."""
    unit = mixed.prepare(mixed.new_unit(), "maria", hold=True)
    settlement = mixed.recover()
    assert states(settlement) == {unit: {"maria": "held by another connection"}}
    assert settlement.left
    assert mixed.decisions() == {unit: "abort"}
    mixed.let_go()
    assert states(mixed.recover()) == {unit: {"maria": "rolled back"}}


def test_connections_that_the_container_does_not_declare_are_recovered(new_postgres_url: NewUrl) -> None:
    """Another part of the application uses them; one is called like a provider of the container's."""
    with stranded(
        writer=new_postgres_url(), warehouse=new_postgres_url(), unit=new_postgres_url(), declared=("writer",)
    ) as scene:
        scene.make_tables()
        unit = scene.prepare(scene.new_unit(), "writer", "warehouse", "unit")
        assert states(scene.recover()) == {unit: dict.fromkeys(["writer", "warehouse", "unit"], "rolled back")}
        assert scene.container.core.lifecycle.initialized
        scene.container.shutdown_resources()
        assert not scene.container.core.decision_logs().in_use


# ---- grace --------------------------------------------------------------------------------------------------------------


def test_a_young_unit_is_settled_when_it_is_old_enough(scene: Scene) -> None:
    unit = scene.prepare(scene.new_unit(), "writer", "warehouse")
    began = time.monotonic()
    settlement = scene.recover(grace=1.0)
    assert time.monotonic() - began > 0.5
    assert states(settlement) == {unit: {"writer": "rolled back", "warehouse": "rolled back"}}
    assert not settlement.left


def test_progress_counts_the_units_of_all_rounds(scene: Scene) -> None:
    for _ in "ab":
        scene.prepare(scene.new_unit(), "writer")
    told: list[tuple[int, int]] = []
    settlement = scene.recover(grace=0.5, on_unit=lambda done, total: told.append((done, total)))
    assert len(settlement.units) == 2
    assert told[0] == (0, 2)
    assert told[-1] == (2, 2)
    assert told == sorted(told)


def test_a_unit_that_its_committer_ends_in_time_is_no_longer_spoken_of(scene: Scene) -> None:
    unit = scene.prepare(scene.new_unit(), "writer", "warehouse")

    def commit() -> None:
        time.sleep(0.2)
        for name in scene.engines:
            scene.run(name, f"COMMIT PREPARED '{Xid(scene.settings.application, unit, name)}'")

    committer = threading.Thread(target=commit)
    committer.start()
    settlement = scene.recover(grace=30)
    committer.join()
    assert (settlement.units, settlement.left) == ([], False)
    assert scene.rows("writer") == scene.rows("warehouse") == [unit]
    assert scene.decisions() == {}


def test_a_unit_of_the_future_is_settled_after_the_grace(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """The database's clock may be ahead."""
    unit = scene.prepare(scene.new_unit(), "writer", "warehouse")
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() - 3600)
    assert states(scene.recover(grace=0.5)) == {unit: {"writer": "rolled back", "warehouse": "rolled back"}}


def test_a_long_grace_is_not_waited_for(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app_db._two_phase.recovery.GRACE", 0.3)
    unit = scene.prepare(scene.new_unit(), "writer")
    settlement = scene.recover(grace=3600)
    assert states(settlement) == {unit: {"writer": "prepared"}}
    assert (settlement.under_way, settlement.left) == ({unit}, False)


def test_what_was_left_and_is_gone_later_is_settled() -> None:
    def unit_of(state: BranchState, **more: Any) -> UnitInDoubt:
        unit = new_unit_id(new_log_id())
        return UnitInDoubt(unit, 0.0, [BranchInDoubt(Xid("shop", unit, "writer"), ["writer"], state=state)], **more)

    left, ours, theirs = (
        unit_of(BranchState.FAILED),
        unit_of(BranchState.PREPARED, is_under_way=True),
        unit_of(BranchState.COMMITTED),
    )
    young, found = unit_of(BranchState.PREPARED, is_under_way=True), unit_of(BranchState.HELD)
    first = Settlement([left, ours, theirs], forgotten=1)
    assert first.left
    both = first.followed_by(Settlement([young, found], forgotten=2))
    assert states(both) == {
        left.unit: {"writer": "settled by another process"},
        theirs.unit: {"writer": "committed"},
        found.unit: {"writer": "held by another connection"},
    }
    assert (both.forgotten, both.left) == (3, True)


def test_without_grace_nothing_is_young(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    unit = scene.prepare(scene.new_unit(), "writer")
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() - 3600)
    assert states(scene.recover()) == {unit: {"writer": "rolled back"}}


# ---- dry run ------------------------------------------------------------------------------------------------------------


def test_a_dry_run_says_what_would_be_done_and_changes_nothing(new_postgres_url: NewUrl, sqlite_url: str) -> None:
    with stranded(writer=new_postgres_url(), warehouse=new_postgres_url(), lite=sqlite_url) as scene:
        scene.make_tables()
        committed, doubtful = (scene.prepare(scene.new_unit(), "writer", "warehouse") for _ in "ab")
        scene.decide(committed, "warehouse", "writer")
        spent = scene.new_unit()
        scene.decide(spent, "warehouse")
        scene.age(KEEP_COMMITS)
        before = (scene.decisions(), scene.prepared("writer"), scene.prepared("warehouse"))
        settlement = scene.recover(dry_run=True)
        assert {unit.unit: unit.verdict for unit in settlement.units} == {committed: "commit", doubtful: "abort"}
        assert {branch.state for unit in settlement.units for branch in unit.branches} == {BranchState.PREPARED}
        assert (settlement.left, settlement.forgotten) == (True, 1)
        assert (scene.decisions(), scene.prepared("writer"), scene.prepared("warehouse")) == before
        with pytest.raises(DBAPIError, match="no such table"):
            scene.run("lite", "SELECT * FROM app_db_decisions")
        assert scene.recover().forgotten == 2  # what was committed now is not needed any more, either


def test_a_dry_run_makes_no_log(new_postgres_url: NewUrl, tmp_path: Path, sqlite_url: str) -> None:
    for log in ("writer", "lite", f"file:{tmp_path}/decisions"):
        with stranded(writer=new_postgres_url(), lite=sqlite_url, decision_log=log) as scene:
            assert not scene.recover(dry_run=True).left
            with pytest.raises(DBAPIError, match="app_db_decisions"):
                scene.run("writer", "SELECT * FROM app_db_decisions")
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_waits_for_nobody(scene: Scene) -> None:
    scene.prepare(scene.new_unit(), "writer")
    began = time.monotonic()
    settlement = scene.recover(grace=60, dry_run=True)
    assert time.monotonic() - began < 5
    assert [unit.is_under_way for unit in settlement.units] == [True]


def test_what_is_in_doubt_is_listed(scene: Scene) -> None:
    assert scene.container.recovery().in_doubt() == []
    unit = scene.prepare(scene.new_unit(), "writer", "warehouse")
    [found] = scene.container.recovery().in_doubt()
    assert (found.unit, sorted(branch.connection for branch in found.branches)) == (unit, ["warehouse", "writer"])
    assert abs(found.begun_at - time.time()) < 60
    assert {branch.owner for branch in found.branches} == {"app_db"}


# ---- forgetting ---------------------------------------------------------------------------------------------------------


def test_a_decision_is_forgotten_when_no_branch_needs_it_and_no_committer_will_ask(scene: Scene) -> None:
    old, young = scene.new_unit(), scene.new_unit()
    scene.decide(old, "warehouse")
    scene.age(KEEP_COMMITS)
    scene.decide(young, "warehouse")
    assert scene.recover().forgotten == 1
    assert scene.decisions() == {young: "commit"}


def test_a_decision_is_kept_while_a_branch_is_prepared(mixed: Scene) -> None:
    unit = mixed.prepare(mixed.new_unit(), "maria", hold=True)
    mixed.decide(unit, "maria")
    mixed.age(KEEP_COMMITS)
    assert mixed.recover().forgotten == 0
    mixed.let_go()
    assert mixed.recover().forgotten == 1  # which has committed it itself
    assert mixed.rows("maria") == [unit]


def test_a_decision_is_kept_while_a_database_of_its_unit_can_not_be_asked(scene: Scene) -> None:
    unit = scene.new_unit()
    scene.decide(unit, "warehouse")
    scene.age(KEEP_COMMITS)
    unreachable = {**scene.given["connections"], "warehouse": {"url": NOWHERE, "two_phase": True}}
    assert scene.new_container(connections=unreachable).recovery().settle(grace=0).forgotten == 0
    unknown = {"writer": scene.given["connections"]["writer"]}
    container = container_of("writer")(settings=DatabaseSettings(_env_file=None, **{**scene.given, "connections": unknown}))
    assert container.recovery().settle(grace=0).forgotten == 0
    container.shutdown_resources()
    assert scene.decisions() == {unit: "commit"}
    assert scene.recover().forgotten == 1


def test_where_a_unit_has_moved_to_is_kept_for_a_committer_that_has_not_prepared_yet(
    new_postgres_url: NewUrl, sqlite_url: str
) -> None:
    with stranded(writer=new_postgres_url(), warehouse=new_postgres_url(), lite=sqlite_url) as scene:
        scene.make_tables()
        unit = scene.new_unit()
        scene.move(unit, "lite", "warehouse")
        scene.age(KEEP_ABORTS - 60)
        assert scene.recover().forgotten == 0
        scene.age(61)
        connections = {**scene.given["connections"], "warehouse": {"url": NOWHERE, "two_phase": True}}
        assert scene.new_container(connections=connections).recovery().settle(grace=0).forgotten == 0
        assert scene.recover().forgotten == 1
        assert scene.decisions() == {}


def test_an_abort_is_kept_for_a_committer_that_was_suspended_for_days(scene: Scene) -> None:
    unit = scene.prepare(scene.new_unit(), "writer")
    scene.recover()
    scene.age(KEEP_ABORTS - 60)
    assert scene.recover().forgotten == 0
    assert scene.log.decide(unit, Verdict.COMMIT, ["writer"]) is Verdict.ABORT
    scene.age(61)
    assert scene.recover().forgotten == 1
    assert scene.decisions() == {}


def test_decisions_are_read_before_the_databases_are_asked(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or one that is written in between, about a branch that was prepared in between, would be forgotten."""
    monkeypatch.setattr("app_db._two_phase.recovery.KEEP_COMMITS", -1)
    late: list[str] = []
    decisions = TableLog.decisions

    def then_another(log: TableLog) -> Any:
        found = decisions(log)
        if not late:
            late.append(scene.prepare(scene.new_unit(), "warehouse"))
            scene.decide(late[0], "warehouse")
        return found

    monkeypatch.setattr(TableLog, "decisions", then_another)
    scene.new_unit()
    settlement = scene.recover()
    assert states(settlement) == {late[0]: {"warehouse": "committed"}}
    assert settlement.forgotten == 0


def test_acknowledged_decisions_are_forgotten_together(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app_db._two_phase.decision_logs._BATCH", 3)
    places = scene.container.core.decision_logs()
    units = [scene.new_unit() for _ in range(4)]
    for unit in units:
        scene.decide(unit, "warehouse")
        places.acknowledged(scene.log, unit)
    assert scene.decisions() == {units[3]: "commit"}
    scene.container.shutdown_resources()
    assert scene.decisions() == {}


# ---- beside others ------------------------------------------------------------------------------------------------------


def test_recoveries_beside_each_other_agree(scene: Scene) -> None:
    committed, aborted = ([scene.prepare(scene.new_unit(), "writer", "warehouse") for _ in range(8)] for _ in "ab")
    for unit in committed:
        scene.decide(unit, "warehouse", "writer")
    containers = [scene.new_container() for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        settlements = list(pool.map(lambda container: container.recovery().settle(grace=0), containers))
    assert scene.rows("writer") == scene.rows("warehouse") == sorted(committed)
    assert scene.prepared("writer") == scene.prepared("warehouse") == []
    assert set(scene.decisions()) == {*committed, *aborted}
    assert not any(settlement.left for settlement in settlements)


def committing(scene: Scene, *names: str) -> None:
    with scene.container.transaction():
        for name in names:
            getattr(scene.container, f"{name}_session")().execute(text("INSERT INTO t VALUES ('live')"))


def between(monkeypatch: pytest.MonkeyPatch, moment: str, act: Callable[[], Any]) -> list[Any]:
    """Do something at a moment of the next commit; what comes of it is appended to what is returned."""
    number = {"before prepare": 1, "after prepare": 1, "before telling": 2, "after telling": 2}[moment]
    execute_together: Any = vars(commits)["execute_together"]
    calls: list[int] = []
    seen: list[Any] = []

    def watched(*arguments: Any, **options: Any) -> Any:
        calls.append(len(calls) + 1)
        if calls[-1] == number and moment.startswith("before"):
            seen.append(act())
        answers = execute_together(*arguments, **options)
        if calls[-1] == number and moment.startswith("after"):
            seen.append(act())
        return answers

    monkeypatch.setattr(commits, "execute_together", watched)
    return seen


@pytest.mark.representative("writer-after prepare", "audit-before telling")
@pytest.mark.parametrize("moment", ["before prepare", "after prepare", "before telling", "after telling"])
@pytest.mark.parametrize("log", ["writer", "audit"])
def test_a_recovery_beside_a_committer_takes_nothing_apart(
    moment: str, log: str, new_postgres_url: NewUrl, monkeypatch: pytest.MonkeyPatch
) -> None:
    with stranded(writer=new_postgres_url(), warehouse=new_postgres_url(), audit=new_postgres_url(), decision_log=log) as scene:
        scene.make_tables()
        monkeypatch.setitem(TableLog.__init__.__kwdefaults__ or {}, "lock_wait", 0.2)
        other = scene.new_container()
        seen = between(monkeypatch, moment, lambda: other.recovery().settle(grace=0))
        try:
            committing(scene, "writer", "warehouse")
            expected = ["live"]
        except AbortedByRecovery:
            expected = []
        assert len(seen) == 1
        assert scene.rows("writer") == scene.rows("warehouse") == expected
        assert scene.prepared("writer") == scene.prepared("warehouse") == []
        if moment == "after prepare":
            # With the log in the writer, the commit row is under way and holds the recovery off.
            assert expected == (["live"] if log == "writer" else [])
            assert seen[0].left == (log == "writer")
        else:
            assert expected == ["live"]


@pytest.mark.parametrize("made", [False, True])
def test_a_recovery_never_overtakes_the_first_decision_of_a_last_resource(
    made: bool, new_postgres_url: NewUrl, sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lite = {"url": sqlite_url, "connect_args": {"timeout": 0.1}}
    with stranded(writer=new_postgres_url(), warehouse=new_postgres_url(), lite=lite) as scene:
        scene.make_tables()
        if made:
            committing(scene, "writer", "lite")
        other = scene.new_container()
        seen = between(monkeypatch, "after prepare", lambda: other.recovery().settle(grace=0))
        committing(scene, "writer", "warehouse", "lite")
        assert seen[0].left
        assert "lite" in seen[0].units[0].reason
        assert scene.rows("warehouse") == ["live"]
        assert len(scene.rows("writer")) == len(scene.rows("lite")) == 1 + made


def test_a_unit_that_others_settled_meanwhile_is_said_to_be(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    unit = scene.prepare(scene.new_unit(), "writer", "warehouse")
    scene.decide(unit, "warehouse", "writer")
    decision = TableLog.decision

    def after_it_was_settled_and_forgotten(log: TableLog, unit: str) -> Any:
        monkeypatch.setattr(TableLog, "decision", decision)
        assert not scene.new_container().recovery().settle(grace=0).left
        log.forget([unit])
        return decision(log, unit)

    monkeypatch.setattr(TableLog, "decision", after_it_was_settled_and_forgotten)
    settlement = scene.recover()
    assert states(settlement) == {unit: dict.fromkeys(["writer", "warehouse"], "settled by another process")}
    assert scene.rows("writer") == scene.rows("warehouse") == [unit]


# ---- at start -----------------------------------------------------------------------------------------------------------


def test_resources_are_initialised_with_a_recovery_where_the_settings_say_so(scene: Scene) -> None:
    unit = scene.prepare(scene.new_unit(), "writer", "warehouse")
    scene.decide(unit, "warehouse", "writer")
    scene.container.init_resources()
    assert scene.rows("writer") == []
    container = scene.new_container(recover_at_start=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "app_db._two_phase.recovery.Recovery.settle.__kwdefaults__", {"grace": 0.0, "dry_run": False, "on_unit": None}
        )
        container.init_resources()
    assert scene.rows("writer") == scene.rows("warehouse") == [unit]


def test_without_two_phase_connections_nothing_connects_or_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = DatabaseSettings(
        _env_file=None,
        recover_at_start=True,
        connections={"writer": {"url": NOWHERE}, "lite": {"url": f"sqlite:///{tmp_path}/lite.db"}},
    )
    container: Any = container_of("writer", "lite")(settings=settings)
    container.init_resources()
    container.check()
    settlement = container.recovery().settle()
    assert (settlement.units, settlement.unreachable, settlement.left) == ([], {}, False)
    assert container.recovery().in_doubt() == []
    assert not container.writer.engine.is_built
    assert list(tmp_path.iterdir()) == []
    container.shutdown_resources()


FORKS_WHILE_THE_LOCK_IS_HELD = """
import os
from app_db import DatabaseSettings, container_of
container = container_of("writer")(settings=DatabaseSettings(connections={"writer": {"url": "sqlite://"}}))
places = container.core.decision_logs()
with places._lock:  # as another thread may hold it
    pid = os.fork()
    if pid == 0:
        places.of("writer")
        os._exit(0)
    os._exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


def test_a_forked_child_does_not_wait_for_a_thread_that_it_has_not() -> None:
    run_python("-c", FORKS_WHILE_THE_LOCK_IS_HELD)


def test_recovery_keeps_no_connection(scene: Scene, postgres: PostgresServer) -> None:
    scene.prepare(scene.new_unit(), "writer", "warehouse")
    taken: list[Any] = []
    for name in scene.engines:
        engine = scene.container.core.decision_logs().engine(name)
        event.listen(engine, "checkout", lambda *arguments: taken.append(1))
        event.listen(engine, "checkin", lambda *arguments: taken.pop())
    scene.recover()
    assert taken == []
    assert postgres.open_transactions(str(make_url(scene.given["connections"]["writer"]["url"]).database)) == []


def test_mariadb_is_as_good_a_place_for_the_log(mariadb: MariaDBServer, new_mariadb_url: NewUrl) -> None:
    with stranded(writer=new_mariadb_url(), warehouse=new_mariadb_url()) as scene:
        scene.make_tables()
        committed, aborted = (scene.prepare(scene.new_unit(), "writer", "warehouse") for _ in "ab")
        scene.decide(committed, "warehouse", "writer")
        assert not scene.recover().left
        assert scene.rows("writer") == scene.rows("warehouse") == [committed]
        assert scene.decisions() == {committed: "commit", aborted: "abort"}
