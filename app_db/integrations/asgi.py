"""A unit of work for each request of an ASGI application."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Unpack

from app_db import DatabaseContainer, DeferredUnit, retryable
from app_db.integrations._requests import RequestOptions, RequestUnits

__all__ = ["Application", "CLIENT_HAS_GONE", "Message", "REPEATS", "Receive", "Scope", "Send", "UnitOfWorkMiddleware"]

_log = logging.getLogger("app_db")

CLIENT_HAS_GONE = 499
"""The status of a response that would say that a request was done whose unit was aborted, because its client had gone."""

_COMMITTED = "app_db.committed"
"""Key in the scope of a request. The value is a list of its units that have committed, of any container. The request is not
answered anew then: it would write once more.
"""

_TURNS = 10
"""Turns of the event loop after which a message would have come that is there: 1 from a server, 2 more for each middleware that
receives in a task of its own, as Starlette's BaseHTTPMiddleware does, and 2 for the first. 33 µs in all."""

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

REPEATS = "app_db.repeats"
"""Key in the scope of a request. The value is None, or a function that says whether the request is answered anew if an error is
raised. Frameworks whose error handlers stand inside of the middleware ask it, and raise the error instead of calling them.
"""


class UnitOfWorkMiddleware:
    """Gives each HTTP request a unit of work. It begins when a session is first asked for, and ends before the response begins.

    A response below 400 commits; see `commit_rule`. If the commit fails, the response is not sent, and the error is raised
    instead. Whatever runs after the response has begun has no unit: streams, background tasks. Web sockets have none either.

    - `attempts`: how often a request may be answered anew if its unit fails with an error that `retryable` accepts
    - `body_limit`: the bytes of a request's body that are kept for that. A request with a larger one is not repeated
    - `read_only_methods`: methods whose units are read-only, `("GET", "HEAD")` for example
    - `rule`: a function to use in place of `commit_rule`
    - `isolation`, `timeout`: how units run, as in `container.transaction()`

    >>> from app_db import Container
    >>> from app_db.integrations.asgi import UnitOfWorkMiddleware
    >>> async def application(scope, receive, send):
    ...     ...
    >>> application = UnitOfWorkMiddleware(application, Container())
    """

    def __init__(self, app: Application, container: DatabaseContainer, **options: Unpack[RequestOptions]) -> None:
        self.app = app
        self.container = container
        self._units = RequestUnits(container, awaited=True, **options)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        may_be_repeated = self._units.attempts > 1
        body = _Body(receive, self._units.body_limit if may_be_repeated else 0)
        before = _copy_of(scope) if may_be_repeated else scope
        attempt = 1
        while (pause := await self._answer(scope, body, send, attempt)) is not None:
            await asyncio.sleep(pause)
            body.rewind()
            scope.clear()
            scope.update(_copy_of(before))
            attempt += 1

    async def _answer(self, scope: Scope, body: _Body, send: Send, attempt: int) -> float | None:
        """Answer a request. If it failed and can be answered anew, return how many seconds to wait before that."""
        unit = self._units.unit_for(scope["method"])
        if unit.is_one_too_many:
            await self.app(scope, body.receive, send)
            return None
        unit.begun_by = lambda: self.endpoint(scope)
        with unit:
            response = _Response(unit, body, send, self._units, scope.setdefault(_COMMITTED, []))
            is_the_last = attempt >= self._units.attempts
            outer = scope.get(REPEATS)
            scope[REPEATS] = None if is_the_last else response.could_be_repeated_after
            try:
                await self.app(scope, body.receive, response.send)  # no copy: middlewares outside read what is written to it
                await response.close()
            except BaseException as error:
                failure = await response.fail(error)
                if not is_the_last and response.may_be_repeated and _may_be_repeated(body, failure):
                    return unit.pause_after(attempt)
                if failure is error:
                    raise
                if isinstance(failure, Exception) and not response.has_begun:
                    unit.renew()  # the one that answers may ask for a session
                    was_answered = await self.respond(scope, body.receive, response.send, failure)
                    if was_answered:
                        return None
                raise failure from failure.__cause__  # a framework may have raised another one because of it
            finally:
                scope[REPEATS] = outer
        return None

    def endpoint(self, scope: Scope) -> Callable[..., object] | None:
        """Return the function that answers a request, after which its unit is named, if the framework has noted it."""
        endpoint: Callable[..., object] | None = scope.get("endpoint")
        return endpoint

    async def respond(self, scope: Scope, receive: Receive, send: Send, failure: Exception) -> bool:
        """Respond to a request that could not commit. Return False to have the error raised."""
        return False


def _copy_of(scope: Scope) -> Scope:
    """Return a copy of a scope, to which an application may write without changing the original."""
    copy = {**scope}
    if isinstance(state := scope.get("state"), dict):
        copy["state"] = {**state}
    return copy


