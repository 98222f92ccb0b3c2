"""Containers behave as dependency-injector's containers do, whatever is done to them: each idiom is injected for real."""

from __future__ import annotations

import asyncio
import copy
import gc
import inspect
import sqlite3
import sys
import weakref
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import transaction
from dependency_injector import containers, providers
from dependency_injector.wiring import Provide, inject
from sqlalchemy import create_engine, text
from sqlalchemy.engine import Engine
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import Session

from app_db import (
    Connection,
    ConnectionSettings,
    ContextTransactionManager,
    DatabaseContainer,
    DatabaseSettings,
    UnitOfWork,
    container_of,
    transactional,
)
from app_db.errors import ConnectionNotConfigured, InvalidUse, NotWired, NoUnitOfWork, UnknownConnection
from harness.servers import PostgresServer

KINDS = ("engine", "sessionmaker", "scoped_session", "session")
ALL_KINDS = (*KINDS, *(f"async_{kind}" for kind in KINDS))
NOWHERE = "postgresql+psycopg://nobody:nothing@127.0.0.1:1/nothing"
"""Nobody listens there: whoever connects is found out."""


class Shop(DatabaseContainer):
    writer = Connection()
    log = Connection()


class Application(containers.DeclarativeContainer):
    greeting = providers.Object("hello")
    db = providers.Container(Shop)


class TwoShops(containers.DeclarativeContainer):
    db = providers.Container(Shop)
    archive = providers.Container(Shop)


def where(session: Session) -> str:
    """The name of the database's file, from the database itself."""
    return Path(session.execute(text("SELECT file FROM pragma_database_list")).scalar_one()).stem


# ---- the functions that are injected -----------------------------------------------------------------------------------


@transactional
def by_flat_name(session: Session = Provide[Shop.writer_session]) -> str:
    return where(session)


@transactional
def by_path(session: Session = Provide[Shop.writer.session]) -> str:
    return where(session)


@transactional
def by_flat_string(session: Session = Provide["writer_session"]) -> str:
    return where(session)


@transactional
def by_path_string(session: Session = Provide["writer.session"]) -> str:
    return where(session)


FORMS = (by_flat_name, by_path, by_flat_string, by_path_string)
STRING_FORMS = (by_flat_string, by_path_string)
CLASS_FORMS = (by_flat_name, by_path)


@transactional
def the_session(session: Session = Provide["writer_session"]) -> Session:
    return session


@transactional
def by_application(session: Session = Provide[Application.db.writer_session]) -> str:
    return where(session)


@transactional
def by_application_container(session: Session = Provide[Application.db.container.writer.session]) -> str:
    return where(session)


@transactional
def by_application_path(session: Session = Provide["db.writer.session"], greeting: str = Provide["greeting"]) -> str:
    assert greeting == "hello"
    return where(session)


@transactional
def by_one_of_two(session: Session = Provide["db.writer_session"]) -> str:
    return where(session)


@transactional(container="db")
def by_the_named_one(session: Session = Provide["db.writer_session"]) -> str:
    return where(session)


@transactional(container="archive")
def by_the_other_one(session: Session = Provide["archive.writer_session"]) -> str:
    return where(session)


@inject
def insert(sku: str, session: Session = Provide[Shop.writer_session]) -> Session:
    session.execute(text("INSERT INTO orders VALUES (:sku)"), {"sku": sku})
    return session


@inject
def count(session: Session = Provide["writer_session"]) -> int:
    return int(session.execute(text("SELECT count(*) FROM orders")).scalar_one())


class Service:
    """Methods of every sort."""

    def __init__(self, sku: str) -> None:
        self.sku = sku

    @transactional
    def method(self, session: Session = Provide[Shop.writer_session]) -> tuple[str, str]:
        return self.sku, where(session)

    @staticmethod
    @transactional
    def static(session: Session = Provide[Shop.writer_session]) -> str:
        return where(session)

    @classmethod
    @transactional
    def of_class(cls, session: Session = Provide[Shop.writer_session]) -> tuple[str, str]:
        return cls.__name__, where(session)


# ---- fixtures ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def settings_of(tmp_path: Path) -> Callable[..., DatabaseSettings]:
    """`settings_of("first")` has the writer's database in first.db, and the log's in first_log.db."""

    def settings(name: str, **connections: Any) -> DatabaseSettings:
        urls = {"writer": f"sqlite:///{tmp_path / name}.db", "log": f"sqlite:///{tmp_path / name}_log.db"}
        return DatabaseSettings(connections={key: ConnectionSettings(url=url) for key, url in urls.items()} | connections)

    return settings


@pytest.fixture
def settings(settings_of: Callable[..., DatabaseSettings]) -> DatabaseSettings:
    return settings_of("first")


