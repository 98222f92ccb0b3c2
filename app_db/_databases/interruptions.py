"""Exceptions that come from outside, by a signal handler, while a driver waits for its server."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from types import FrameType

from sqlalchemy.exc import DBAPIError

from app_db._compat.transaction import CALLS_OTHERS as transactions_calls  # noqa: N811


def interrupted(error: BaseException, driver_connection: object) -> bool:
    """Return whether `error` ended a call of the driver in the middle, so that its connection may be one answer behind.

    A signal handler may raise anything, anywhere. If the request has been sent and its answer was not read, PyMySQL takes that
    for the answer to the next statement, and later a refused COMMIT for one that worked. So the connection has to be closed.
    The driver's own errors, and those of listeners, which SQLAlchemy calls before the driver, are no such interruptions.
    """
    driver = _driver_package(driver_connection)
    return any(_is_raised_inside(each, driver) for each in _chain(error))


def _driver_package(driver_connection: object) -> str:
    """Return the package of the driver, also for a connection of a class that app_db or the application derived from its own."""
    packages = [_package_of(each.__module__) for each in type(driver_connection).__mro__]
    return [package for package in packages if package not in _BASES][-1]


_CALLS_OTHERS = transactions_calls | frozenset({"sqlalchemy.event.attr", "app_db._units.manager", "app_db._units.hooks"})
"""Modules that call functions of applications: listeners, synchronizers, hooks."""

_BASES = frozenset({"builtins", "typing", "abc"})
"""Packages of what a driver derives its own classes from."""

_LIBRARIES = frozenset({"sqlalchemy", "zope", "transaction", "app_db"})


def came_from_outside(error: BaseException) -> bool:
    """Return whether an exception was raised by a function that a library did not call: a signal handler.

    Errors of the libraries, and those of listeners and hooks, which they do call, are not.
    """
    if _is_raised_by_signal_handler(error):
        return True
    modules = [str(frame.f_globals.get("__name__", "")) for frame in _frames(error)]
    if not modules or _package_of(modules[-1]) in _LIBRARIES:
        return False
    callers = [module for module in modules if _package_of(module) in _LIBRARIES]
    return bool(callers) and callers[-1] not in _CALLS_OTHERS


def _is_raised_by_signal_handler(error: BaseException) -> bool:
    handlers = (signal.getsignal(number) for number in signal.valid_signals())
    codes = {getattr(handler, "__code__", None) or getattr(type(handler).__call__, "__code__", None) for handler in handlers}
    return any(frame.f_code in codes for frame in _frames(error))


def interrupted_again(error: BaseException) -> bool:
    """Return whether exceptions from outside ended SQLAlchemy's work in the middle twice: it was cleaning up after the first."""
    chain = [*_chain(error)]
    of_databases = {id(each) for each in chain if isinstance(each, DBAPIError)}
    of_databases |= {id(each.orig) for each in chain if isinstance(each, DBAPIError)}
    return sum(id(each) not in of_databases and _is_raised_inside(each, "sqlalchemy") for each in chain) > 1


def _is_raised_inside(error: BaseException, driver: str) -> bool:
    """Return whether an exception was raised by a function of another package that the driver's code was made to call."""
    packages = [_package_of(str(frame.f_globals.get("__name__", ""))) for frame in _frames(error)]
    if driver not in packages:
        return False
    if not isinstance(error, Exception):
        return True
    # `Error` is what PEP 249 calls the base of a driver's own.
    return packages[-1] != driver and not any(base.__name__ == "Error" for base in type(error).__mro__)


def _frames(error: BaseException) -> Iterator[FrameType]:
    trace = error.__traceback__
    while trace is not None:
        yield trace.tb_frame
        trace = trace.tb_next


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Return an exception and those that were being handled when it was raised."""
    seen: set[int] = set()
    following: BaseException | None = error
    while following is not None and id(following) not in seen:
        seen.add(id(following))
        yield following
        following = following.__cause__ or following.__context__


def _package_of(module: str) -> str:
    return module.partition(".")[0]
