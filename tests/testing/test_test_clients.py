"""Requests of a test client, which runs the application in the context of the test."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
from sqlalchemy import text

from app_db.errors import AwaitRequired
from app_db.testing import isolated
from harness.applications import Application, running

pytestmark = pytest.mark.filterwarnings("ignore:Using `httpx` with `starlette.testclient`")


def client_of(app: Application, name: str) -> Any:
    """A client of Starlette for an application that asks for an async session."""
    responses, testclient = import_module("starlette.responses"), import_module("starlette.testclient")

    async def application(scope: Any, receive: Any, send: Any) -> None:
        async with app.container.transaction():
            found = await app.container.providers[name]().scalar(text("SELECT 42"))
        await app.container.shutdown_resources()
        await responses.PlainTextResponse(str(found))(scope, receive, send)

    return testclient.TestClient(application)


@pytest.mark.parametrize("name", ["writer_async_session", "async_session"])
def test_the_error_of_a_request_inside_a_unit_of_the_test_says_to_end_that_unit(
    new_sqlite_url: Callable[[], str], name: str
) -> None:
    with running(writer=new_sqlite_url()) as app, isolated(app.container):
        client = client_of(app, name)
        with pytest.raises(AwaitRequired, match=r"in another thread, 'MainThread'.*TestClient.*end that unit"), app.unit():
            client.get("/")
        assert client.get("/").text == "42"
