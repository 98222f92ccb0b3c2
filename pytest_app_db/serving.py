"""The application of the project on a real port, for browsers and clients."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from app_db.testing import Isolation, LiveServer

PASTE = """\
The fixture app_db_live_server needs the ASGI or WSGI application of your project. Put this into conftest.py:

    import pytest
    from shop.web import app  # wherever yours is

    @pytest.fixture(scope="session")
    def app_db_application():
        return app
"""


@pytest.fixture(scope="session")
def app_db_application() -> Callable[..., Any]:
    """The ASGI or WSGI application. The project overrides this fixture to return it."""
    pytest.fail(PASTE, pytrace=False)


@pytest.fixture
def app_db_live_server(app_db_isolation: Isolation | None, app_db_application: Callable[..., Any]) -> Generator[LiveServer]:
    """Run the application on a free port while the test lasts. What its requests write is rolled back with the test.

    `app_db_live_server.url` is its address. An error of the application is in the log of the test.
    """
    from app_db.testing import live_server

    with live_server(app_db_application) as server:
        yield server
