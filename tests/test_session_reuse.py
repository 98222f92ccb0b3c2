"""What nobody can notice about a session that has served another unit of work before."""

from __future__ import annotations

import gc
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from sqlalchemy import event, select
from sqlalchemy.orm import Session, object_session, sessionmaker
from sqlalchemy.orm.session import _sessions
from sqlalchemy.util import immutabledict

from app_db._sessions.idle_sessions import IdleSessions
from app_db._sessions.sessions import UnitSession
from app_db.errors import UnitOfWorkEnded
from items import Item, opened

pytestmark = pytest.mark.skipif(
    sys.implementation.name != "cpython" or not getattr(sys, "_is_gil_enabled", lambda: True)(), reason="needs exact counts"
)


@pytest.fixture
def container(sqlite_url: str) -> Iterator[Any]:
    with opened({"writer": sqlite_url}) as databases:
        yield databases.container


def serve(container: Any) -> int:
    """Use a session that nobody keeps; return which it was."""
    with container.transaction():
        container.writer_session().execute(select(Item))
        return id(container.writer_session())


def idle(container: Any) -> list[Any]:
    """Return the sessions that wait for a unit."""
    make = container.writer_sessionmaker().kw["home"].idle._make
    return list(make.idle) if make is not None else []


def test_a_session_that_nobody_keeps_serves_the_next_unit(container: Any) -> None:
    first = serve(container)
    assert [id(session) for session in idle(container)] == [first]
    assert [serve(container) for _ in range(3)] == [first] * 3
    assert idle(container)[0] not in _sessions.values()  # close_all_sessions() doesn't find it


class Special(UnitSession):
    """A kind of session of the application's own."""


@pytest.mark.parametrize("used_before", [False, True])
def test_a_maker_that_takes_the_place_of_ours_is_the_one_that_makes_them(container: Any, used_before: bool) -> None:
    """Even one that is made of ours, and of which the sessions have so much in common."""
    ours = container.writer_sessionmaker()
    if used_before:
        serve(container)
    own = sessionmaker(class_=Special, **{**ours.kw, "expire_on_commit": False})
    with container.writer_sessionmaker.override(own):
        container.writer_scoped_session.reset()
        for _ in range(2):
            with container.transaction():
                session = container.writer_session()
                assert isinstance(session, Special)
                assert not session.expire_on_commit
                session.execute(select(Item))
            del session
    container.writer_scoped_session.reset()
    with container.transaction():
        session = container.writer_session()
        assert not isinstance(session, Special)
        assert session.expire_on_commit


def test_only_so_many_wait(container: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(IdleSessions, "_most", 0)
    serve(container)
    assert idle(container) == []


def test_one_that_is_kept_is_refused_and_serves_no_other_unit(container: Any) -> None:
    serve(container)
    with container.transaction():
        kept = container.writer_session()
        kept.execute(select(Item))
    assert idle(container) == []
    with container.transaction():
        assert container.writer_session() is not kept
        with pytest.raises(UnitOfWorkEnded):
            kept.execute(select(Item))


def test_one_that_is_kept_in_a_closure_or_weakly_serves_no_other_unit(container: Any) -> None:
    with container.transaction():
        reference = weakref.ref(container.writer_session())
        container.writer_session().execute(select(Item))
    assert idle(container) == []
    assert reference() is None  # as ever, it goes with its unit
    with container.transaction():
        count = container.writer_session().scalar
        count(select(Item))
    assert idle(container) == []
    with pytest.raises(UnitOfWorkEnded):
        count(select(Item))


def listen(session: Session) -> None:
    event.listen(session, "after_commit", lambda session: None)


def set_autoflush(session: Session) -> None:
    session.autoflush = False


def set_info(session: Session) -> None:
    session.info["user"] = "somebody"


def set_attribute(session: Any) -> None:
    session.user = "somebody"


def swap_attributes(session: Any) -> None:
    session.user = "somebody"
    del session.enable_baked_queries


def bind_mapper(session: Session) -> None:
    session.bind_mapper(Item, session.get_bind())


def set_options(session: Any) -> None:
    session.execution_options = immutabledict({"yield_per": 5})  # before SQLAlchemy 2.1 they mean nothing, and are refused alike


CHANGES: list[Callable[[Any], None]] = [
    listen,
    set_autoflush,
    set_info,
    set_attribute,
    swap_attributes,
    bind_mapper,
    set_options,
]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("served", [0, 1])
def test_one_that_was_changed_serves_no_other_unit(container: Any, change: Callable[[Any], None], served: int) -> None:
    for _ in range(served):
        serve(container)
    with container.transaction():
        change(container.writer_session())
        container.writer_session().execute(select(Item))
    assert idle(container) == []


def test_the_sessionmakers_arguments_count_from_the_next_unit_on(container: Any) -> None:
    serve(container)
    container.writer_sessionmaker().configure(autoflush=False)
    for _ in range(2):
        with container.transaction():
            assert container.writer_session().autoflush is False
    container.writer_sessionmaker().configure(info={"user": "somebody"})
    for _ in range(2):
        with container.transaction():
            container.writer_session().info["user"] += "!"
            assert container.writer_session().info["user"] == "somebody!"
            container.writer_session().execute(select(Item))
        assert idle(container) == []
    container.writer_sessionmaker().configure(info={"log": []})  # what is in it isn't looked into
    serve(container)
    assert idle(container) == []


def test_a_session_that_was_rolled_back_serves_no_other_unit(container: Any) -> None:
    with pytest.raises(ZeroDivisionError), container.transaction():
        container.writer_session().execute(select(Item))
        raise ZeroDivisionError
    assert idle(container) == []


def test_objects_of_the_unit_that_ended_stay_detached(container: Any) -> None:
    with container.transaction():
        written = Item(name="written")
        container.writer_session().add(written)
        loading = Item(name="loading")
        container.writer_session().enable_relationship_loading(loading)  # and never added
    assert len(idle(container)) == 1
    with container.transaction():
        container.writer_session().execute(select(Item))
        assert idle(container) == []
        assert object_session(written) is None
        assert object_session(loading) is None
        assert list(container.writer_session()) == []


def test_one_that_is_not_empty_serves_no_other_unit(container: Any) -> None:
    serve(container)
    (session,) = idle(container)
    make = container.writer_sessionmaker().kw["home"].idle._make
    assert make.fits(session)
    session._new[object()] = object()  # nothing known does this to a session that was closed
    assert not make.fits(session)


def test_one_that_waits_holds_no_engine(container: Any) -> None:
    serve(container)
    assert idle(container)[0].bind is None
    engine = weakref.ref(container.writer_engine())
    container.writer_engine.reset()
    gc.collect()
    assert engine() is None


def test_threads_never_share_one(container: Any) -> None:
    in_use: set[int] = set()
    shared: list[int] = []

    def work() -> None:
        for number in range(20):
            with container.transaction():
                identity = id(container.writer_session())
                if identity in in_use:
                    shared.append(identity)
                in_use.add(identity)
                container.writer_session().execute(select(Item))
                if number % 3 == 0 and number < 15:
                    container.writer_session().info["user"] = "somebody"  # so that it isn't used again
                in_use.discard(identity)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert shared == []
    assert len(idle(container)) <= 8
