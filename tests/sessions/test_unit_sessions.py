"""Each unit of work has a session of its own: nothing of an ended unit's session reaches the next one."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from contextvars import copy_context
from typing import Any

import pytest
from sqlalchemy import event, select
from sqlalchemy.orm import Session, object_session, sessionmaker
from sqlalchemy.orm.events import SessionEvents

from app_db._sessions.sessions import UnitSession
from app_db.errors import UnitOfWorkEnded
from harness.items import Item, opened

KINDS = ["writer_session", "session"]


@pytest.fixture
def container(sqlite_url: str) -> Iterator[Any]:
    with opened({"writer": sqlite_url}) as databases:
        yield databases.container


@pytest.fixture(params=KINDS)
def ask(request: pytest.FixtureRequest, container: Any) -> Callable[[], Any]:
    """Return the current unit's session: that of a connection, and the one that finds its database."""
    session: Callable[[], Any] = getattr(container, request.param)
    return session


# ---- who keeps the session of an ended unit -----------------------------------------------------------------------------


@pytest.mark.parametrize("fails", [False, True], ids=["committed", "rolled back"])
def test_a_session_that_is_kept_is_refused_in_and_after_the_next_unit(
    container: Any, ask: Callable[[], Any], fails: bool
) -> None:
    with suppress(ZeroDivisionError), container.transaction():
        kept = ask()
        kept.execute(select(Item))
        if fails:
            raise ZeroDivisionError
    with container.transaction():
        assert ask() is not kept
        ask().execute(select(Item))
        with pytest.raises(UnitOfWorkEnded):
            kept.execute(select(Item))
    with pytest.raises(UnitOfWorkEnded):
        kept.add(Item(name="a"))


def test_a_method_of_a_session_that_is_kept_is_refused(container: Any, ask: Callable[[], Any]) -> None:
    with container.transaction():
        count = ask().scalar
        count(select(Item))
    with container.transaction():
        ask().execute(select(Item))
        with pytest.raises(UnitOfWorkEnded):
            count(select(Item))


def test_a_session_that_nobody_keeps_goes_with_its_unit(container: Any, ask: Callable[[], Any]) -> None:
    """Without waiting for the garbage collector: nothing in app_db holds it, not even in a circle."""
    gc.disable()
    try:
        with container.transaction():
            ask().add(Item(name="a"))
            ask().flush()
            reference = weakref.ref(ask())
        assert reference() is None
    finally:
        gc.enable()


def test_an_ended_unit_keeps_no_engine(container: Any, ask: Callable[[], Any]) -> None:
    with container.transaction():
        ask().execute(select(Item))
    engine = weakref.ref(container.writer_engine())
    container.writer_engine.reset()
    gc.collect()
    assert engine() is None


def test_objects_of_the_unit_that_ended_stay_detached(container: Any, ask: Callable[[], Any]) -> None:
    with container.transaction():
        written = Item(name="written")
        ask().add(written)
        loading = Item(name="loading")
        ask().enable_relationship_loading(loading)  # and never added
    with container.transaction():
        ask().execute(select(Item.name))
        assert object_session(written) is None
        assert object_session(loading) is None
        assert list(ask()) == []


# ---- what was done to the session of an ended unit ----------------------------------------------------------------------


def listen(session: Session) -> None:
    event.listen(session, "after_commit", lambda session: None)


def set_autoflush(session: Session) -> None:
    session.autoflush = False


def set_info(session: Session) -> None:
    session.info["user"] = "somebody"


def set_attribute(session: Any) -> None:
    session.user = "somebody"


def bind_table(session: Session) -> None:
    session.bind_mapper(Item, session.get_bind())


def state_of(session: Any) -> Any:
    """What the session of a new unit has: its attributes, its info, and how many listen to each event."""
    names = [name for name, member in vars(SessionEvents).items() if callable(member) and not name.startswith("_")]
    changing = {"_new", "_deleted", "identity_map", "dispatch", "hash_key", "_work"}
    attributes = {name: value for name, value in vars(session).items() if name not in changing}
    return attributes, dict(session.info), {name: len(getattr(session.dispatch, name)) for name in names}


@pytest.mark.parametrize("change", [listen, set_autoflush, set_info, set_attribute, bind_table])
def test_what_was_done_to_a_session_ends_with_its_unit(
    container: Any, ask: Callable[[], Any], change: Callable[[Any], None]
) -> None:
    with container.transaction():
        before = state_of(ask())
    with container.transaction():
        change(ask())
        ask().execute(select(Item))
        assert state_of(ask()) != before
    with container.transaction():
        assert state_of(ask()) == before


