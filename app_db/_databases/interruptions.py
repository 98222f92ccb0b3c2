"""Exceptions from signal handlers that interrupt a driver or a library."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from types import FrameType

from sqlalchemy.exc import DBAPIError

from app_db._compat.transaction import CALLS_OTHERS as transactions_calls  # noqa: N811


def interrupted(error: BaseException, driver_connection: object) -> bool:
    """Return whether `error` interrupted a call of the driver, so that an answer may be unread and the connection must be closed.

    A signal handler may raise anything, anywhere. PyMySQL would read the unread answer as that to the next statement, and could
    so take a refused COMMIT for one that worked. Errors of the driver itself, and of listeners, which SQLAlchemy calls before the
    driver, are no interruptions.
    """
    driver = _driver_package(driver_connection)
    return any(_is_raised_inside(each, driver) for each in _chain(error))


def _driver_package(driver_connection: object) -> str:
    """Return the package of the driver. The class of the connection may be derived from the driver's."""
    packages = [_package_of(each.__module__) for each in type(driver_connection).__mro__]
    return [package for package in packages if package not in _BASES][-1]


_CALLS_OTHERS = transactions_calls | frozenset({"sqlalchemy.event.attr", "app_db._units.manager", "app_db._units.hooks"})
"""Modules that call functions of applications: listeners, synchronizers, hooks."""

_BASES = frozenset({"builtins", "typing", "abc"})
"""Packages of classes that drivers derive their own from."""

_LIBRARIES = frozenset({"sqlalchemy", "zope", "transaction", "app_db"})


def came_from_outside(error: BaseException) -> bool:
    """Return whether a signal handler raised an exception.

    Errors of the libraries, and of the listeners and hooks that they call, do not come from outside.
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
    """Return whether a second exception from outside interrupted SQLAlchemy while it cleaned up after the first."""
    chain = [*_chain(error)]
    of_databases = {id(each) for each in chain if isinstance(each, DBAPIError)}
    of_databases |= {id(each.orig) for each in chain if isinstance(each, DBAPIError)}
    return sum(id(each) not in of_databases and _is_raised_inside(each, "sqlalchemy") for each in chain) > 1


def _is_raised_inside(error: BaseException, driver: str) -> bool:
    """Return whether a function of another package raised an exception in the middle of the driver's code."""
    packages = [_package_of(str(frame.f_globals.get("__name__", ""))) for frame in _frames(error)]
    if driver not in packages:
        return False
    if not isinstance(error, Exception):
        return True
    # PEP 249 calls the base class of a driver's errors `Error`.
    return packages[-1] != driver and not any(base.__name__ == "Error" for base in type(error).__mro__)


def _frames(error: BaseException) -> Iterator[FrameType]:
    trace = error.__traceback__
    while trace is not None:
        yield trace.tb_frame
        trace = trace.tb_next


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an exception, and the exceptions that were being handled when it was raised."""
    seen: set[int] = set()
    following: BaseException | None = error
    while following is not None and id(following) not in seen:
        seen.add(id(following))
        yield following
        following = following.__cause__ or following.__context__


def _package_of(module: str) -> str:
    return module.partition(".")[0]
