"""What app_db knows of Litestar that Litestar does not promise. Each test says what breaks when it goes."""

from __future__ import annotations

from typing import Any

from litestar import Litestar, MediaType, Request, Response, get
from litestar.middleware import DefineMiddleware
from litestar.testing import TestClient

from app_db._compat.litestar import answering_errors, own_connection_state


class Failing:
    """A middleware whose `send` fails once, as a COMMIT does, with what app_db uses and without it."""

    def __init__(self, app: Any, *, helped: bool) -> None:
        self.app, self.helped = app, helped

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        has_failed = False

        async def failing(message: Any) -> None:
            nonlocal has_failed
            if not has_failed and scope["type"] == "http":
                has_failed = True
                raise KeyError("COMMIT")
            await send(message)

        if not self.helped:
            await self.app(scope, receive, failing)
            return

        async def failed(*arguments: object) -> None:
            raise KeyError("COMMIT")

        try:
            with own_connection_state(scope):
                await self.app(scope, receive, failing)
        except Exception:
            await answering_errors(failed)(scope, receive, send)


def heard(*, helped: bool) -> tuple[int, str]:
    @get("/")
    async def there() -> str:
        return "there"

    def on_error(request: Request[Any, Any, Any], error: KeyError) -> Response[str]:
        return Response("handled", status_code=409, media_type=MediaType.TEXT)

    middleware: Any = Failing
    app = Litestar([there], middleware=[DefineMiddleware(middleware, helped=helped)], exception_handlers={KeyError: on_error})
    with TestClient(app, raise_server_exceptions=False) as client:
        answer = client.get("/")
        return answer.status_code, answer.text


def test_the_handlers_of_the_route_answer_for_a_response_that_could_not_begin() -> None:
    """Without a state of its own for each attempt, or without Litestar's middleware, a failed COMMIT would reach no handler."""
    assert heard(helped=True) == (409, "handled")
    assert heard(helped=False) != (409, "handled"), "Litestar can do it by itself now: remove _compat/litestar.py"
