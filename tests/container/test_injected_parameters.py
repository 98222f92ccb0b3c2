"""Every spelling of a marker, under every order of decorators, in every kind of function.

`PYTHONPATH=tests python -m container.test_injected_parameters` writes the table of this module into docs/injection-table.md.
"""

from __future__ import annotations

import asyncio
import inspect
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

import pytest
from dependency_injector import providers, wiring
from sqlalchemy.orm import Session

from app_db import Connection, DatabaseContainer, DatabaseSettings, Provide
from app_db.errors import AwaitRequired, InvalidUse
from harness.paths import ROOT

DOCUMENT = ROOT / "docs" / "injection-table.md"

FUTURE = "from __future__ import annotations"

SPELLINGS = (
    "session: Session = Provide[Container.writer.session]",
    "session: Session = Provide[Container.writer_session]",
    'session: Session = Provide["writer.session"]',
    'session: Session = Provide["writer_session"]',
    "session: Session = Closing[Provide[Container.writer.session]]",
    "session: Session = Depends(Provide[Container.writer.session])",
    "session: Annotated[Session, Provide[Container.writer.session]]",
    "session: Annotated[Session, Provide[Container.writer_session]]",
    'session: Annotated[Session, Provide["writer_session"]]',
    "session: Annotated[Session, Closing[Provide[Container.writer.session]]]",
    "session: Annotated[Session, Depends(Provide[Container.writer.session])]",
    "get_session: Callable[[], Session] = Provider[Container.writer.session]",
    'get_session: Callable[[], Session] = Provider["writer_session"]',
    "get_session: Annotated[Callable[[], Session], Provider[Container.writer.session]]",
    "name: str = Provide[Container.settings.provided.application]",
    'name: str = Provide["settings", provided().application]',
    'name: Annotated[str, Provide["settings", provided().application]]',
    "limit: int = Provide[Container.config.limit.as_int()]",
    'limit: int = Provide["config.limit", as_int()]',
    'limit: Annotated[int, Provide["config.limit", as_int()]]',
)

ORDERS = {
    "`@transactional`": ("@transactional",),
    "`@transactional` above `@inject`": ("@transactional", "@inject"),
    "`@inject` above `@transactional`": ("@inject", "@transactional"),
    "`@inject` alone": ("@inject",),
}

KINDS = ("function", "method", "staticmethod", "classmethod")

HEADER = """
from collections.abc import Callable
from typing import Annotated, Any
from app_db import transactional
from dependency_injector.wiring import Closing, Provide, Provider, as_int, inject, provided
from fastapi import Depends
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session
"""


INTRODUCTION = """---
orphan: true
---

# How injected parameters may be written

A cell says what happens in a wired module; then, in a module that is not wired. It is the same for functions and
coroutine functions, on their own and as methods, static methods and class methods (`@staticmethod` stands above the
decorators). "The marker" means that the function gets what is written instead of the session, without an error. A star
marks a module with `from __future__ import annotations`, where that makes a difference.
"""


def opened(log: list[str]) -> Iterator[list[str]]:
    log.append("open")
    yield log
    log.append("closed")


async def fetched() -> str:
    return "fetched"


class Shop(DatabaseContainer):
    writer = Connection()
    config = providers.Configuration()
    log: providers.Provider[list[str]] = providers.ThreadSafeSingleton(list)
    file = providers.Resource(opened, log)
    remote = providers.Coroutine(fetched)


_numbers = count()


@contextmanager
def module_of(source: str) -> Iterator[types.ModuleType]:
    """A module with this source. Wiring finds it by its name."""
    name = f"spellings_{next(_numbers)}"
    module = types.ModuleType(name)
    module.__dict__.update(Container=Shop)
    sys.modules[name] = module
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "@inject is not required here")
            exec(compile(source, name, "exec", dont_inherit=True), module.__dict__)
        yield module
    finally:
        del sys.modules[name]


def source_of(spelling: str, decorators: tuple[str, ...], *, is_async: bool, future: bool) -> str:
    """A module with one function of each kind. Each returns what it is called with, or the session that it asks for."""
    parameter = spelling.partition(":")[0]
    value = f"{parameter}()" if parameter.startswith("get_") else parameter
    define = "async def" if is_async else "def"
    lines = [FUTURE if future else "", HEADER]
    plain = [*decorators, f"{define} function({spelling}):", f"    return {value}"]
    lines += [*plain, "class Service:"]
    for kind, first in (("method", "self, "), ("staticmethod", ""), ("classmethod", "cls, ")):
        above = [] if kind == "method" else [f"@{kind}"]
        lines += [f"    {line}" for line in (*above, *decorators, f"{define} {kind}_({first}{spelling}):", f"    return {value}")]
    return "\n".join(lines)


