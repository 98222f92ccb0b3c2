"""A unit of work for each request of a WSGI application."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from io import BytesIO
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, Unpack

from app_db import DatabaseContainer, DeferredUnit, retryable
from app_db.integrations._requests import RequestOptions, RequestUnits

if TYPE_CHECKING:
    from types import TracebackType
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

__all__ = ["REPEATS", "UnitOfWorkMiddleware", "unit_of"]

_log = logging.getLogger("app_db")


REPEATS = "app_db.repeats"
"""Key in the environment of a request. The value is a function that says whether the request is answered anew if an error is
raised. Frameworks whose error handlers stand inside of the middleware ask it, and raise the error instead of calling them.
"""

_UNITS = "app_db.units"


def unit_of(environ: WSGIEnvironment, container: DatabaseContainer) -> DeferredUnit | None:
    """Return a request's unit of a container, or None if no middleware has given it one."""
    found: DeferredUnit | None = environ.get(_UNITS, {}).get(id(container))
    return found


class UnitOfWorkMiddleware:
    """Gives each request a unit of work. It begins when a session is first asked for, and ends before the response begins.

    A response below 400 commits; see `commit_rule`. If the commit fails, the response is not sent, and the error is raised
    instead. A body that is generated while it is sent has no unit.

    - `attempts`: how often a request may be answered anew if its unit fails with an error that `retryable` accepts
    - `body_limit`: the bytes of a request's body that are kept for that. A request with a larger one is not repeated
    - `read_only_methods`: methods whose units are read-only, `("GET", "HEAD")` for example
    - `rule`: a function to use in place of `commit_rule`
    - `isolation`, `timeout`: how units run, as in `container.transaction()`
    """

    def __init__(self, app: WSGIApplication, container: DatabaseContainer, **options: Unpack[RequestOptions]) -> None:
        self.app = app
        self.container = container
        self._units = RequestUnits(container, awaited=False, **options)

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """Answer a request."""
        body = _Body(environ, self._units.body_limit) if self._units.attempts > 1 else None
        attempt = 1
        while True:
            try:
                return self._answer(environ if body is None else body.environ(), start_response, attempt, body)
            except _Again as again:
                time.sleep(again.pause)
            attempt += 1

    def _answer(
        self, environ: WSGIEnvironment, start_response: StartResponse, attempt: int, body: _Body | None
    ) -> Iterable[bytes]:
        """Answer a request. Raise _Again if it failed and can be answered anew."""
        unit = self._units.unit_for(environ["REQUEST_METHOD"])
        if unit.is_one_too_many:
            return self.app(environ, start_response)
        environ.setdefault(_UNITS, {})[id(self.container)] = unit
        with unit:
            response = _Response(unit, start_response, self._units)

            reasons: list[BaseException] = []  # errors because of which the request is answered anew

            def repeats(error: BaseException) -> bool:
                may_pass = (
                    unit.has_begun and not response.has_begun and not _others_have_committed(environ, unit) and retryable(error)
                )
                if not (may_pass and attempt < self._units.attempts and body is not None and body.is_kept(error)):
                    return False
                reasons.append(error)
                return True

            environ[REPEATS] = repeats
            try:
                return response.begun(self.app(environ, response.start), reasons)
            except BaseException as error:
                if not unit.is_over:
                    unit.end(error)
                if attempt == self._units.attempts or response.has_begun or not unit.may_pass:
                    raise
                if _others_have_committed(environ, unit):
                    raise
                if body is None or not body.is_kept(error):
                    raise
                _log.info("A request is answered anew after %s", type(error).__name__)
                raise _Again(unit.pause_after(attempt)) from error


def _others_have_committed(environ: WSGIEnvironment, unit: DeferredUnit) -> bool:
    """Return whether units of other containers have committed: a request that is repeated would write once more."""
    return any(other is not unit and other.has_committed for other in environ[_UNITS].values())