def _may_be_repeated(body: _Body, failure: BaseException) -> bool:
    if body.is_whole:
        _log.info("A request is answered anew after %s", type(failure).__name__)
    else:
        _log.warning("A request is not answered anew after %s: its body is too large to be kept", type(failure).__name__)
    return body.is_whole


class _Body:
    """The messages of a request. They are kept, up to a limit, for another attempt."""

    def __init__(self, receive: Receive, limit: int) -> None:
        self._receive = receive
        self._limit = limit
        self._kept: list[Message] = []
        self._size = 0
        self._next = 0
        self._is_waiting = False
        self.is_whole = True
        """Whether all messages so far are kept."""
        self.client_has_gone = False

    def rewind(self) -> None:
        """Begin anew with the first message."""
        self._next = 0

    async def receive(self) -> Message:
        """Return the next message."""
        if self._next < len(self._kept):
            self._next += 1
            return self._kept[self._next - 1]
        self._is_waiting = True
        try:
            message = await self._receive()
        finally:
            self._is_waiting = False
        self._note(message)
        self._next = len(self._kept)
        return message

    def _note(self, message: Message, *, unread: bool = False) -> None:
        if message["type"] == "http.disconnect":
            self.client_has_gone = True
            return
        self._size += len(message.get("body", b""))
        if unread or (self.is_whole and self._size <= self._limit):
            self._kept.append(message)
        else:
            self.is_whole = False
            self._kept.clear()

    async def look_for_client(self) -> bool:
        """Return whether the client is still there, as far as the server knows by now."""
        for _ in range(2):  # the end of the body that the application has not read, and what comes after it
            if self.client_has_gone or self._is_waiting:
                break
            looking = asyncio.ensure_future(self._receive())
            for _turn in range(_TURNS):
                await asyncio.sleep(0)
                if looking.done():
                    break
            else:
                looking.cancel()
                await asyncio.wait((looking,))
                break
            if looking.exception() is not None:  # of a middleware that has replaced `receive`: it is not known
                break
            message = looking.result()
            self._note(message, unread=True)
            if message.get("more_body"):  # the client is still sending
                break
        return not self.client_has_gone


class _Response:
    """The response of one attempt. Its beginning is the end of the unit."""

    def __init__(self, unit: DeferredUnit, body: _Body, send: Send, units: RequestUnits, committed: list[DeferredUnit]) -> None:
        self._unit = unit
        self._committed = committed
        self._body = body
        self._send = send
        self._units = units
        self._failure: BaseException | None = None
        self._may_pass = False
        self._reason: BaseException | None = None
        """The error because of which the request is answered anew."""
        self.has_begun = False
        """Whether anything was sent."""

    @property
    def may_be_repeated(self) -> bool:
        """Whether nothing has been sent, and the unit failed with an error that may pass."""
        return self._may_pass and not self.has_begun and not self._committed

    def could_be_repeated_after(self, error: BaseException) -> bool:
        """Return whether nothing has been sent, and the unit would fail with an error that may pass.

        If so, the error is to be raised. What is sent nevertheless, by a middleware that answers for all errors, is dropped.
        """
        may_be = self._unit.has_begun and not (self.has_begun or self._committed) and retryable(error)
        if may_be and self._body.is_whole:
            self._reason = error
        return may_be

    async def send(self, message: Message) -> None:
        """Pass a message on. End the unit before the first one."""
        if self._reason is not None:
            return
        if message["type"] == "http.response.start" and not self.has_begun:
            await self._end_unit(message)
            self.has_begun = True
        await self._send(message)

    async def _end_unit(self, start: Message) -> None:
        if not self._unit.has_begun:
            await self._unit.end_awaited(commit=False)
            return
        start["headers"] = pairs = [*start.get("headers", ())]
        headers = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in pairs]
        try:
            if not await self._units.end_awaited(self._unit, start["status"], headers, self._body.look_for_client):
                start["status"] = CLIENT_HAS_GONE  # a client that is there nevertheless hears no success
            if self._unit.has_committed:
                self._committed.append(self._unit)
        except Exception as error:
            self._failure, self._may_pass = error, self._unit.may_pass
            self._unit.renew()  # an error handler may ask for a session
            raise

    async def close(self) -> None:
        """Abort the unit of an application that has returned without a response. Raise the error of its commit again."""
        if self._reason is not None:
            raise self._reason
        if not self.has_begun:
            await self._unit.end_awaited(commit=False)
            if self._failure is not None:
                raise self._failure

    async def fail(self, error: BaseException) -> BaseException:
        """Abort the unit. Return the error to raise: what the commit raised comes before what a framework made of it."""
        if not self._unit.is_over:
            await self._unit.end_awaited(error)
            self._may_pass = self._may_pass or self._unit.may_pass
        return error if self._failure is None else self._failure