def callables_in(module: types.ModuleType) -> dict[str, Callable[..., Any]]:
    service = module.Service()
    return {"function": module.function, **{kind: getattr(service, f"{kind}_") for kind in KINDS[1:]}}


def outcome(container: Any, function: Callable[..., Any], *, is_async: bool, in_unit: bool) -> str:
    async def awaited() -> object:
        if not in_unit:
            return await function()
        async with container.transaction():
            return await function()

    def called() -> object:
        if not in_unit:
            return function()
        with container.transaction():
            return function()

    try:
        given = asyncio.run(awaited()) if is_async else called()
    except Exception as error:
        return f"`{type(error).__name__}`"
    return "injected" if isinstance(given, Session) or given in ("app_db", 7) else "the marker"


def cell(spelling: str, decorators: tuple[str, ...], *, future: bool) -> str:
    """What the functions are called with, wired and not wired. Functions that differ are listed."""
    outcomes: dict[str, list[str]] = {}
    in_unit = "@transactional" not in decorators
    for is_async in (False, True):
        with module_of(source_of(spelling, decorators, is_async=is_async, future=future)) as module:
            container: Any = Shop(settings=DatabaseSettings(_env_file=None, connections={"writer": {"url": "sqlite://"}}))
            container.config.from_dict({"limit": "7"})
            seen = {
                kind: [outcome(container, it, is_async=is_async, in_unit=in_unit)] for kind, it in callables_in(module).items()
            }
            container.wire(modules=[module])
            for kind, function in callables_in(module).items():
                seen[kind].append(outcome(container, function, is_async=is_async, in_unit=in_unit))
            container.unwire()
            container.shutdown_resources()
        for kind, (unwired, wired) in seen.items():
            outcomes.setdefault(f"{wired}; {unwired}", []).append(f"{'async ' if is_async else ''}{kind}")
    if len(outcomes) == 1:
        return next(iter(outcomes))
    return ", ".join(f"{what} ({' '.join(kinds)})" for what, kinds in outcomes.items())


def table() -> str:
    """The table in the documentation, with the cells that were observed."""
    lines = [f"| parameter | {' | '.join(ORDERS)} |", f"|---|{'---|' * len(ORDERS)}"]
    for spelling in SPELLINGS:
        for future in (False, True):
            cells = [cell(spelling, decorators, future=future) for decorators in ORDERS.values()]
            row = f"| `{spelling}`{' *' if future else ''} | {' | '.join(cells)} |"
            if not future or row != lines[-1].replace("` |", "` * |", 1):
                lines.append(row)
    return "\n".join(lines)


def document() -> str:
    return f"{INTRODUCTION}\n{table()}\n"


@pytest.mark.exhaustive
def test_the_documented_table_is_what_happens() -> None:
    printed = document()
    print(printed)
    assert DOCUMENT.read_text() == printed, "run `PYTHONPATH=tests python -m container.test_injected_parameters`"


@pytest.mark.parametrize("future", [False, True])
@pytest.mark.parametrize("spelling", [SPELLINGS[0], SPELLINGS[6], SPELLINGS[10]])
def test_transactional_injects_each_spelling_or_says_that_it_is_not_wired(spelling: str, future: bool) -> None:
    for order in list(ORDERS.values())[:3]:
        assert cell(spelling, order, future=future) == "injected; `NotWired`"


@pytest.fixture
def container() -> Iterator[Any]:
    made: Any = Shop(settings=DatabaseSettings(_env_file=None, connections={"writer": {"url": "sqlite://"}}))
    made.config.from_dict({"limit": "7"})
    yield made
    made.unwire()
    made.shutdown_resources()


# ---- what a caller passes ---------------------------------------------------------------------------------------------


ALL_FORMS = [
    pytest.param(spelling, future, is_async, id=f"{spelling}{' *' * future}{' async' * is_async}")
    for spelling in (SPELLINGS[0], SPELLINGS[5], SPELLINGS[6], SPELLINGS[10], SPELLINGS[11])
    for future in (False, True)
    for is_async in (False, True)
]