@pytest.fixture
def wire() -> Iterator[Callable[[Any], Any]]:
    """`wire(container)` wires this module to it until the test ends, and then disposes the engines."""
    wired: list[Any] = []

    def wire(container: Any) -> Any:
        container.wire(modules=[__name__])
        wired.append(container)
        return container

    yield wire
    for container in wired:
        container.unwire()
        container.shutdown_resources()


@pytest.fixture
def container(settings: DatabaseSettings, wire: Callable[[Any], Any]) -> Any:
    return wire(Shop(settings=settings))


def results(forms: tuple[Callable[[], str], ...] = FORMS) -> set[str]:
    return {form() for form in forms}


def is_open(connection: Any) -> bool:
    """Whether a DBAPI connection of SQLite's is open."""
    try:
        connection.execute("SELECT 1")
    except sqlite3.ProgrammingError:
        return False
    return True


def driver_connection(session: Session) -> Any:
    return session.connection().connection.driver_connection


# ---- what a function can ask for ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_every_form_of_asking_gives_the_session_of_the_unit(container: Any, form: Callable[[], str]) -> None:
    with container.transaction():
        assert form() == where(container.writer_session()) == "first"
    assert form() == "first"


def test_all_forms_give_the_same_session_inside_a_unit(container: Any) -> None:
    @inject
    def all_forms(
        a: Session = Provide[Shop.writer_session],
        b: Session = Provide[Shop.writer.session],
        c: Session = Provide["writer_session"],
        d: Session = Provide["writer.session"],
    ) -> set[Session]:
        return {a, b, c, d}

    container.wire(modules=[__name__])
    with container.transaction():
        assert all_forms() == {container.writer_session()}


def test_every_kind_of_provider_can_be_injected(container: Any) -> None:
    @transactional
    def kinds(
        *,
        engine: Engine = Provide[Shop.writer_engine],
        maker: Any = Provide[Shop.writer.sessionmaker],
        scoped: Any = Provide["writer_scoped_session"],
        session: Session = Provide["writer.session"],
        unit: UnitOfWork = Provide[Shop.unit],
        same_unit: UnitOfWork = Provide["unit"],
    ) -> None:
        assert session.get_bind() is engine
        assert scoped() is session
        assert isinstance(session, maker.class_)
        assert unit.transaction is same_unit.transaction is container.transaction_manager().get()

    container.wire(modules=[__name__])
    kinds()


def test_the_unit_provider_gives_the_unit_under_way_and_refuses_outside(container: Any) -> None:
    calls: list[str] = []
    with container.transaction() as unit:
        assert container.unit().transaction is unit.transaction
        container.unit().on_commit(calls.append, "committed")
        assert calls == []
    assert calls == ["committed"]
    with pytest.raises(NoUnitOfWork, match=r"with container\.transaction\(\):"):
        container.unit()


def test_nested_injected_functions_share_one_session_and_commit_together(container: Any) -> None:
    with container.transaction():
        container.writer_session().execute(text("CREATE TABLE orders (sku TEXT)"))
    seen: list[Session] = []

    @transactional
    def outer(fail: bool, session: Session = Provide[Shop.writer_session]) -> int:
        seen.extend([session, insert("A-1"), insert("A-2")])
        if fail:
            raise LookupError("after two inserts")
        return count()

    container.wire(modules=[__name__])
    with pytest.raises(LookupError):
        outer(True)
    assert len({id(session) for session in seen}) == 1
    assert outer(False) == 2
    with container.transaction():
        assert count() == 2


# ---- the decorated function ---------------------------------------------------------------------------------------------


def test_a_decorated_function_keeps_name_docstring_module_and_the_callers_part_of_its_signature() -> None:
    def place_order(sku: str, *, amount: int = 1, session: Session = Provide[Shop.writer_session]) -> None:
        """Place an order."""

    for decorated in (transactional(place_order), transactional(attempts=3)(place_order)):
        assert decorated is not place_order
        assert str(inspect.signature(decorated)) == "(sku: str, *, amount: int = 1) -> None"
        assert decorated.__name__ == "place_order"
        assert decorated.__qualname__ == place_order.__qualname__
        assert decorated.__doc__ == "Place an order."
        assert decorated.__module__ == __name__
        assert decorated.__annotations__ == place_order.__annotations__


def test_methods_static_methods_and_class_methods_are_injected(container: Any) -> None:
    assert Service("A-1").method() == ("A-1", "first")
    assert Service.static() == Service("A-1").static() == "first"
    assert Service.of_class() == Service("A-1").of_class() == ("Service", "first")


@pytest.mark.parametrize("kind", [staticmethod, classmethod])
def test_the_wrong_order_of_decorators_is_refused_with_the_right_one(kind: Any) -> None:
    def function(session: Session = Provide[Shop.writer_session]) -> None: ...

    with pytest.raises(InvalidUse, match=f"Write @{kind.__name__} above it"):
        transactional(kind(function))


def test_an_explicit_session_is_respected(container: Any) -> None:
    mine = Session()
    assert the_session(session=mine) is mine
    assert the_session() is not mine
    with container.transaction():
        assert the_session(session=mine) is mine