def test_info_begins_with_what_the_sessionmaker_says_in_each_unit(container: Any) -> None:
    container.writer_sessionmaker().configure(info={"user": "somebody"})
    for _ in range(2):
        with container.transaction():
            container.writer_session().info["user"] += "!"
            assert container.writer_session().info == {"user": "somebody!"}


# ---- what is done to the sessionmaker and to the class --------------------------------------------------------------------


def test_the_sessionmakers_arguments_count_from_the_next_unit_on(container: Any) -> None:
    with container.transaction():
        assert container.writer_session().autoflush is True
        container.writer_sessionmaker().configure(autoflush=False)
        assert container.writer_session().autoflush is True
    for _ in range(2):
        with container.transaction():
            assert container.writer_session().autoflush is False


TARGETS: dict[str, Callable[[Any], Any]] = {
    "every session": lambda container: Session,
    "every session of a unit": lambda container: UnitSession,
    "the sessionmaker": lambda container: container.writer_sessionmaker(),
    "the scoped session": lambda container: container.writer_scoped_session(),
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("used_before", [False, True])
def test_listeners_hear_of_each_units_session_as_long_as_they_listen(container: Any, target: str, used_before: bool) -> None:
    heard: list[int] = []

    def listener(session: Any, _: object) -> None:
        heard.append(id(session))

    def serve() -> int:
        with container.transaction():
            container.writer_session().add(Item(name=str(len(heard))))
            return id(container.writer_session())

    if used_before:
        with container.transaction():
            container.writer_session().execute(select(Item))
    listens_to = TARGETS[target](container)
    event.listen(listens_to, "after_flush", listener)
    try:
        assert [serve(), serve()] == heard
    finally:
        event.remove(listens_to, "after_flush", listener)
    with container.transaction():
        container.writer_session().add(Item(name="unheard"))
    assert len(heard) == 2


class Special(UnitSession):
    """A kind of session of the application's own."""


@pytest.mark.parametrize("used_before", [False, True])
def test_a_maker_that_takes_the_place_of_ours_is_the_one_that_makes_them(container: Any, used_before: bool) -> None:
    """Even one that is made of ours, and of which the sessions have so much in common."""
    ours = container.writer_sessionmaker()
    if used_before:
        with container.transaction():
            container.writer_session().execute(select(Item))
    own = sessionmaker(class_=Special, **{**ours.kw, "expire_on_commit": True})
    with container.writer_sessionmaker.override(own):
        container.writer_scoped_session.reset()
        for _ in range(2):
            with container.transaction():
                assert isinstance(container.writer_session(), Special)
                assert container.writer_session().expire_on_commit is True
                container.writer_session().execute(select(Item))
        with container.transaction():
            container.session().execute(select(Item))
            found = container.core.coordinator().get().sessions["writer"]
            assert isinstance(found, Special), "nothing stands for a session whose class may do more"
    container.writer_scoped_session.reset()
    with container.transaction():
        assert not isinstance(container.writer_session(), Special)
        assert container.writer_session().expire_on_commit is False


# ---- threads --------------------------------------------------------------------------------------------------------------


def test_units_side_by_side_never_share_a_session(container: Any) -> None:
    ready, got = threading.Barrier(4), list[Any]()

    def work() -> None:
        with container.transaction(read_only=True):
            got.append(container.writer_session())
            container.writer_session().execute(select(Item))
            ready.wait(30)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id(session) for session in got}) == 4


def add_and_flush(session: Session) -> None:
    session.add(Item(name="a"))
    session.flush()


FLUSHES: dict[str, Callable[[Any], None]] = {
    "flush": add_and_flush,
    "bulk_save_objects": lambda session: session.bulk_save_objects([Item(name="a")]),
    "bulk_insert_mappings": lambda session: session.bulk_insert_mappings(Item.__mapper__, [{"name": "a", "amount": 1}]),
}


@pytest.mark.representative("session-flush", "writer_session-bulk_save_objects")
@pytest.mark.parametrize("flush", FLUSHES)
def test_a_unit_is_rolled_back_after_another_threads_flush_has_ended(container: Any, ask: Callable[[], Any], flush: str) -> None:
    sent, goes_on, order = threading.Event(), threading.Event(), list[str]()

    def wait(*arguments: Any) -> None:
        if arguments[2].startswith("INSERT"):
            sent.set()
            goes_on.wait(30)
            order.append("inserted")

    event.listen(container.writer_engine(), "after_cursor_execute", wait)
    event.listen(container.writer_engine(), "rollback", lambda _: order.append("rolled back"))
    with pytest.raises(ZeroDivisionError), container.transaction():
        thread = threading.Thread(target=copy_context().run, args=(FLUSHES[flush], ask()))
        thread.start()
        assert sent.wait(30)
        threading.Timer(0.3, goes_on.set).start()
        raise ZeroDivisionError
    thread.join()
    assert order == ["inserted", "rolled back"]
