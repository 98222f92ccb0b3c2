"""Options of the command line and of pytest's configuration, and the header of the report."""

from __future__ import annotations

import re

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("app_db", "databases of app_db")
    group.addoption(
        "--app-db-url",
        action="append",
        default=[],
        metavar="NAME=URL",
        help="use another database for the connection NAME of the fixture app_db_container (repeatable)",
    )
    parser.addini("app_db_urls", "databases of connections, NAME=URL a line; --app-db-url wins", type="linelist", default=[])
    parser.addini("app_db_row_counts", "report rows that a test has committed outside its isolation", type="bool", default=True)
    parser.addini("app_db_worker_databases", "give each worker of pytest-xdist databases of its own", type="bool", default=True)


def pytest_configure(config: pytest.Config) -> None:
    urls_given(config)


def urls_given(config: pytest.Config) -> dict[str, str]:
    """Return the URLs that were given, by connection. An error shows none of them, because it may hold a password."""
    given: dict[str, str] = {}
    configured, on_command_line = config.getini("app_db_urls"), config.getoption("app_db_url")
    for origin, texts in (("app_db_urls", configured or ()), ("--app-db-url", on_command_line or ())):
        for text in texts:
            name, equals, url = text.partition("=")
            if not (equals and url.strip() and re.fullmatch(r"[a-z]\w*", name.strip())):
                raise pytest.UsageError(
                    f"{origin} takes NAME=URL, for example writer=sqlite:///test.db, and was given something else"
                )
            given[name.strip()] = url.strip()
    return given


def pytest_report_header(config: pytest.Config) -> list[str]:
    return [f"app_db: {name}={_masked(url)}" for name, url in urls_given(config).items()]


def _masked(url: str) -> str:
    from app_db import AppDbError, ConnectionSettings

    try:
        return ConnectionSettings(url=url).masked_url
    except AppDbError:
        return "***"


def is_worker(config: pytest.Config) -> bool:
    """Return whether this process is a worker of pytest-xdist."""
    return hasattr(config, "workerinput")
