"""Whatever the environment holds, it makes settings or one error that names variables; and it never shows a secret."""

from __future__ import annotations

import json
import logging
import os
import traceback
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import URL

from app_db.errors import NothingConfigured, SettingsError
from app_db.settings import DatabaseSettings

MARKER = "hUnTeR2zZ"

FIELDS = {
    "URL": st.sampled_from(
        ["sqlite://", "sqlite:///x.db", f"postgres://u:{MARKER}@h/d", f"mysql://u:{MARKER}@h:3306/d?ssl_password={MARKER}"]
    ),
    "DRIVER": st.sampled_from(["sqlite", "postgresql", "mysql+pymysql", "nosuch"]),
    "HOST": st.just("h"),
    "PORT": st.sampled_from(["1", "65535", "0", "port"]),
    "USER": st.just("u"),
    "PASSWORD": st.just(MARKER),
    "DATABASE": st.just("d"),
    "QUERY__SSLPASSWORD": st.just(MARKER),
    "QUERY": st.just(json.dumps({"password": MARKER})),
    "PASSWORD_PROVIDER": st.sampled_from(["shop:password", "shop"]),
    "READ_ONLY": st.sampled_from(["true", "0", "perhaps"]),
    "MIRROR": st.sampled_from(["writer", "reader", "log", "nobody"]),
    "TWO_PHASE": st.sampled_from(["true", "0"]),
    "TRANSACTIONAL": st.sampled_from(["yes", "no"]),
    "ISOLATION_LEVEL": st.sampled_from(["serializable", "AUTOCOMMIT", "none"]),
    "STATEMENT_TIMEOUT": st.sampled_from(["1", "0.5", "-1", "nan"]),
    "ECHO": st.sampled_from(["true", "off"]),
    "POOL": st.sampled_from(['{"size": 3}', "{}", "3", "null"]),
    "POOL__SIZE": st.sampled_from(["1", "-1", "1e400", "many"]),
    "POOL__CLASS": st.sampled_from(["null", "a:B", "a b"]),
    "SESSION__AUTOFLUSH": st.sampled_from(["true", "perhaps"]),
    "CONNECT_ARGS__PASSWORD": st.just(MARKER),
    "CONNECT_ARGS__TIMEOUT": st.just("5"),
    "CONNECT_ARGS": st.just(json.dumps({"auth": {"token": MARKER}})),
}
JUNK = st.one_of(
    st.just(MARKER),
    st.just("{" + MARKER),
    st.just(json.dumps([MARKER])),
    st.just(json.dumps({MARKER.lower(): {"url": MARKER}}).replace(MARKER.lower(), "writer")),
    st.builds(
        lambda before, after: f"{before}{MARKER}{after}",
        st.sampled_from(["", "sqlite", "postgres://", "postgres://u:x@", "postgres://u:p/", "://", "1"]),
        st.text(st.characters(min_codepoint=32, max_codepoint=0x2FF, categories=("L", "N", "P", "S", "Zs")), max_size=8),
    ),
)
names = st.sampled_from(["WRITER", "READER", "LOG", "writer", "A_B", "CLASS", "1"])
segment = st.text("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_", max_size=10)


@st.composite
def valid_or_nearly(draw: st.DrawFn) -> dict[str, str]:
    """Variables of which each is one that is read, most with a value of the right kind."""
    chosen: dict[str, str] = {}
    for _ in range(draw(st.integers(0, 12))):
        field = draw(st.sampled_from(sorted(FIELDS)))
        chosen[f"APP_DB_CONNECTIONS__{draw(names)}__{field}"] = draw(FIELDS[field])
    return chosen


@st.composite
def broken(draw: st.DrawFn) -> dict[str, str]:
    """Variables of which any may be misspelt, too deep, or hold the secret where no secret belongs."""
    known = st.builds(lambda name, field: f"CONNECTIONS__{name}__{field}", names, st.sampled_from(sorted(FIELDS)))
    top = st.sampled_from(["CONNECTIONS", "CONNECTIONS__WRITER", "APPLICATION", "ATOMICITY"])
    ends = st.one_of(
        known, top, st.lists(segment, min_size=1, max_size=4).map("__".join), st.builds("{}__{}".format, known, segment)
    )
    chosen = draw(st.dictionaries(ends.map(lambda end: f"APP_DB_{end}"), JUNK, max_size=6))
    return {**chosen, **({"DATABASE_URL": draw(JUNK)} if draw(st.booleans()) else {})}


