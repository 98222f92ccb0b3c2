"""`reset_last_overriding()` and circles of resources do on a DatabaseContainer what they do on any container."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from dependency_injector import containers, providers
from dependency_injector.errors import Error
from sqlalchemy import create_engine, text

from app_db import Connection, DatabaseContainer, DatabaseSettings
from harness.paths import ROOT


class Plain(containers.DeclarativeContainer):
    settings = providers.Callable(lambda: "own")
    writer_engine = providers.ThreadSafeSingleton(object)


class Shop(DatabaseContainer):
    writer = Connection()


class OtherShop(DatabaseContainer):
    writer = Connection()


def settings(name: str) -> DatabaseSettings:
    return DatabaseSettings(_env_file=None, connections={"writer": {"url": f"sqlite:///{Path.cwd() / name}.db"}})


@pytest.fixture
def shop() -> Iterator[Any]:
    container = Shop(settings=settings("own"))
    yield container
    container.shutdown_resources()


@pytest.fixture
def other() -> Iterator[Any]:
    container = OtherShop(settings=settings("other"))
    yield container
    container.shutdown_resources()


@pytest.fixture
def engine() -> Iterator[Callable[[str], Any]]:
    engines = []

    def new(name: str) -> Any:
        engines.append(create_engine(f"sqlite:///{Path.cwd() / name}.db"))
        return engines[-1]

    yield new
    for each in engines:
        each.dispose()


def used(container: Any) -> str:
    """Return the name of the database's file that a unit of work uses."""
    with container.transaction():
        return Path(container.writer_session().scalar(text("SELECT file FROM pragma_database_list"))).stem


# ---- one provider ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("provider", ["settings", "writer_engine"])
@pytest.mark.parametrize("make", [Plain, Shop], ids=["plain", "database"])
def test_the_last_overriding_of_a_provider_is_reset_alone(make: type[Any], provider: str) -> None:
    container = make()
    if make is Shop:
        container.settings.override(providers.Object(settings("own")))
    own = getattr(container, provider)()
    given = len(getattr(container, provider).overridden)
    first, second = object(), object()
    getattr(container, provider).override(providers.Object(first))
    getattr(container, provider).override(providers.Object(second))
    assert getattr(container, provider)() is second
    getattr(container, provider).reset_last_overriding()
    assert getattr(container, provider)() is first
    getattr(container, provider).reset_last_overriding()
    assert getattr(container, provider)() is own
    assert len(getattr(container, provider).overridden) == given
    for _ in range(given):
        getattr(container, provider).reset_last_overriding()
    with pytest.raises(Error, match="is not overridden"):
        getattr(container, provider).reset_last_overriding()
    if make is Shop and provider == "writer_engine":
        container.shutdown_resources()


def test_units_follow_the_engine_that_is_overridden_and_back(shop: Any, engine: Callable[[str], Any]) -> None:
    assert used(shop) == "own"
    shop.writer_engine.override(engine("first"))
    assert used(shop) == "first"
    shop.writer.engine.override(engine("second"))  # the same provider by its other name
    assert used(shop) == "second"
    shop.writer_engine.reset_last_overriding()
    assert used(shop) == "first"
    shop.writer.engine.reset_last_overriding()
    assert used(shop) == "own"


def test_an_engine_made_after_the_settings_are_back_has_those(shop: Any) -> None:
    shop.settings.override(providers.Object(settings("second")))
    assert used(shop) == "second"
    shop.settings.reset_last_overriding()
    assert used(shop) == "second", "an engine is kept until it is reset"
    shop.writer_engine.reset()
    assert used(shop) == "own"


# ---- whole containers -----------------------------------------------------------------------------------------------


def test_a_container_that_overrides_another_is_used_until_it_is_reset(shop: Any, other: Any) -> None:
    assert used(shop) == "own"
    shop.override(other)
    assert used(shop) == "other"
    assert shop.settings() is other.settings()
    shop.reset_last_overriding()
    assert used(shop) == "own"
    assert used(other) == "other"
    with pytest.raises(Error, match="is not overridden"):
        shop.reset_last_overriding()