@pytest.mark.parametrize(("spelling", "future", "is_async"), ALL_FORMS)
def test_an_argument_that_is_passed_replaces_the_injection(container: Any, spelling: str, future: bool, is_async: bool) -> None:
    parameter = spelling.partition(":")[0]
    mine = (lambda: "mine") if parameter == "get_session" else "mine"
    for decorators in list(ORDERS.values())[:3]:
        with module_of(source_of(spelling, decorators, is_async=is_async, future=future)) as module:
            container.wire(modules=[module])
            for function in callables_in(module).values():
                for given in (function(mine), function(**{parameter: mine})):
                    assert (asyncio.run(given) if is_async else given) == "mine"


def test_arguments_after_an_injected_parameter_are_not_lost(container: Any) -> None:
    source = f"""{HEADER}
@transactional
def few(sku: str, session: Session = Provide["writer_session"]): return sku, session
@transactional
def many(sku: str, session: Session = Provide["writer_session"], *others: str): return sku, session, others
"""
    with module_of(source) as module:
        container.wire(modules=[module])
        assert module.few("A-1", "mine") == ("A-1", "mine")
        for function in (module.few, module.many):
            with pytest.raises(TypeError, match=r"takes 2 positional arguments at most, since 'session' is injected, but 3 were"):
                function("A-1", "mine", "A-2")


# ---- what a caller sees -----------------------------------------------------------------------------------------------


SIGNATURES = {
    'sku: str, session: Session = Provide["writer_session"]': "(sku: str) -> str",
    'sku: str, session: Annotated[Session, Provide["writer_session"]]': "(sku: str) -> str",
    'session: Annotated[Session, Provide["writer_session"]], sku: str, *skus: str': "(*, sku: str) -> str",
    'session: Annotated[Session, Depends(Provide["writer_session"])], *, sku: str, **m: int': "(*, sku: str, **m: int) -> str",
    'sku: str, *skus: str, session: Session = Depends(Provide["writer_session"])': "(sku: str, *skus: str) -> str",
    'sku: str, user: Annotated[int, "id"], other: int = 3': "(sku: str, user: Annotated[int, 'id'], other: int = 3) -> str",
}


@pytest.mark.parametrize("future", [False, True])
@pytest.mark.parametrize("parameters", SIGNATURES)
def test_the_signature_has_the_callers_own_parameters(parameters: str, future: bool) -> None:
    source = f"{FUTURE if future else ''}{HEADER}\n@transactional\ndef function({parameters}) -> str: ..."
    with module_of(source) as module:
        signature = inspect.signature(module.function)
        if future and "Provide" not in parameters:
            signature = inspect.signature(module.function, eval_str=True)
        assert str(signature).replace("typing.", "") == SIGNATURES[parameters]


def test_a_decorator_above_that_keeps_the_signature_does_not_make_wiring_inject_before_the_unit(container: Any) -> None:
    source = f"""{HEADER}
from functools import wraps
def logged(function):
    @wraps(function)
    def run(*args, **kwargs): return function(*args, **kwargs)
    return run
@logged
@transactional
def function(session: Session = Provide["writer_session"]): return session
"""
    with module_of(source) as module:
        container.wire(modules=[module])
        assert isinstance(module.function(), Session)


# ---- what can't be injected -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "annotation", ['Annotated[Missing, Provide["writer_session"]]', "Annotated[Session, Provide[Missing.x]]"]
)
def test_a_postponed_annotation_that_cannot_be_evaluated_is_refused(annotation: str) -> None:
    source = f"{FUTURE}{HEADER}\n@transactional\ndef function(session: {annotation}): ..."
    with pytest.raises(InvalidUse, match=r"annotation of the parameter 'session' of .*function can't .* 'Missing'") as caught:  # noqa: SIM117
        with module_of(source):
            pass
    assert "not under TYPE_CHECKING" in str(caught.value)


def test_a_postponed_annotation_without_a_marker_may_name_what_is_not_there(container: Any) -> None:
    source = f'{FUTURE}{HEADER}\n@transactional\ndef f(a: Missing, session: Session = Provide["writer_session"]): return session'
    with module_of(source) as module:
        container.wire(modules=[module])
        assert isinstance(module.f(1), Session)