def outcome(environment: dict[str, str], **given_in_code: Any) -> DatabaseSettings | SettingsError:
    with patch.dict(os.environ, environment):
        try:
            return DatabaseSettings(**given_in_code)
        except SettingsError as error:
            return error


def shown(result: DatabaseSettings | SettingsError) -> str:
    """Return all that anybody may see of a result, a log record and a traceback among it."""
    cause = result if isinstance(result, BaseException) else None
    record = logging.LogRecord(
        "test", logging.ERROR, __file__, 1, "%s %r", (result, result), (type(cause), cause, None) if cause else None
    )
    parts = [str(result), repr(result), logging.Formatter().format(record)]
    if isinstance(result, SettingsError):
        parts += traceback.format_exception(result)
        parts += [f"{problem!r}" for problem in result.problems]
    else:
        parts += [repr(result.origins()), repr(result.model_dump()), result.model_dump_json()]
        parts += [f"{result.connection(name)!r} {result.connection(name).masked_url}" for name in result.connections]
    return "\n".join(parts)


many = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@many
@given(environment=st.builds(lambda one, other: {**one, **other}, valid_or_nearly(), st.one_of(st.just({}), broken())))
def test_any_environment_makes_settings_or_one_error_whose_problems_name_variables(environment: dict[str, str]) -> None:
    result = outcome(environment)
    if isinstance(result, SettingsError):
        assert result.problems
        assert result.__context__ is None
        for problem in result.problems:
            assert problem.variable.startswith("APP_DB_") or problem.variable == "DATABASE_URL"
            assert problem.message


@many
@given(environment=valid_or_nearly())
def test_no_secret_is_shown_of_settings_or_of_their_error(environment: dict[str, str]) -> None:
    assert MARKER not in shown(outcome(environment))


@pytest.mark.exhaustive
@many
@given(environment=st.builds(lambda one, other: {**one, **other}, valid_or_nearly(), broken()))
def test_an_error_never_shows_a_value_that_was_given(environment: dict[str, str]) -> None:
    result = outcome(environment)
    if isinstance(result, SettingsError):
        assert MARKER not in shown(result)


@many
@given(environment=valid_or_nearly())
def test_settings_that_are_accepted_name_a_database_for_every_connection(environment: dict[str, str]) -> None:
    result = outcome(environment)
    if isinstance(result, DatabaseSettings):
        for name in {*result.connections, *({"reader"} if "writer" in result.connections else ())}:
            connection = result.connection(name)
            assert connection.sqlalchemy_url().get_dialect()
            assert not (connection.read_only and connection.two_phase)
        assert {origin.variable for origin in result.origins()} >= {
            name.upper() for name in environment if "__QUERY" not in name and "{" not in environment[name]
        }


@many
@given(end=st.lists(segment, min_size=1, max_size=4).map("__".join))
def test_a_variable_is_read_or_it_is_an_error(end: str) -> None:
    variable = f"APP_DB_{end}".upper()
    result = outcome({variable: "1", "APP_DB_CONNECTIONS__WRITER__URL": "sqlite://"})
    if isinstance(result, DatabaseSettings):
        assert variable in {origin.variable for origin in result.origins()}
    else:
        # A setting of a connection that has no database is read; what is missing is then reported beside it.
        assert any(problem.variable.startswith(variable) or problem.variable.endswith("__URL") for problem in result.problems)


@pytest.mark.exhaustive
@many
@given(password=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")), user=st.text("ab@:/%", min_size=1))
def test_every_password_comes_through_parts_and_quoted_urls(password: str, user: str) -> None:
    prefix = "APP_DB_CONNECTIONS__WRITER__"
    parts = outcome({f"{prefix}DRIVER": "postgresql", f"{prefix}HOST": "h", f"{prefix}USER": user, f"{prefix}PASSWORD": password})
    assert isinstance(parts, DatabaseSettings)
    expected = URL.create("postgresql+psycopg", user, password, "h")
    assert parts.connections["writer"].sqlalchemy_url() == expected
    by_url = outcome({f"{prefix}URL": expected.render_as_string(hide_password=False)})
    assert isinstance(by_url, DatabaseSettings)
    assert by_url.connections["writer"].sqlalchemy_url() == expected


@many
@given(variables=st.dictionaries(segment.map(lambda end: f"APPLICATION_{end}"), st.text("abc"), max_size=4))
def test_variables_of_others_change_nothing(variables: dict[str, str]) -> None:
    assert isinstance(outcome(variables), NothingConfigured)