class _Again(Exception):  # it is no error
    """A request can be answered anew, after a pause."""

    def __init__(self, pause: float) -> None:
        self.pause = pause


class _Body:
    """The body of a request, which is kept for other attempts if it is small enough."""

    def __init__(self, environ: WSGIEnvironment, limit: int) -> None:
        self._environ = environ
        length = environ.get("CONTENT_LENGTH") or "0"
        self.is_whole = length.isdigit() and int(length) <= limit and "HTTP_TRANSFER_ENCODING" not in environ
        self._kept = environ["wsgi.input"].read(int(length)) if self.is_whole else b""
        self._was_said = False

    def is_kept(self, error: BaseException) -> bool:
        """Return whether there is a body for another attempt. If not, say so in the log, once."""
        if not (self.is_whole or self._was_said):
            self._was_said = True
            _log.warning("A request is not answered anew after %s: its body is too large to be kept", type(error).__name__)
        return self.is_whole

    def environ(self) -> WSGIEnvironment:
        """Return the environment of an attempt: applications write to it."""
        copy = dict(self._environ)
        if self.is_whole:
            copy["wsgi.input"] = BytesIO(self._kept)
        return copy


class _Response:
    """The response of one attempt. Its beginning is the end of the unit."""

    def __init__(self, unit: DeferredUnit, start_response: StartResponse, units: RequestUnits) -> None:
        self._unit = unit
        self._start_response = start_response
        self._units = units
        self._head: tuple[str, list[tuple[str, str]], Any] | None = None
        self._write: Callable[[bytes], object] | None = None

    @property
    def has_begun(self) -> bool:
        """Whether anything was sent."""
        return self._write is not None

    def start(
        self,
        status: str,
        headers: list[tuple[str, str]],
        exc_info: tuple[type[BaseException], BaseException, TracebackType] | tuple[None, None, None] | None = None,
        /,
    ) -> Callable[[bytes], object]:
        """Note the head of the response: WSGI's `start_response`. A later head takes its place until something is sent."""
        if self._write is not None:
            return self._start_response(status, headers, exc_info)  # raises exc_info
        if self._head is not None and exc_info is None:
            raise AssertionError("start_response() was called a second time without exc_info")
        self._head = status, headers, exc_info
        return self._end_and_write

    def _end_and_write(self, data: bytes) -> None:
        self._end()(data)

    def _end(self) -> Callable[[bytes], object]:
        """End the unit, and begin the response."""
        if self._write is None:
            if self._head is None:
                raise AssertionError("start_response() was not called before the first byte of the response")
            status, headers, exc_info = self._head
            if not self._unit.is_over:
                error = exc_info[1] if exc_info else None
                self._units.end(self._unit, int(status.split(maxsplit=1)[0]), headers, error)
            self._write = self._start_response(status, headers, exc_info)
        return self._write

    def begun(self, body: Iterable[bytes], reasons: list[BaseException]) -> Iterable[bytes]:
        """Begin the response, and return its body. A generator calls `start_response` when it is asked for its first part.

        Raise an error because of which the request is answered anew, if something has answered it nevertheless.
        """
        whole = body
        try:
            if reasons:
                raise reasons[-1]
            if self._head is None:
                parts = iter(body)
                first = list(islice(parts, 1))
                whole = _Rest(chain(first, parts), body)
            self._end()
        except BaseException:
            _close(body)
            raise
        return whole


class _Rest:
    """A body of which a part was asked for already."""

    def __init__(self, parts: Iterator[bytes], whole: Iterable[bytes]) -> None:
        self._parts = parts
        self._whole = whole

    def __iter__(self) -> Iterator[bytes]:
        return self._parts

    def close(self) -> None:
        """Close the body."""
        _close(self._whole)


def _close(body: Iterable[bytes]) -> None:
    close = getattr(body, "close", None)
    if close is not None:
        close()