def test_an_explicit_session_given_by_position_is_respected(container: Any) -> None:
    mine = Session()
    assert cast("Any", the_session)(mine) is mine


def test_a_function_decorated_after_wiring_is_refused_until_wired_again(container: Any) -> None:
    @transactional
    def late(session: Session = Provide[Shop.writer_session]) -> str:
        return where(session)

    with pytest.raises(NotWired, match=r"container\.wire\(modules=\['.*test_container'\]\)"):
        late()
    container.wire(modules=[__name__])
    assert late() == "first"


def test_a_marker_that_names_nothing_is_refused_by_name(container: Any) -> None:
    @transactional
    def misspelt(session: Session = Provide["wirter_session"]) -> None:
        pytest.fail("the body ran")

    container.wire(modules=[__name__])
    with pytest.raises(NotWired, match=r"parameter 'session' of .*misspelt was not injected") as caught:
        misspelt()
    assert caught.value.parameter == "session"
    assert "wirter_session" in str(caught.value)
    with pytest.raises(NotWired), container.transaction():
        misspelt()


def test_an_unwired_container_leaves_functions_refused(container: Any) -> None:
    assert by_flat_name() == "first"
    container.unwire()
    with pytest.raises(NotWired):
        by_flat_name()


# ---- overriding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flat", [True, False])
def test_an_overridden_session_reaches_every_form_and_goes_back(container: Any, flat: bool) -> None:
    other = create_engine("sqlite://")
    provider = container.writer_session if flat else container.writer.session
    with Session(other) as stand_in, provider.override(stand_in):
        assert results() == {""}
        assert the_session() is stand_in
    assert results() == {"first"}
    other.dispose()


def test_settings_given_to_the_constructor_are_used(container: Any) -> None:
    assert results() == {"first"}