def test_two_overriding_containers_are_reset_one_by_one(shop: Any, other: Any) -> None:
    third = OtherShop(settings=settings("third"))
    shop.override(other)
    shop.override(third)
    assert used(shop) == "third"
    shop.reset_last_overriding()
    assert used(shop) == "other"
    shop.reset_override()
    assert shop.overridden == ()
    assert shop.settings.overridden == ()
    third.shutdown_resources()


@pytest.mark.parametrize("make", [Plain, Shop], ids=["plain", "database"])
def test_a_container_that_overrides_a_few_providers_is_reset_as_a_whole(make: type[Any], engine: Callable[[str], Any]) -> None:
    """`reset_last_overriding()` of dependency-injector refuses it: it asks each provider, also those not overridden."""

    class Few(containers.DeclarativeContainer):
        writer_engine = providers.Object(engine("few"))

    container = make()
    container.override(Few())
    assert container.writer_engine() is Few.writer_engine()
    with pytest.raises(Error, match="is not overridden"):
        container.reset_last_overriding()
    container.reset_override()
    assert container.writer_engine.overridden == ()


def test_a_class_that_overrides_another_counts_for_new_instances_until_it_is_reset(engine: Callable[[str], Any]) -> None:
    class Base(DatabaseContainer):
        writer = Connection()

    class Few(containers.DeclarativeContainer):
        writer_engine = providers.Object(engine("few"))

    Base.override(Few)
    before = Base(settings=settings("own"))
    assert used(before) == "few"
    Base.reset_override()
    after = Base(settings=settings("own"))
    assert used(after) == "own"
    assert used(before) == "few", "an instance keeps what its class had"
    before.writer_engine.reset_last_overriding()
    assert used(before) == "own"
    for container in (before, after):
        container.shutdown_resources()


# ---- resources that depend on each other ----------------------------------------------------------------------------------


def lasting(other: object = None) -> Iterator[object]:
    yield object()


class PlainResources(containers.DeclarativeContainer):
    first = providers.Resource(lasting)
    second = providers.Resource(lasting, first)


class ShopResources(DatabaseContainer):
    writer = Connection()
    first = providers.Resource(lasting)
    second = providers.Resource(lasting, first)


def with_resources(make: type[Any]) -> Any:
    return make() if make is PlainResources else make(settings=settings("own"))


@pytest.mark.parametrize("make", [PlainResources, ShopResources], ids=["plain", "database"])
def test_a_circle_of_resources_can_not_be_initialized_and_leaves_nothing_to_shut_down(make: type[Any]) -> None:
    container = with_resources(make)
    container.first.add_args(container.second)
    with pytest.raises(RecursionError):
        container.init_resources()
    container.shutdown_resources()
    container.first.clear_args()
    container.init_resources()
    assert container.second.initialized
    container.shutdown_resources()
    assert not container.second.initialized


CIRCLE = """
import asyncio, sys
from pathlib import Path
sys.path[:0] = {path!r}
from test_overriding import PlainResources, ShopResources, used, with_resources
container = with_resources({make})
container.init_resources()
if {make} is ShopResources:
    used(container)
container.first.add_args(container.second)
async def shut_down():
    await container.shutdown_resources()
try:
    asyncio.run(shut_down()) if {awaited} else container.shutdown_resources()
except RuntimeError as error:
    print(error)
container.first.clear_args()
container.shutdown_resources()
print(container.first.initialized, container.second.initialized)
"""


@pytest.mark.representative("PlainResources-sync")
@pytest.mark.parametrize("awaited", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("make", ["PlainResources", "ShopResources"])
def test_shutting_down_a_circle_is_refused(make: str, awaited: bool) -> None:
    """The fact guarded: dependency-injector shuts down for ever, if there is a resource outside the circle. app_db's is one."""
    program = CIRCLE.format(path=[str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent)], make=make, awaited=awaited)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=False)
    assert done.stdout.startswith("Unable to resolve resources shutdown order"), done.stderr
    assert done.stdout.splitlines()[-1] == "False False"
    if make == "ShopResources":
        assert "'first', 'second'" in done.stdout