@pytest.mark.parametrize("marker", ["Provide[Container.writer]", 'Provide["writer"]', "Closing[Provide[Container.writer]]"])
@pytest.mark.parametrize("order", ORDERS)
def test_a_connection_is_not_injected_for_a_session(container: Any, marker: str, order: str) -> None:
    with module_of(source_of(f"session: Session = {marker}", ORDERS[order], is_async=False, future=False)) as module:
        container.wire(modules=[module])
        for function in callables_in(module).values():
            with pytest.raises(InvalidUse, match=r"'writer' is a connection.*Provide\[Container.writer.session\]"):
                function()


def test_the_provider_of_a_connection_is_injected(container: Any) -> None:
    source = f"{HEADER}\n@transactional\ndef function(writer=Provider[Container.writer]): return writer.session()"
    with module_of(source) as module:
        container.wire(modules=[module])
        assert isinstance(module.function(), Session)


@pytest.mark.parametrize("future", [False, True])
@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize(
    ("parameter", "message"),
    [
        (
            "session: AsyncSession = Provide[Container.writer.session]",
            (
                "'session' of {} is annotated with AsyncSession, but was given the 'writer' sync session. Write "
                "`Provide[Container.writer.async_session]`, or annotate it with Session."
            ),
        ),
        (
            'session: Annotated[Session | None, Provide["writer_async_session"]]',
            (
                "'session' of {} is annotated with Session, but was given the 'writer' async session. Write "
                "`Provide[Container.writer.session]`, or annotate it with AsyncSession."
            ),
        ),
        (
            "session: Session = Provide[Container.async_session]",
            (
                "'session' of {} is annotated with Session, but was given the container's async session. Write "
                "`Provide[Container.session]`, or annotate it with AsyncSession."
            ),
        ),
    ],
)
def test_a_sync_session_is_not_injected_for_an_async_one_nor_the_other_way_round(
    container: Any, parameter: str, message: str, is_async: bool, future: bool
) -> None:
    given_async = "async_session" in parameter
    source = source_of(parameter, ("@transactional",), is_async=is_async, future=future)
    with module_of(source) as module:
        container.wire(modules=[module])
        for function in callables_in(module).values():
            # A function that is no coroutine function can't ask for an async session at all.
            with pytest.raises(AwaitRequired if given_async and not is_async else InvalidUse) as caught:
                asyncio.run(function()) if is_async else function()
            if caught.type is AwaitRequired:
                continue
            name = f"{module.__name__}.{function.__qualname__}"
            assert caught.value.message == f"The parameter {message.format(name)}"


@pytest.mark.parametrize("annotation", ["Session", "AsyncSession", "Any", "'Missing'", "Session | AsyncSession", "object"])
def test_what_is_no_session_of_the_other_kind_is_injected_whatever_the_annotation(container: Any, annotation: str) -> None:
    source = f'{HEADER}\n@transactional\ndef function(session: {annotation} = Provide["writer_session"]): return session'
    with module_of(source) as module, container.writer_session.override("a fake"):
        container.wire(modules=[module])
        assert module.function() == "a fake"


def test_a_name_that_a_class_declares_for_type_checkers_is_the_connections_own(container: Any) -> None:
    class Declared(DatabaseContainer):
        writer = Connection()
        writer_session: providers.Provider[Session]

    assert Declared.writer_session is Declared.writer.session
    made: Any = Declared(settings=container.settings())
    with made.transaction():
        assert isinstance(made.writer_session(), Session)
    made.shutdown_resources()


def test_provide_is_the_one_of_dependency_injector() -> None:
    assert Provide is wiring.Provide


# ---- resources --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_async", [False, True])
def test_closing_ends_a_resource_after_the_function_and_leaves_engines_alone(container: Any, is_async: bool) -> None:
    source = f"""{HEADER}
@transactional
{"async " * is_async}def function(
    file: list = Closing[Provide["file"]], session: Annotated[Session, Closing[Provide["writer_session"]]] = None
): return list(file), session
"""
    engine = container.writer_engine()
    with module_of(source) as module:
        container.wire(modules=[module])
        during, session = asyncio.run(module.function()) if is_async else module.function()
    assert during == ["open"]
    assert container.log() == ["open", "closed"]
    assert isinstance(session, Session)
    assert container.writer_engine() is engine


def test_a_coroutine_function_gets_what_an_async_provider_returns(container: Any) -> None:
    source = f'{HEADER}\n@transactional\nasync def function(remote: str = Provide["remote"]): return remote'
    with module_of(source) as module:
        container.wire(modules=[module])
        assert asyncio.run(module.function()) == "fetched"


if __name__ == "__main__":
    DOCUMENT.write_text(document())