def test_settings_are_read_from_the_environment_when_none_are_given(
    wire: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    container = wire(Shop())  # and not before the first use
    monkeypatch.setenv("APP_DB_CONNECTIONS__WRITER__URL", f"sqlite:///{tmp_path}/environment.db")
    assert results() == {"environment"}
    with container.transaction(), pytest.raises(ConnectionNotConfigured, match="APP_DB_CONNECTIONS__LOG__URL"):
        container.log_session()


@pytest.mark.parametrize("how", ["object", "singleton", "callable"])
def test_a_subclass_may_redefine_settings(
    settings_of: Callable[..., DatabaseSettings], wire: Callable[[Any], Any], how: str
) -> None:
    wanted = settings_of("redefined")
    made = {
        "object": providers.Object(wanted),
        "singleton": providers.ThreadSafeSingleton(lambda: wanted),
        "callable": providers.Callable(lambda: wanted),
    }[how]
    container = wire(cast("Any", type(Shop))("Redefined", (Shop,), {"settings": made})())
    assert results(STRING_FORMS) == {"redefined"}
    assert results(CLASS_FORMS) == {"redefined"}, "the providers are inherited, so the base's names work too"
    assert container.core.coordinator().atomicity() == "strict"


def test_a_subclass_may_redefine_the_transaction_manager(settings: DatabaseSettings, wire: Callable[[Any], Any]) -> None:
    class Redefined(Shop):
        transaction_manager = providers.Object(transaction.manager)

    class Own(Shop):
        transaction_manager = providers.ThreadSafeSingleton(ContextTransactionManager)

    container = wire(Redefined(settings=settings))
    transaction.begin()
    assert results() == {"first"}
    assert container.unit().transaction is transaction.get()
    transaction.abort()
    container.unwire()

    own = wire(Own(settings=settings))
    assert results() == {"first"}
    assert own.core.coordinator().manager is own.transaction_manager()
    assert own.transaction_manager() is own.transaction_manager()


def test_a_transaction_manager_given_to_the_constructor_is_used(settings: DatabaseSettings, wire: Callable[[Any], Any]) -> None:
    manager = ContextTransactionManager()
    container = wire(Shop(settings=settings, transaction_manager=manager))
    with manager:
        assert container.unit().transaction is manager.get()
        assert results() == {"first"}


def test_a_copied_container_class_is_found_by_strings_and_says_so_for_the_originals_markers(
    settings: DatabaseSettings, wire: Callable[[Any], Any]
) -> None:
    @containers.copy(Shop)
    class Copy(DatabaseContainer):
        pass

    @transactional
    def by_copy(session: Session = Provide[Copy.writer_session]) -> str:
        return where(session)

    wire(Copy(settings=settings))
    assert results(STRING_FORMS) == {"first"}
    assert by_copy() == "first"
    for form in CLASS_FORMS:
        with pytest.raises(NotWired, match=r"use the string form, `Provide\['NAME_session'\]`"):
            form()


def test_an_overriding_container_class_replaces_providers_in_all_instances(
    settings_of: Callable[..., DatabaseSettings], wire: Callable[[Any], Any]
) -> None:
    class Overridden(Shop):
        pass

    @containers.override(Overridden)
    class _Overriding(containers.DeclarativeContainer):
        settings = providers.Object(settings_of("overriding"))

    wire(Overridden())
    assert results() == {"overriding"}
    Shop.settings.reset_override()  # the provider that was overridden is the base class's too


def test_override_providers_lasts_as_long_as_its_block(container: Any, settings_of: Callable[..., DatabaseSettings]) -> None:
    engine = create_engine(f"sqlite:///{Path.cwd() / 'second.db'}")
    with container.override_providers(writer_engine=engine):
        assert results() == {"second"}
    assert results() == {"first"}
    container.override_providers(writer_engine=engine)
    assert results() == {"second"}
    container.writer_engine.reset_override()
    assert results() == {"first"}
    engine.dispose()


def test_an_engine_overridden_after_its_sessions_were_made_is_used_by_the_next_unit(container: Any) -> None:
    """The fact guarded: overriding the engine after the sessionmaker exists does nothing until the maker is made anew."""
    assert results() == {"first"}
    engine = create_engine(f"sqlite:///{Path.cwd() / 'second.db'}")
    with container.transaction():
        assert where(container.writer_session()) == "first"
        with container.writer_engine.override(engine):
            assert where(container.writer_session()) == "first", "a unit stays where it began"
            with container.transaction("requires_new"):
                assert where(container.writer_session()) == "second"
    with container.writer.engine.override(engine):
        assert results() == {"second"}
    assert results() == {"first"}
    engine.dispose()


def test_a_reset_engine_is_made_from_the_settings_of_that_time(
    container: Any, settings_of: Callable[..., DatabaseSettings]
) -> None:
    assert results() == {"first"}
    first = container.writer_engine()
    container.settings.override(settings_of("rotated"))
    assert results() == {"first"}, "an engine is kept until it is reset"
    with container.transaction():
        assert where(container.writer_session()) == "first"
        connection = driver_connection(container.writer_session())
        container.writer_engine.reset()
        assert where(container.writer_session()) == "first", "a unit stays where it began"
    assert results() == {"rotated"}
    assert container.writer_engine() is not first
    assert not is_open(connection)


def test_a_rotated_variable_is_followed_after_resetting_settings_and_engine(
    wire: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("APP_DB_CONNECTIONS__WRITER__URL", f"sqlite:///{tmp_path}/before.db")
    container = wire(Shop())
    assert results() == {"before"}
    monkeypatch.setenv("APP_DB_CONNECTIONS__WRITER__URL", f"sqlite:///{tmp_path}/after.db")
    container.settings.reset()
    container.writer_engine.reset()
    assert results() == {"after"}


def test_resetting_all_singletons_in_mid_unit_does_not_break_the_unit(container: Any) -> None:
    with container.transaction():
        container.writer_session().execute(text("CREATE TABLE orders (sku TEXT)"))
    manager = container.transaction_manager()
    with container.transaction() as unit:
        session = insert("A-1")
        engine = container.writer_engine()
        connection = driver_connection(session)
        container.reset_singletons()
        assert container.unit().transaction is unit.transaction
        assert insert("A-2") is session
        with container.transaction():
            assert count() == 2
    assert container.transaction_manager() is manager
    assert container.writer_engine() is not engine
    assert not is_open(connection), "the engine that was reset has closed its connections"
    with container.transaction():
        assert count() == 2


# ---- the same provider under both names -----------------------------------------------------------------------------------


class Wider(Shop):
    warehouse = Connection()


@containers.copy(Shop)
class Copied(DatabaseContainer):
    pass


def _containers() -> dict[str, Callable[[], Any]]:
    return {
        "class": lambda: Shop,
        "subclass": lambda: Wider,
        "copied class": lambda: Copied,
        "run-time class": lambda: container_of("writer", "log"),
        "instance": Shop,
        "instance of a subclass": Wider,
        "instance of a copied class": Copied,
        "run-time instance": lambda: container_of("writer", "log")(),
        "copy.deepcopy": lambda: copy.deepcopy(Shop()),
        "providers.deepcopy": lambda: providers.deepcopy(Shop()),
        "deep copy of a deep copy": lambda: copy.deepcopy(copy.deepcopy(Wider())),
        "nested": lambda: cast("Any", Application()).db,
        "nested in a deep copy": lambda: copy.deepcopy(cast("Any", Application())).db,
    }


@pytest.mark.parametrize("make", _containers().values(), ids=_containers())
@pytest.mark.parametrize("kind", KINDS)
def test_the_flat_name_and_the_path_are_one_provider(make: Callable[[], Any], kind: str) -> None:
    container = make()
    for name in ("writer", "log"):
        assert getattr(container, f"{name}_{kind}") is getattr(getattr(container, name), kind)
        assert container.providers[f"{name}_{kind}"] is getattr(getattr(container, name), kind)
    assert getattr(container, f"writer_{kind}") is not getattr(container, f"log_{kind}")


def test_a_subclass_defined_after_its_base_was_wired_is_itself(
    container: Any, settings_of: Callable[..., DatabaseSettings]
) -> None:
    """The fact guarded: `wire()` leaves a provider of the base class itself in it, which a later subclass would inherit."""
    assert results() == {"first"}

    class Later(Shop):
        pass

    later = Later(settings=settings_of("later"))
    later.wire(modules=[__name__])
    assert results() == {"later"}
    assert cast("Any", later).__self__() is later
    later.shutdown_resources()


def test_a_subclass_adds_connections_to_those_it_inherits(settings_of: Callable[..., DatabaseSettings], tmp_path: Path) -> None:
    container = Wider(settings=settings_of("wide", warehouse=ConnectionSettings(url=f"sqlite:///{tmp_path}/warehouse.db")))
    with container.transaction():
        assert where(container.warehouse_session()) == "warehouse"
        assert where(container.writer_session()) == "wide"
    container.shutdown_resources()
    with pytest.raises(UnknownConnection, match="warehouse"):
        Shop.warehouse_session  # noqa: B018


def test_names_known_only_at_run_time_become_connections(tmp_path: Path) -> None:
    names = [f"shard_{number}" for number in range(3)]
    settings = DatabaseSettings(connections={name: ConnectionSettings(url=f"sqlite:///{tmp_path / name}.db") for name in names})
    container: Any = container_of(*names)(settings=settings)
    with container.transaction():
        assert [where(getattr(container, f"{name}_session")()) for name in names] == names
        assert [where(getattr(container, name).session()) for name in names] == names
    container.shutdown_resources()


# ---- copies and neighbours --------------------------------------------------------------------------------------------------


def _pairs(settings: DatabaseSettings) -> dict[str, Callable[[], tuple[Any, Any]]]:
    def copied(make: Callable[[Any], Any]) -> tuple[Any, Any]:
        original = Shop(settings=settings)
        return original, make(original)

    def nested() -> tuple[Any, Any]:
        class Nesting(containers.DeclarativeContainer):
            db = providers.Container(Shop, settings=settings)

        first, second = cast("Any", Nesting()), cast("Any", Nesting())
        return first.db, second.db

    return {
        "two instances": lambda: (Shop(settings=settings), Shop(settings=settings)),
        "instances of two classes": lambda: (Shop(settings=settings), Copied(settings=settings)),
        "copy.deepcopy": lambda: copied(copy.deepcopy),
        "providers.deepcopy": lambda: copied(providers.deepcopy),
        "two applications": nested,
    }


@pytest.mark.parametrize(
    "which", ["two instances", "instances of two classes", "copy.deepcopy", "providers.deepcopy", "two applications"]
)
def test_two_containers_side_by_side_share_nothing(settings: DatabaseSettings, which: str) -> None:
    first, second = _pairs(settings)[which]()
    for kind in KINDS[:3]:
        assert getattr(first, f"writer_{kind}")() is not getattr(second, f"writer_{kind}")()
    assert first.transaction_manager() is not second.transaction_manager()
    for provider in ("coordinator", "state", "decision_logs"):
        assert getattr(first.core, provider)() is not getattr(second.core, provider)()
    for container in (first, second):
        assert container.core.coordinator().manager is container.transaction_manager()
        assert container.writer_scoped_session().session_factory.kw["config"].coordinator is container.core.coordinator()
    with first.transaction():
        session = first.writer_session()
        with pytest.raises(NoUnitOfWork):
            second.writer_session()
        with pytest.raises(NoUnitOfWork):
            second.unit()
        with pytest.raises(LookupError), second.transaction() as unit:
            assert second.writer_session() is not session
            assert unit.transaction is not first.unit().transaction
            unit.doom()
            assert not first.unit().is_doomed
            raise LookupError
    engine = create_engine("sqlite://")
    with first.writer_engine.override(engine):
        assert second.writer_engine() is not engine
    first.shutdown_resources()
    second.shutdown_resources()


def test_a_deep_copy_follows_its_own_overrides(settings: DatabaseSettings, settings_of: Callable[..., DatabaseSettings]) -> None:
    original = Shop(settings=settings)
    copied = copy.deepcopy(original)
    manager = ContextTransactionManager()
    copied.settings.override(settings_of("second"))
    copied.transaction_manager.override(manager)
    with copied.transaction():
        assert where(copied.writer_session()) == "second"
        assert copied.unit().transaction is manager.get()
    with original.transaction():
        assert where(original.writer_session()) == "first"
        assert manager.current() is None
    original.shutdown_resources()
    copied.shutdown_resources()


# ---- inside an application's container ----------------------------------------------------------------------------------------


@pytest.fixture
def application(settings: DatabaseSettings, wire: Callable[[Any], Any]) -> Any:
    class Nesting(Application):
        pass

    application = cast("Any", Nesting())
    application.db().settings.override(settings)
    return wire(application)


def test_a_container_nested_in_an_applications_own_is_found_by_the_decorator(application: Any) -> None:
    assert by_application() == by_application_container() == by_application_path() == "first"
    with application.db.transaction() as unit:
        assert by_application() == "first"
        assert application.db.unit().transaction is unit.transaction


def test_settings_can_be_given_to_a_nested_container(settings: DatabaseSettings, wire: Callable[[Any], Any]) -> None:
    class Nesting(containers.DeclarativeContainer):
        config = providers.Object(settings)
        db = providers.Container(Shop, settings=config)

    wire(Nesting())
    assert by_one_of_two() == "first"


def test_two_nested_containers_must_be_told_apart(
    settings: DatabaseSettings, settings_of: Callable[..., DatabaseSettings], wire: Callable[[Any], Any]
) -> None:
    application = cast("Any", TwoShops())
    application.db().settings.override(settings)
    application.archive().settings.override(settings_of("archive"))
    wire(application)
    with pytest.raises(
        InvalidUse, match=r"2 database containers in it\. Name the one to use: @transactional\(container='NAME'\)"
    ):
        by_one_of_two()
    assert by_the_named_one() == "first"
    assert by_the_other_one() == "archive"
    assert application.db.transaction_manager() is not application.archive.transaction_manager()
    application.shutdown_resources()


def test_a_container_without_a_database_container_is_refused_with_the_next_step(wire: Callable[[Any], Any]) -> None:
    class Other(containers.DeclarativeContainer):
        greeting = providers.Object("hello")

    wire(Other())
    with pytest.raises(InvalidUse, match=r"no database container in it\. Name the one to use"):
        by_application()


# ---- wiring -----------------------------------------------------------------------------------------------------------------


def test_a_class_may_say_itself_which_modules_it_is_wired_to(settings: DatabaseSettings) -> None:
    class SelfWired(Shop):
        wiring_config = containers.WiringConfiguration(modules=[__name__])

    container = SelfWired(settings=settings)
    assert results() == {"first"}
    container.unwire()
    container.shutdown_resources()


def test_a_class_may_name_its_modules_from_a_package(settings: DatabaseSettings, package: str) -> None:
    class SelfWired(Shop):
        wiring_config = containers.WiringConfiguration(modules=[".places"], from_package=package)

    container = SelfWired(settings=settings)
    assert Path(sys.modules[f"{package}.places"].path()).stem == "first"
    container.unwire()
    container.shutdown_resources()


PACKAGE = {
    "__init__.py": "",
    "places.py": (
        "from dependency_injector.wiring import Provide\n"
        "from app_db import transactional\n"
        "from sqlalchemy import text\n"
        "@transactional\n"
        "def path(session=Provide['writer_session']):\n"
        "    return session.execute(text('SELECT file FROM pragma_database_list')).scalar_one()\n"
    ),
    "inner/__init__.py": "",
    "inner/deep.py": "from ..places import path as imported\nfrom ..places import transactional, Provide\n"
    "@transactional\ndef engine(engine=Provide['writer.engine']):\n    return engine\n",
}


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    name = "shop_of_the_container_tests"
    for file, source in PACKAGE.items():
        path = tmp_path / name / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    yield name
    for module in [module for module in sys.modules if module.partition(".")[0] == name]:
        del sys.modules[module]


def test_a_package_is_wired_with_all_its_modules(settings: DatabaseSettings, package: str) -> None:
    container = Shop(settings=settings)
    container.wire(packages=[package])
    places, deep = sys.modules[f"{package}.places"], sys.modules[f"{package}.inner.deep"]
    assert Path(places.path()).stem == "first"
    assert Path(deep.imported()).stem == "first"
    assert deep.engine() is container.writer_engine()
    container.unwire()
    container.shutdown_resources()


def test_modules_named_from_a_package_are_wired(settings: DatabaseSettings, package: str) -> None:
    container = Shop(settings=settings)
    container.wire(modules=[".places"], from_package=package)
    assert Path(sys.modules[f"{package}.places"].path()).stem == "first"
    container.unwire()
    container.shutdown_resources()


# ---- connecting and letting go ----------------------------------------------------------------------------------------------


def test_nothing_connects_before_first_use(wire: Callable[[Any], Any]) -> None:
    settings = DatabaseSettings(connections={name: ConnectionSettings(url=NOWHERE) for name in ("writer", "log")})
    container = wire(Shop(settings=settings))
    container.init_resources()
    for kind in KINDS[:3]:
        getattr(container, f"writer_{kind}")()
    assert not container.log.engine.is_built
    with container.transaction():
        container.writer_session()  # made, and not used
    container.shutdown_resources()
    with pytest.raises(Exception, match="connection"), container.transaction():
        container.writer_session().execute(text("SELECT 1"))


def test_initialising_resources_makes_no_engine(container: Any) -> None:
    container.init_resources()
    assert not container.writer.engine.is_built
    assert results() == {"first"}
    assert container.writer.engine.is_built


@pytest.mark.parametrize("nested", [False, True], ids=["alone", "in an application"])
def test_shutting_down_closes_the_connections_and_a_later_use_opens_new_ones(
    postgres: PostgresServer, postgres_url: str, wire: Callable[[Any], Any], nested: bool
) -> None:
    settings = DatabaseSettings(
        application="shutdown",
        connections={
            "writer": ConnectionSettings(url=postgres_url),
            "log": ConnectionSettings(url=postgres_url, transactional=False),  # or it would borrow the writer's connection
        },
    )
    around: Any = wire(cast("Any", type(Application))("Nesting", (Application,), {})() if nested else Shop(settings=settings))
    container = around.db if nested else around
    container.settings.override(settings)

    def backends(wanted: int) -> int:
        for _ in range(100):
            found = postgres.execute("SELECT count(*) FROM pg_stat_activity WHERE application_name = 'shutdown'")[0][0]
            if found == wanted:
                return wanted
            postgres.execute("SELECT pg_sleep(0.02)")
        return int(found)

    def use() -> None:
        with container.transaction():
            container.writer_session().execute(text("SELECT 1"))
            container.log_session().execute(text("SELECT 1"))

    use()
    engines = [container.writer_engine(), container.log_engine()]
    assert backends(2) == 2
    around.shutdown_resources()
    assert backends(0) == 0
    use()
    assert backends(2) == 2
    assert all(new is not old for new, old in zip([container.writer_engine(), container.log_engine()], engines, strict=True))
    around.shutdown_resources()
    assert backends(0) == 0


def test_a_unit_under_way_survives_a_shutdown(container: Any) -> None:
    with container.transaction():
        container.writer_session().execute(text("CREATE TABLE orders (sku TEXT)"))
    with container.transaction():
        insert("A-1")
        connection = driver_connection(container.writer_session())
        container.shutdown_resources()
        insert("A-2")
        assert is_open(connection)
    assert not is_open(connection)
    with container.transaction():
        assert count() == 2


# ---- names that can't be ------------------------------------------------------------------------------------------------------


TAKEN = (
    "settings",
    "transaction",
    "transaction_manager",
    "unit",
    "core",
    "providers",
    "wire",
    "parent",
    "shutdown_resources",
)


@pytest.mark.parametrize("name", TAKEN)
def test_a_connection_named_like_something_the_container_has_is_refused(name: str) -> None:
    with pytest.raises(InvalidUse, match=f"can't be called {name!r}.*Give the connection another name"):
        container_of("writer", name)


def test_a_connection_may_not_take_a_name_that_another_one_provides() -> None:
    with pytest.raises(InvalidUse, match="'writer' provides 'writer_session', which the container class defines a second time"):
        container_of("writer", "writer_session")
    with pytest.raises(InvalidUse, match="can't be called 'writer_engine'"):

        class Taken(Shop):
            writer_engine = Connection()


def test_a_container_shows_what_applications_use() -> None:
    of_all = """
        async_bootstrap async_health async_session async_session_of bootstrap capacity check connection create_all deferred_unit
        drop_all health pools recovery reflect reflect_schema session session_of settings transaction transaction_manager unit
    """.split()
    of_each = [f"{name}_{kind}" for name in ("writer", "log") for kind in ALL_KINDS]
    container = Shop()
    assert set(container.providers) == {"core", "writer", "log", *of_all, *of_each}
    shown = {name for name in dir(container) if not name.startswith("_")}
    assert shown - set(dir(containers.DynamicContainer())) == set(container.providers) - {"core"}


def test_a_subclass_may_not_take_the_place_of_the_internal_providers() -> None:
    with pytest.raises(InvalidUse, match=r"Taken defines 'core', where app_db keeps its own providers\. Give it another"):
        cast("Any", type(Shop))("Taken", (Shop,), {"core": providers.Object("the application's")})


def test_a_subclass_may_declare_a_connection_of_its_base_again(settings: DatabaseSettings) -> None:
    class Again(Shop):
        writer = Connection()

    assert Again.writer is not Shop.writer
    container = Again(settings=settings)
    with container.transaction():
        assert where(container.writer_session()) == where(container.writer.session()) == "first"
    container.shutdown_resources()


@pytest.mark.parametrize("ask", [lambda: Shop.writer_session(), lambda: Shop.writer.session(), lambda: Shop.writer_engine()])
def test_a_provider_called_on_the_class_says_to_make_an_instance(ask: Callable[[], object]) -> None:
    with pytest.raises(
        InvalidUse, match=r"'writer' was called on a container class\. Make an instance, `container = Container\(\)`"
    ):
        ask()


@pytest.mark.parametrize("make", [lambda: Shop, Shop], ids=["class", "instance"])
def test_a_misspelt_name_is_answered_with_the_near_one(make: Callable[[], Any]) -> None:
    with pytest.raises(UnknownConnection, match=r"Did you mean 'writer_session'\?.*There are: 'log', 'writer'"):
        make().writer_sesion  # noqa: B018
    assert not hasattr(make(), "reader_session")


def test_a_container_that_was_used_and_shut_down_is_collected() -> None:
    """SQLAlchemy's registry of listeners keeps what listens; a `:memory:` database lives for as long as its settings."""

    def use() -> list[weakref.ref[Any]]:
        container = Shop(settings=DatabaseSettings(connections={"writer": ConnectionSettings(url="sqlite:///:memory:")}))
        with container.transaction() as unit:
            container.writer_session().execute(text("CREATE TABLE item (id INTEGER)"))
            unit.on_commit(lambda: None)
        container.shutdown_resources()
        return [weakref.ref(container), weakref.ref(container.core.coordinator())]

    kept = use()
    gc.collect()
    assert [reference() for reference in kept] == [None, None]


# ---- coroutines ----------------------------------------------------------------------------------------------------------


@transactional
async def insert_awaited(sku: str, session: AsyncSession = Provide[Shop.writer_async_session]) -> AsyncSession:
    await session.execute(text("INSERT INTO orders VALUES (:sku)"), {"sku": sku})
    return session


@transactional
async def count_awaited(session: AsyncSession = Provide["writer.async_session"]) -> Any:
    return await session.scalar(text("SELECT count(*) FROM orders"))


@inject
async def name_awaited(engine: AsyncEngine = Provide["writer_async_engine"]) -> str:
    return Path(str(engine.url.database)).stem


@transactional
async def by_application_awaited(session: AsyncSession = Provide["db.writer_async_session"]) -> Any:
    return await session.scalar(text("SELECT 42"))


def create_orders(container: Any) -> None:
    with container.transaction():
        container.writer_session().execute(text("CREATE TABLE orders (sku TEXT)"))


def run(container: Any, work: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    """Run a coroutine function in a loop, and dispose what the container has in it."""

    async def main() -> Any:
        try:
            return await work()
        finally:
            await container.shutdown_resources()

    return asyncio.run(main())


def test_coroutine_functions_are_wired_and_share_the_session_of_their_unit(container: Any) -> None:
    create_orders(container)

    async def work() -> None:
        async with container.transaction():
            first = await insert_awaited("A-1")
            assert await insert_awaited("A-2") is first is container.writer_async_session()
            assert container.writer_async_session() is container.writer.async_session()
            assert await count_awaited() == 2
        assert await insert_awaited("A-3") is not first
        assert (await count_awaited(), await name_awaited()) == (3, "first")

    run(container, work)


def test_an_explicit_session_for_coroutines_is_respected(container: Any) -> None:
    class Fake:
        async def scalar(self, statement: object) -> str:
            return "a fake's answer"

    fake: Any = Fake()
    assert run(container, lambda: count_awaited(session=fake)) == "a fake's answer"
    with container.writer_async_session.override(fake):
        assert run(container, count_awaited) == "a fake's answer"


def test_a_coroutine_function_keeps_its_name_and_stays_one() -> None:
    assert inspect.iscoroutinefunction(insert_awaited)
    assert list(inspect.signature(insert_awaited).parameters) == ["sku"]
    assert insert_awaited.__name__ == "insert_awaited"


def test_a_copied_a_derived_and_a_nested_container_serve_coroutines_by_strings(
    settings: DatabaseSettings, wire: Callable[[Any], Any]
) -> None:
    maker = Shop(settings=settings)
    create_orders(maker)
    maker.shutdown_resources()
    for make in (Copied, Wider):
        made = wire(make(settings=settings))
        assert run(made, count_awaited) == 0
        made.unwire()
    application = wire(cast("Any", Application)())
    application.db.settings.override(settings)
    assert run(application.db, by_application_awaited) == 42


async def test_shutting_down_an_applications_container_awaits_the_engines_in_it(settings: DatabaseSettings) -> None:
    application = cast("Any", Application)(db=providers.Container(Shop, settings=settings))
    assert application.shutdown_resources() is None, "there is nothing to wait for"
    async with application.db.transaction():
        await application.db.writer_async_session().execute(text("SELECT 1"))
    pool = application.db.writer_async_engine().pool
    assert pool.checkedin() == 1
    await application.shutdown_resources()
    assert pool.checkedin() == 0
    assert not application.db.writer_async_engine.is_built


def test_what_a_settings_override_changes_reaches_coroutines_after_a_reset(
    container: Any, settings_of: Callable[..., DatabaseSettings]
) -> None:
    async def work() -> None:
        assert await name_awaited() == "first"
        with container.settings.override(settings_of("second")):
            assert await name_awaited() == "first", "what exists stays as it is"
            container.reset_singletons()
            assert await name_awaited() == "second"
        container.reset_singletons()
        assert await name_awaited() == "first"

    run(container, work)
