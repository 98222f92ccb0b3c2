"""What the settings promise: they say which databases there are, name every mistake at once, and keep secrets."""

from __future__ import annotations

import copy
import json
import logging
import os
import pickle
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from pydantic import BaseModel, Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict
from sqlalchemy import create_engine, make_url

from app_db.errors import (
    ConnectionNotConfigured,
    ContradictorySettings,
    NothingConfigured,
    SettingsError,
    UnknownVariable,
)
from app_db.settings import ConnectionSettings, DatabaseSettings, Origin, PoolSettings, SessionSettings
from harness.paths import ROOT

SECRET = "s3cr3t-pa55"
EXAMPLE = ROOT / "settings.example.env"
AWKWARD_PASSWORDS = [
    "p@ss",
    "a:b",
    "a/b",
    "100%",
    "%40",
    "who?",
    "#1",
    "a b",
    "+",
    "pä@ss/wörd%?#:",
    "日本",
    "'\"\\",
    "[x]",
    "&=;",
    "@@",
    "%zz",
    "",
]


Set = Callable[..., None]


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Set:
    """Sets variables by the end of their names: `WRITER__URL` is `APP_DB_CONNECTIONS__WRITER__URL`."""

    def set_variables(**variables: str) -> None:
        for name, value in variables.items():
            full = name if name.upper().startswith(("APP_DB_", "DATABASE_URL", "DB__")) else f"APP_DB_CONNECTIONS__{name}"
            monkeypatch.setenv(full, value)

    return set_variables


def refused(kind: type[SettingsError] = SettingsError, **given: Any) -> dict[str, str]:
    """Return what is wrong, by variable, once it has been seen that the error is of exactly this kind and shows no secret."""
    with pytest.raises(SettingsError) as caught:
        DatabaseSettings(**given)
    assert type(caught.value) is kind
    shown = "".join(traceback.format_exception(caught.value)) + repr(caught.value)
    assert SECRET not in shown
    assert caught.value.__context__ is None
    assert len({problem.variable for problem in caught.value.problems}) == len(caught.value.problems)
    return {problem.variable: problem.message for problem in caught.value.problems}


def variables(*ends: str) -> set[str]:
    return {f"APP_DB_CONNECTIONS__{end}" for end in ends}


# ---- where settings come from -----------------------------------------------------------------------------------


def test_environment_variables_make_connections(environment: Set) -> None:
    environment(WRITER__URL="sqlite:///w.db", WRITER__POOL__SIZE="7", LOG__URL="sqlite:///l.db", LOG__TRANSACTIONAL="no")
    settings = DatabaseSettings()
    assert set(settings.connections) == {"writer", "log"}
    assert settings.connections["writer"].pool.size == 7
    assert not settings.connections["log"].transactional
    assert settings.application == "app_db"


def test_names_of_variables_may_be_written_in_lower_case(environment: Set) -> None:
    environment(app_db_connections__writer__url="sqlite:///w.db")
    assert DatabaseSettings().connections["writer"].masked_url == "sqlite:///w.db"


def test_groups_can_be_json_and_single_variables_refine_them(environment: Set) -> None:
    environment(
        APP_DB_CONNECTIONS='{"writer": {"url": "sqlite:///w.db", "pool": {"size": 2, "timeout": 1}}, "log": {"url": "sqlite:///l.db"}}',
        WRITER__POOL__SIZE="3",
    )
    settings = DatabaseSettings()
    assert settings.connections["writer"].pool == PoolSettings(size=3, timeout=1)
    assert set(settings.connections) == {"writer", "log"}


def test_driver_arguments_are_read_as_json_where_they_are_json(environment: Set) -> None:
    environment(
        WRITER__URL="sqlite:///w.db",
        WRITER__CONNECT_ARGS__CONNECT_TIMEOUT="5",
        WRITER__CONNECT_ARGS__SSL__CA="/etc/ca",
        WRITER__CONNECT_ARGS__NAME='"5"',
    )
    connection = DatabaseSettings(connections={"writer": {"connect_args": {"Extra": [1]}}}).connections["writer"]
    assert connection.connect_args == {"connect_timeout": 5, "ssl": {"ca": "/etc/ca"}, "name": "5", "Extra": [1]}


def test_query_values_stay_text(environment: Set) -> None:
    environment(WRITER__DRIVER="sqlite", WRITER__QUERY__TIMEOUT="5")
    assert DatabaseSettings().connections["writer"].sqlalchemy_url().query == {"timeout": "5"}


def test_dotenv_configures_and_variables_of_others_in_it_are_ignored(environment: Set) -> None:
    Path(".env").write_text("APP_DB_CONNECTIONS__WRITER__URL=sqlite:///dotenv.db\nSHOP_COLOUR=red\nAPP_NAME=x\nEMPTY\n")
    assert DatabaseSettings().connections["writer"].masked_url == "sqlite:///dotenv.db"
    environment(WRITER__URL="sqlite:///environment.db")
    assert DatabaseSettings().connections["writer"].masked_url == "sqlite:///environment.db"


def test_other_env_files_can_be_named_or_none(tmp_path: Path) -> None:
    Path(".env").write_text("APP_DB_CONNECTIONS__WRITER__URL=sqlite:///dotenv.db\n")
    other = tmp_path / "other.env"
    other.write_text("APP_DB_CONNECTIONS__WRITER__URL=sqlite:///other.db\n")
    assert DatabaseSettings(_env_file=other).connections["writer"].masked_url == "sqlite:///other.db"
    refused(NothingConfigured, _env_file=None)


@pytest.mark.parametrize(
    "line",
    [
        "APP_DB_CONNECTIONS__WRITER__READ_ONLY true",
        "export APP_DB_CONNECTIONS__WRITER__READ_ONLY: true",
        'app_db_connections__writer__read_only="true',
    ],
)
def test_a_line_of_an_env_file_that_can_not_be_read_is_a_problem(line: str) -> None:
    lines = ["APP_DB_CONNECTIONS__WRITER__URL=sqlite:///w.db", "", "DATABASE_URL_OLD x", "APP_DB_APPLICATION", line, "OTHER='"]
    Path(".env").write_text("\n".join(lines))
    [(name, message)] = refused().items()
    assert name.upper() == "APP_DB_CONNECTIONS__WRITER__READ_ONLY"
    assert message.startswith(f"can't be read in line 5 of .env. Write {name}=value.")


def test_an_env_file_that_is_not_text_is_a_problem() -> None:
    Path(".env").write_bytes(b"APP_DB_X=\xff\xfe" + SECRET.encode())
    assert ".env" in refused(given=1)


def test_secrets_are_read_from_files_at_any_depth_below_everything_else(environment: Set, tmp_path: Path) -> None:
    secrets = tmp_path / "secrets"
    secrets.mkdir()
    (secrets / "app_db_connections__writer__password").write_text(" p@ss word\n")
    (secrets / "APP_DB_CONNECTIONS__WRITER__USER").write_text("from-secrets")
    (secrets / "other_application").write_bytes(b"\xff")
    (secrets / "app_db_directory").mkdir()
    environment(WRITER__DRIVER="postgresql", WRITER__HOST="db", WRITER__USER="from-environment")
    settings = DatabaseSettings(_secrets_dir=secrets)
    url = settings.connections["writer"].sqlalchemy_url()
    assert (url.password, url.username) == (" p@ss word", "from-environment")
    assert Origin("APP_DB_CONNECTIONS__WRITER__PASSWORD", "secrets", "***") in settings.origins()


def test_a_missing_secrets_directory_is_warned_of() -> None:
    with pytest.warns(UserWarning, match="nowhere"):
        DatabaseSettings(connections={"writer": {"url": "sqlite://"}}, _secrets_dir="nowhere")


def test_a_subclass_can_name_its_own_files_and_fields(environment: Set, tmp_path: Path) -> None:
    class Ours(DatabaseSettings):
        model_config = SettingsConfigDict(env_file="ours.env", secrets_dir=str(tmp_path))
        colour: str = "red"

    Path("ours.env").write_text("APP_DB_COLOUR=blue\n")
    (tmp_path / "app_db_connections__writer__url").write_text("sqlite:///s.db")
    settings = Ours()
    assert (settings.colour, settings.connections["writer"].masked_url) == ("blue", "sqlite:///s.db")


def test_a_subclass_can_have_connections_without_a_source() -> None:
    class Ours(DatabaseSettings):
        connections: dict[str, ConnectionSettings] = Field(default={"writer": ConnectionSettings(url="sqlite:///w.db")})

    settings = Ours()
    assert (settings.connections["writer"].masked_url, settings.origins()) == ("sqlite:///w.db", [])


def test_what_is_given_in_code_wins_setting_by_setting(environment: Set) -> None:
    environment(WRITER__URL="sqlite:///environment.db", WRITER__POOL__SIZE="7", WRITER__POOL__TIMEOUT="3")
    given: dict[str, Any] = {"url": "sqlite:///code.db", "pool": {"size": 2}}
    connections: list[Any] = [given, ConnectionSettings(**given), ConnectionSettings(url=given["url"], pool=PoolSettings(size=2))]
    for connection in connections:
        writer = DatabaseSettings(connections={"writer": connection}).connections["writer"]
        assert (writer.masked_url, writer.pool) == ("sqlite:///code.db", PoolSettings(size=2, timeout=3))


def test_an_empty_group_in_code_takes_nothing_away(environment: Set) -> None:
    environment(WRITER__URL="sqlite:///w.db")
    assert set(DatabaseSettings(connections={}).connections) == {"writer"}


def test_database_url_is_the_writer_when_nothing_else_says_who_that_is(environment: Set) -> None:
    environment(DATABASE_URL="postgres://u:p@h/db", WRITER__POOL__SIZE="7", LOG__URL="sqlite:///l.db")
    writer = DatabaseSettings().connections["writer"]
    assert writer.sqlalchemy_url() == make_url("postgresql+psycopg://u:p@h/db")
    assert writer.pool.size == 7


@pytest.mark.parametrize("name", ["URL", "MIRROR"])
def test_database_url_does_not_touch_a_writer_that_is_configured(environment: Set, name: str) -> None:
    environment(DATABASE_URL="postgres://u:p@h/db", LOG__URL="sqlite:///x.db")
    environment(**{f"WRITER__{name}": {"URL": "sqlite:///x.db", "MIRROR": "log"}[name]})
    assert DatabaseSettings().connection("writer").masked_url == "sqlite:///x.db"


def test_database_url_is_read_from_dotenv_and_the_environment_wins(environment: Set) -> None:
    Path(".env").write_text("DATABASE_URL=sqlite:///dotenv.db\n")
    assert DatabaseSettings().connections["writer"].masked_url == "sqlite:///dotenv.db"
    environment(DATABASE_URL="sqlite:///environment.db")
    assert DatabaseSettings().connections["writer"].masked_url == "sqlite:///environment.db"


def test_an_empty_database_url_counts_as_unset(environment: Set) -> None:
    environment(DATABASE_URL="")
    refused(NothingConfigured)


def test_origins_say_where_each_setting_came_from(environment: Set, tmp_path: Path) -> None:
    (tmp_path / "app_db_connections__log__url").write_text(f"postgresql://u:{SECRET}@h/log?sslpassword={SECRET}")
    Path(".env").write_text("APP_DB_ATOMICITY=best_effort\n")
    environment(
        DATABASE_URL=f"postgresql://u:{SECRET}@h/db",
        WRITER__POOL='{"size": 2}',
        WRITER__CONNECT_ARGS=json.dumps({"password": SECRET, "n": 1}),
    )
    origins = DatabaseSettings(application="shop", _secrets_dir=tmp_path).origins()
    assert [(origin.variable.removeprefix("APP_DB_"), origin.source, origin.shown_value) for origin in origins] == [
        ("APPLICATION", "given in code", "shop"),
        ("ATOMICITY", ".env", "best_effort"),
        ("CONNECTIONS__LOG__URL", "secrets", "postgresql+psycopg://u:***@h/log?sslpassword=***"),
        ("CONNECTIONS__WRITER__CONNECT_ARGS__N", "environment", "1"),
        ("CONNECTIONS__WRITER__CONNECT_ARGS__PASSWORD", "environment", "***"),
        ("CONNECTIONS__WRITER__POOL__SIZE", "environment", "2"),
        ("CONNECTIONS__WRITER__URL", "DATABASE_URL", "postgresql+psycopg://u:***@h/db"),
    ]


# ---- URLs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("password", AWKWARD_PASSWORDS)
def test_any_password_comes_through_a_quoted_url(environment: Set, password: str) -> None:
    environment(WRITER__URL=f"postgresql://u:{quote(password, safe='')}@h:5/db")
    url = DatabaseSettings().connections["writer"].sqlalchemy_url()
    assert (url.password, url.username, url.host, url.port, url.database) == (password, "u", "h", 5, "db")


@pytest.mark.parametrize("password", AWKWARD_PASSWORDS)
def test_any_password_comes_through_the_parts(environment: Set, password: str) -> None:
    environment(
        WRITER__DRIVER="postgresql", WRITER__HOST="h", WRITER__USER="u@x", WRITER__PASSWORD=password, WRITER__DATABASE="db"
    )
    connection = DatabaseSettings().connections["writer"]
    url = connection.sqlalchemy_url()
    assert (url.password, url.username, url.host, url.database) == (password, "u@x", "h", "db")
    assert make_url(url.render_as_string(hide_password=False)).password == password
    assert connection.masked_url == "postgresql+psycopg://u%40x:***@h/db"


@pytest.mark.parametrize(
    ("given", "drivername"),
    [
        ("postgres", "postgresql+psycopg"),
        ("postgresql", "postgresql+psycopg"),
        ("postgresql+asyncpg", "postgresql+asyncpg"),
        ("mysql", "mysql+pymysql"),
        ("mariadb", "mariadb+pymysql"),
        ("sqlite", "sqlite"),
    ],
)
def test_a_bare_dialect_gets_its_driver(given: str, drivername: str) -> None:
    by_url = ConnectionSettings(url=f"{given}://u@h/db").sqlalchemy_url()
    assert by_url == ConnectionSettings(driver=given, user="u", host="h", database="db").sqlalchemy_url()
    assert by_url.drivername == drivername


def test_a_url_object_is_as_good_as_its_text() -> None:
    url = make_url(f"postgresql+psycopg://u:{SECRET}@h/db")
    settings = DatabaseSettings(connections={"writer": {"url": url}, "log": ConnectionSettings(url=url)})
    assert settings.connections["writer"].sqlalchemy_url() == settings.connections["log"].sqlalchemy_url() == url
    assert SECRET not in f"{settings!r}{settings.origins()}"


@pytest.mark.parametrize(
    "key",
    [
        "password",
        "sslpassword",
        "api_token",
        "client_secret",
        "passwd",
        "PWD",
        "api_key",
        "access-key",
        "scram_client_key",
        "init_command",
        "Authorization",
    ],
)
def test_secrets_in_the_query_of_a_url_are_masked(key: str) -> None:
    connection = ConnectionSettings(url=f"postgresql://h/db?{key}={SECRET}&zone=1")
    assert connection.masked_url == f"postgresql+psycopg://h/db?{key}=***&zone=1"
    assert connection.sqlalchemy_url().query[key] == SECRET
    parts = ConnectionSettings(driver="postgresql", query={key: SECRET})
    assert SECRET not in f"{parts}{parts!r}{parts.masked_url}{parts.model_dump()}"


@pytest.mark.parametrize(
    "url",
    [
        "",
        "nonsense",
        SECRET,
        f"postgresql://u:{SECRET}@h:port/db",
        f"postgresql://u:x@{SECRET}@h/db",
        f"postgresql://u:x?@{SECRET}@h/db",
    ],
)
def test_a_url_that_is_unreadable_or_ambiguous_is_refused_unshown(environment: Set, url: str) -> None:
    environment(WRITER__URL=url)
    problems = refused()
    assert set(problems) == variables("WRITER__URL")
    assert "%40" in problems["APP_DB_CONNECTIONS__WRITER__URL"]


def test_a_mistake_in_database_url_is_reported_under_its_name(environment: Set) -> None:
    environment(DATABASE_URL=f"{SECRET}://u:{SECRET}@h")
    assert set(refused()) == {"DATABASE_URL"}


def test_a_bare_connection_without_a_database_says_so() -> None:
    with pytest.raises(SettingsError, match="__URL"):
        ConnectionSettings().sqlalchemy_url()


def test_an_unknown_dialect_is_a_problem(environment: Set) -> None:
    environment(WRITER__URL=f"nosuchdb://u:{SECRET}@h/db", LOG__DRIVER="postgresql+nosuchdriver")
    problems = refused()
    assert set(problems) == variables("WRITER__URL", "LOG__DRIVER")
    assert all("pip install" in message for message in problems.values())


def test_a_driver_that_is_not_installed_is_a_problem_that_says_what_to_install(
    environment: Set, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app_db.settings._urls.find_spec", lambda module: None)
    environment(WRITER__URL=f"postgresql://u:{SECRET}@h/db", WRITER__TWO_PHASE="yes", LOG__URL="sqlite:///l.db")
    assert "pip install 'psycopg[binary]'" in refused()["APP_DB_CONNECTIONS__WRITER__URL"]


# ---- mirrors and identity ---------------------------------------------------------------------------------------


def test_a_reader_nobody_configured_is_the_writer_read_only() -> None:
    settings = DatabaseSettings(connections={"writer": {"url": "sqlite://", "pool": {"size": 7}}})
    reader = settings.connection("reader")
    assert reader.read_only
    assert reader.sqlalchemy_url() == settings.connection("writer").sqlalchemy_url()
    assert reader.pool.size == PoolSettings().size
    assert "reader" not in settings.connections


def test_a_reader_that_is_configured_is_what_it_says() -> None:
    connections = {"writer": {"url": "sqlite:///w.db"}, "reader": {"url": "sqlite:///r.db"}}
    reader = DatabaseSettings(connections=connections).connection("reader")
    assert (reader.masked_url, reader.read_only) == ("sqlite:///r.db", False)


def test_a_mirror_takes_the_database_and_keeps_its_own_use() -> None:
    settings = DatabaseSettings(
        connections={
            "writer": {
                "driver": "postgresql",
                "host": "h",
                "query": {"a": "b"},
                "password_provider": "shop:password",
                "connect_args": {"x": 1},
                "echo": True,
                "two_phase": True,
                "isolation_level": "SERIALIZABLE",
            },
            "report": {"mirror": "writer", "read_only": True, "statement_timeout": 60, "session": {"autoflush": False}},
            "second": {"mirror": "report"},
        }
    )
    report, second, writer = (settings.connection(name) for name in ("report", "second", "writer"))
    assert report.sqlalchemy_url() == second.sqlalchemy_url() == writer.sqlalchemy_url()
    assert (report.password_provider, report.connect_args) == ("shop:password", {"x": 1})
    assert (report.read_only, report.statement_timeout, report.session) == (True, 60, SessionSettings(autoflush=False))
    assert (report.echo, report.two_phase, report.isolation_level, second.read_only) == (False, False, None, False)


def test_an_unknown_connection_is_refused_by_name() -> None:
    with pytest.raises(ConnectionNotConfigured) as caught:
        DatabaseSettings(connections={"log": {"url": "sqlite://"}}).connection("reader")
    assert (caught.value.name, caught.value.configured) == ("reader", ("log",))


def test_a_database_is_the_same_object_for_mirrors_and_copies_and_another_for_others() -> None:
    shared = ConnectionSettings(url="sqlite://")
    settings = DatabaseSettings(connections={"writer": shared, "log": shared, "report": {"mirror": "writer"}})
    key = settings.connection("writer").database_identity()
    assert settings.connection("reader").database_identity() is key
    assert settings.connection("report").database_identity() is key
    assert copy.deepcopy(settings).connection("reader").database_identity() is key
    assert copy.copy(settings.connection("reader")).database_identity() is key
    assert settings.connection("log").database_identity() is not key
    assert DatabaseSettings(connections={"writer": shared}).connection("writer").database_identity() is not key


def test_mirrors_still_share_a_database_after_pickling() -> None:
    settings: DatabaseSettings = pickle.loads(pickle.dumps(DatabaseSettings(connections={"writer": {"url": "sqlite://"}})))
    assert settings.connection("reader").database_identity() is settings.connection("writer").database_identity()


def test_settings_are_frozen() -> None:
    settings = DatabaseSettings(connections={"writer": {"url": "sqlite://"}})
    with pytest.raises(ValidationError):
        settings.application = "other"
    with pytest.raises(ValidationError):
        settings.connections["writer"].read_only = True


# ---- mistakes ---------------------------------------------------------------------------------------------------


def test_nothing_configured_names_the_variable_and_gives_a_line_to_paste() -> None:
    problems = refused(NothingConfigured)
    assert set(problems) == variables("WRITER__URL")
    assert "APP_DB_CONNECTIONS__WRITER__URL=sqlite:///writer.db" in problems["APP_DB_CONNECTIONS__WRITER__URL"]


def test_the_line_to_paste_works(environment: Set) -> None:
    with pytest.raises(NothingConfigured) as caught:
        DatabaseSettings()
    Path(".env").write_text(caught.value.message.split()[-1])
    assert DatabaseSettings().connections["writer"].masked_url == "sqlite:///writer.db"


@pytest.mark.parametrize(
    ("typo", "meant"),
    [
        ("APP_DB_APLICATION", "APP_DB_APPLICATION"),
        ("APP_DB_CONECTIONS__WRITER__URL", "APP_DB_CONNECTIONS__WRITER__URL"),
        ("APP_DB_CONECTIONS__SHOP__URL", "APP_DB_CONNECTIONS__SHOP__URL"),
        ("APP_DB_CONNECTIONS_WRITER_URL", "APP_DB_CONNECTIONS__WRITER__URL"),
        ("APP_DB_CONNECTIONS__WAREHOUSE__ULR", "APP_DB_CONNECTIONS__WAREHOUSE__URL"),
        ("APP_DB_CONNECTIONS__WRITER__POOL__SIZ", "APP_DB_CONNECTIONS__WRITER__POOL__SIZE"),
        ("APP_DB_CONNECTIONS__WRITER__SESSION__AUTO_FLUSH", "APP_DB_CONNECTIONS__WRITER__SESSION__AUTOFLUSH"),
        ("APP_DB_APPLICATION__NAME", "APP_DB_APPLICATION"),
        ("APP_DB__CONNECTIONS__WRITER__URL", "APP_DB_CONNECTIONS__WRITER__URL"),
    ],
)
@pytest.mark.parametrize("place", ["environment", ".env", "secrets"])
def test_a_variable_nobody_reads_is_an_error_that_guesses_what_was_meant(
    environment: Set, tmp_path: Path, place: str, typo: str, meant: str
) -> None:
    secrets = tmp_path / "secrets"
    secrets.mkdir()
    environment(WRITER__URL="sqlite:///w.db", WAREHOUSE__URL="sqlite:///h.db")
    if place == "environment":
        environment(**{typo: SECRET})
    else:
        Path(".env").write_text(f"{typo}={SECRET}\n") if place == ".env" else (secrets / typo.lower()).write_text(SECRET)
    problems = refused(UnknownVariable, _secrets_dir=secrets)
    assert set(problems) == {typo}
    assert f"Did you mean {meant!r}?" in problems[typo]


def test_a_misspelt_only_connection_is_one_problem(environment: Set) -> None:
    environment(APP_DB_CONECTIONS__WRITER__URL="sqlite:///w.db")
    assert set(refused(UnknownVariable)) == {"APP_DB_CONECTIONS__WRITER__URL"}


def test_unknown_keys_in_json_and_in_code_are_unknown_variables(environment: Set) -> None:
    environment(WRITER='{"url": "sqlite:///w.db", "pool": {"sise": 1}}')
    problems = refused(UnknownVariable, colour="red", connections={"writer": {"read_onli": True}})
    assert set(problems) == {"APP_DB_COLOUR", *variables("WRITER__POOL__SISE", "WRITER__READ_ONLI")}
    assert "POOL__SIZE'?" in problems["APP_DB_CONNECTIONS__WRITER__POOL__SISE"]


CONTRADICTIONS: list[tuple[dict[str, str], str]] = [
    ({"WRITER__URL": "postgresql://h/d", "WRITER__READ_ONLY": "1", "WRITER__TWO_PHASE": "1"}, "WRITER__TWO_PHASE"),
    ({"WRITER__URL": "sqlite:///w.db", "WRITER__READ_ONLY": "1", "WRITER__TRANSACTIONAL": "0"}, "WRITER__TRANSACTIONAL"),
    ({"WRITER__URL": "postgresql://h/d", "WRITER__TRANSACTIONAL": "0", "WRITER__TWO_PHASE": "1"}, "WRITER__TWO_PHASE"),
    ({"WRITER__URL": "postgresql://h/d", "WRITER__ISOLATION_LEVEL": "autocommit", "WRITER__TWO_PHASE": "1"}, "WRITER__TWO_PHASE"),
    ({"WRITER__URL": "sqlite:///w.db", "WRITER__ISOLATION_LEVEL": "autocommit"}, "WRITER__ISOLATION_LEVEL"),
    ({"WRITER__URL": "sqlite:///w.db", "LOG__MIRROR": "writer", "LOG__ISOLATION_LEVEL": "AUTOCOMMIT"}, "LOG__ISOLATION_LEVEL"),
    ({"WRITER__URL": "sqlite:///w.db", "WRITER__HOST": SECRET}, "WRITER__URL"),
    ({"WRITER__URL": "sqlite:///w.db", "WRITER__QUERY__A": SECRET}, "WRITER__URL"),
    ({"WRITER__URL": "sqlite:///w.db", "WRITER__PASSWORD": ""}, "WRITER__URL"),
    ({"WRITER__POOL__SIZE": "3"}, "WRITER__URL"),
    ({"WRITER__HOST": "h", "WRITER__PASSWORD": SECRET}, "WRITER__DRIVER"),
    ({"WRITER__URL": "sqlite:///w.db", "LOG__MIRROR": SECRET}, "LOG__MIRROR"),
    ({"WRITER__URL": "sqlite:///w.db", "WRITER__MIRROR": "log", "LOG__URL": "sqlite:///l.db"}, "WRITER__MIRROR"),
    ({"WRITER__DRIVER": "sqlite", "WRITER__MIRROR": "log", "LOG__URL": "sqlite:///l.db"}, "WRITER__MIRROR"),
    ({"WRITER__CONNECT_ARGS__A": "b", "WRITER__MIRROR": "log", "LOG__URL": "sqlite:///l.db"}, "WRITER__MIRROR"),
    ({"WRITER__MIRROR": "writer"}, "WRITER__MIRROR"),
    ({"WRITER__MIRROR": "reader"}, "WRITER__MIRROR"),
    ({"WRITER__URL": "sqlite:///w.db", "WRITER__TWO_PHASE": "1"}, "WRITER__TWO_PHASE"),
    ({"WRITER__URL": "sqlite:///w.db", "LOG__MIRROR": "writer", "LOG__TWO_PHASE": "1"}, "LOG__TWO_PHASE"),
    (
        {"WRITER__DRIVER": "postgresql", "WRITER__PASSWORD": SECRET, "WRITER__PASSWORD_PROVIDER": "a:b"},
        "WRITER__PASSWORD_PROVIDER",
    ),
    ({"WRITER__URL": f"postgresql://u:{SECRET}@h", "WRITER__PASSWORD_PROVIDER": "a:b"}, "WRITER__PASSWORD_PROVIDER"),
]


@pytest.mark.parametrize(("given", "blamed"), CONTRADICTIONS)
def test_contradictions_fail_at_construction(environment: Set, given: dict[str, str], blamed: str) -> None:
    environment(**given)
    assert set(refused(ContradictorySettings)) == variables(blamed)


@pytest.mark.parametrize("way_out", [{"TRANSACTIONAL": "false"}, {"READ_ONLY": "true"}, {"ISOLATION_LEVEL": "SERIALIZABLE"}])
def test_autocommit_where_a_unit_must_be_able_to_roll_back_is_refused_with_the_ways_out(
    environment: Set, way_out: dict[str, str]
) -> None:
    environment(WRITER__URL="sqlite:///w.db", WRITER__ISOLATION_LEVEL="AUTOCOMMIT")
    message = refused(ContradictorySettings)["APP_DB_CONNECTIONS__WRITER__ISOLATION_LEVEL"]
    assert "could not be rolled back" in message
    assert "Set TRANSACTIONAL=false, READ_ONLY=true or another level." in message
    environment(**{f"WRITER__{field}": value for field, value in way_out.items()})
    assert "writer" in DatabaseSettings().connections


# ---- replicas


WRITER = {"url": "postgresql://shop@primary/shop"}
COPY = {"url": "postgresql://shop@replica/shop", "read_only": True}


@pytest.mark.parametrize(
    ("connections", "replicas"),
    [
        ({"writer": WRITER}, {"reader": "writer"}),
        ({"writer": WRITER, "reader": COPY}, {"reader": "writer"}),
        ({"writer": WRITER, "reader": {"mirror": "writer", "read_only": True}}, {"reader": "writer"}),
        ({"writer": WRITER, "reader": {"mirror": "writer"}}, {}),
        ({"writer": WRITER, "reader": {**COPY, "read_only": False}}, {}),
        ({"writer": WRITER, "reader": {**COPY, "replica_of": ""}}, {}),
        ({"writer": WRITER, "reader": {"url": "sqlite://", "read_only": True}}, {}),
        ({"writer": WRITER, "reader": {"url": "sqlite://"}, "copy": {**COPY, "replica_of": "writer"}}, {"copy": "writer"}),
        ({"writer": WRITER, "copy": COPY}, {"reader": "writer"}),
        ({"writer": WRITER, "copy": {"mirror": "writer", "read_only": True}}, {"copy": "writer", "reader": "writer"}),
        ({"writer": WRITER, "copy": {"mirror": "writer", "read_only": True, "replica_of": ""}}, {"reader": "writer"}),
        ({"dw": WRITER, "copy": {**COPY, "replica_of": "dw"}, "other": {"mirror": "copy", "read_only": True}}, {"copy": "dw"}),
        ({"writer": WRITER, "dw": WRITER, "reader": {**COPY, "replica_of": "dw"}}, {"reader": "dw"}),
        ({"writer": {**WRITER, "read_only": True}, "reader": COPY}, {}),
        ({"log": WRITER, "reader": COPY}, {}),
    ],
)
def test_a_replica_is_what_says_so_what_mirrors_and_the_reader(connections: dict[str, Any], replicas: dict[str, str]) -> None:
    assert DatabaseSettings(_env_file=None, connections=connections).replicas() == replicas


@pytest.mark.parametrize(
    ("own", "problem"),
    [
        ({**COPY, "read_only": False, "replica_of": "writer"}, "needs READ_ONLY=true"),
        ({**COPY, "replica_of": "writter"}, r"not configured\. Did you mean 'writer'\?"),
        ({**COPY, "replica_of": "copy"}, "names the connection itself"),
        ({**COPY, "replica_of": "reader"}, "names 'reader', which is read-only"),
        ({"url": "sqlite://", "read_only": True, "replica_of": "writer"}, "a database of another kind"),
    ],
)
def test_a_replica_of_what_it_cannot_be_is_refused(own: dict[str, Any], problem: str) -> None:
    with pytest.raises(ContradictorySettings, match=f"APP_DB_CONNECTIONS__COPY__REPLICA_OF: .*{problem}"):
        DatabaseSettings(_env_file=None, connections={"writer": WRITER, "copy": own})


def test_a_replica_can_be_made_nobodys_by_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("APP_DB_CONNECTIONS__WRITER__URL", "sqlite:///writer.db")
    monkeypatch.setenv("APP_DB_CONNECTIONS__READER__URL", "sqlite:///reader.db")
    monkeypatch.setenv("APP_DB_CONNECTIONS__READER__READ_ONLY", "true")
    assert DatabaseSettings().replicas() == {"reader": "writer"}
    monkeypatch.setenv("APP_DB_CONNECTIONS__READER__REPLICA_OF", "")
    assert DatabaseSettings().replicas() == {}


def test_a_circle_of_mirrors_names_all_of_it(environment: Set) -> None:
    environment(A__MIRROR="b", B__MIRROR="c", C__MIRROR="b")
    problems = refused(ContradictorySettings)
    assert set(problems) == variables("A__MIRROR", "B__MIRROR", "C__MIRROR")
    assert "b → c → b" in problems["APP_DB_CONNECTIONS__B__MIRROR"]


@pytest.mark.parametrize("url", ["postgresql://h/d", "postgresql+asyncpg://h/d", "mysql://h/d", "mariadb://h/d"])
def test_databases_that_can_prepare_may_be_two_phase(environment: Set, url: str) -> None:
    environment(WRITER__URL=url, WRITER__TWO_PHASE="true")
    assert DatabaseSettings().connections["writer"].two_phase


WRONG_VALUES = [
    ("WRITER__POOL__SIZE", SECRET, "whole number"),
    ("WRITER__POOL__SIZE", "0", "at least 1"),
    ("WRITER__POOL__SIZE", "2.5", "whole number"),
    ("WRITER__POOL__MAX_OVERFLOW", "-2", "at least -1"),
    ("WRITER__POOL__TIMEOUT", "-1", "at least 0"),
    ("WRITER__POOL__TIMEOUT", SECRET, "number"),
    ("WRITER__POOL__RECYCLE", "0", "greater than 0"),
    ("WRITER__POOL__ALIVE_WINDOW", "nan", "finite"),
    ("WRITER__POOL__ALIVE_WINDOW", "inf", "finite"),
    ("WRITER__POOL__USE_LIFO", SECRET, "true or false"),
    ("WRITER__POOL__CLASS", SECRET, "queue"),
    ("WRITER__POOL", SECRET, "JSON object"),
    ("WRITER__POOL", "[1]", "JSON object"),
    ("WRITER__SESSION__AUTOFLUSH", SECRET, "true or false"),
    ("WRITER__READ_ONLY", "", "true or false"),
    ("WRITER__PORT", "70000", "at most 65535"),
    ("WRITER__STATEMENT_TIMEOUT", "0", "greater than 0"),
    ("WRITER__ISOLATION_LEVEL", SECRET, "SERIALIZABLE"),
    ("WRITER__PASSWORD_PROVIDER", SECRET, "module:function"),
    ("WRITER__CONNECT_ARGS", SECRET, "JSON object"),
    ("WRITER__QUERY", "{" + SECRET, "JSON object"),
    ("WRITER__QUERY", '{"a": 1}', "text"),
    ("WRITER", "{" + SECRET, "JSON object"),
    ("APP_DB_CONNECTIONS", "{" + SECRET, "JSON object"),
    ("APP_DB_CONNECTIONS", f'["{SECRET}"]', "JSON object"),
    ("APP_DB_CONNECTIONS", f'{{"writer": "{SECRET}"}}', "JSON object"),
    ("APP_DB_CONNECTIONS", "[" * 100_000, "JSON object"),
    ("APP_DB_APPLICATION", "1" + SECRET, "letter"),
    ("APP_DB_APPLICATION", "a" * 17, "16"),
    ("APP_DB_APPLICATION", "ä", "letter"),
    ("APP_DB_ATOMICITY", SECRET, "'strict' or 'best_effort'"),
]


@pytest.mark.parametrize(("name", "value", "words"), WRONG_VALUES)
def test_a_value_of_the_wrong_kind_is_explained_in_plain_words_and_never_shown(
    environment: Set, name: str, value: str, words: str
) -> None:
    environment(LOG__URL="sqlite:///l.db", **{name: value})
    problems = refused()
    variable, message = next(iter(problems.items()))
    assert len(problems) == 1
    assert variable.startswith(name if name.startswith("APP_DB_") else f"APP_DB_CONNECTIONS__{name}")
    assert words in message


def test_a_url_that_is_no_text_is_one_problem_and_not_a_missing_url_too() -> None:
    assert set(refused(connections={"writer": {"url": 5}})) == variables("WRITER__URL")


def test_a_secret_that_is_not_text_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "app_db_connections__writer__url").write_bytes(b"\xff" + SECRET.encode())
    assert set(refused(_secrets_dir=tmp_path)) == variables("WRITER__URL")


def test_a_mirror_of_a_connection_that_was_refused_is_not_blamed_as_well() -> None:
    assert set(refused(connections={"writer": 5, "log": {"mirror": "writer"}})) == variables("WRITER")


@pytest.mark.parametrize("name", ["Writer", "1st", "a-b", "a__b", "_a", "class", "a b", "ä"])
def test_names_of_connections_are_lower_case_identifiers(name: str) -> None:
    problems = refused(connections={name: {"url": "sqlite://"}})
    assert "identifier" in problems[f"APP_DB_CONNECTIONS__{name.upper()}"]


def test_everything_wrong_is_reported_at_once(environment: Set) -> None:
    Path(".env").write_text("APP_DB_CONNECTIONS__LOG__POOL__SIZE=many\nAPP_DB_CONNECTIONS__LOG__URL=sqlite:///l.db\n")
    environment(
        APP_DB_ATOMICITY=SECRET,
        APP_DB_COLOUR=SECRET,
        WRITER__URL=f"postgresql://u:{SECRET}@h/d",
        WRITER__HOST="h",
        WRITER__READ_ONLY="1",
        WRITER__TWO_PHASE="1",
        WRITER__ECHO=SECRET,
        LOG__TWO_PHASE="1",
        REPORT__MIRROR="nobody",
        OTHER__URL=SECRET,
        OTHER__POOL=SECRET,
    )
    assert set(refused()) == {"APP_DB_ATOMICITY", "APP_DB_COLOUR"} | variables(
        "WRITER__URL",
        "WRITER__TWO_PHASE",
        "WRITER__ECHO",
        "LOG__POOL__SIZE",
        "LOG__TWO_PHASE",
        "REPORT__MIRROR",
        "OTHER__URL",
        "OTHER__POOL",
    )


@pytest.mark.parametrize("given", ["read_committed", "READ COMMITTED", "Read Committed", " read committed "])
def test_isolation_levels_may_be_written_in_any_case(given: str) -> None:
    assert ConnectionSettings(url="sqlite://", isolation_level=given).isolation_level == "READ COMMITTED"


@pytest.mark.parametrize("given", ["queue", "null", "static", "shop.pools:Pool"])
def test_a_pool_class_is_a_word_or_an_import_string(environment: Set, given: str) -> None:
    environment(WRITER__URL="sqlite:///w.db", WRITER__POOL__CLASS=given)
    assert DatabaseSettings().connections["writer"].pool == PoolSettings(class_=given)


# ---- password providers -----------------------------------------------------------------------------------------


def test_a_password_provider_is_imported_when_it_is_asked_for() -> None:
    settings = DatabaseSettings(connections={"writer": {"url": "sqlite://", "password_provider": "os:getcwd"}})
    assert settings.connection("reader").load_password_provider() is os.getcwd


def test_a_password_provider_is_no_secret() -> None:
    settings = DatabaseSettings(connections={"writer": {"url": "sqlite://", "password_provider": "os:getcwd"}})
    assert "os:getcwd" in repr(settings)
    assert "os:getcwd" in [origin.shown_value for origin in settings.origins()]


@pytest.mark.parametrize("provider", ["no_such_module_x:f", "os:no_such_function", "os:sep"])
def test_a_password_provider_that_is_not_there_is_a_problem_of_its_variable(provider: str) -> None:
    settings = DatabaseSettings(
        connections={"writer": {"url": "sqlite://", "password_provider": provider}, "log": {"mirror": "writer"}}
    )
    with pytest.raises(SettingsError) as caught:
        settings.connection("log").load_password_provider()
    assert [problem.variable for problem in caught.value.problems] == ["APP_DB_CONNECTIONS__WRITER__PASSWORD_PROVIDER"]
    assert provider not in str(caught.value)


def test_asking_for_a_provider_that_was_not_set_is_an_error() -> None:
    with pytest.raises(SettingsError, match="PASSWORD_PROVIDER: is not set"):
        ConnectionSettings(url="sqlite://").load_password_provider()


# ---- secrets ----------------------------------------------------------------------------------------------------


@pytest.fixture(params=["url", "parts", "query", "connect_args"])
def secretive(request: pytest.FixtureRequest) -> DatabaseSettings:
    connections: dict[str, dict[str, Any]] = {
        "url": {"url": f"postgresql://u:{SECRET}@h/d"},
        "parts": {"driver": "postgresql", "password": SECRET},
        "query": {"driver": "postgresql", "query": {"sslpassword": SECRET}},
        "connect_args": {"driver": "postgresql", "connect_args": {"ssl": {"password": SECRET}, "api_token": SECRET}},
    }
    return DatabaseSettings(connections={"writer": connections[request.param]})


def test_secrets_are_not_shown_by_anything_that_prints(secretive: DatabaseSettings, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        logging.getLogger("test").info("%s %r %s", secretive, secretive, secretive.connection("reader"))
    dumped = secretive.model_dump()
    assert "writer" in caplog.text
    for shown in (caplog.text, repr(dumped), str(dumped), secretive.model_dump_json(), repr(secretive.origins()), f"{secretive}"):
        assert SECRET not in shown


def test_what_was_dumped_makes_the_same_settings_again(secretive: DatabaseSettings) -> None:
    again = DatabaseSettings(**secretive.model_dump())
    assert again.connections["writer"].model_dump() == secretive.connections["writer"].model_dump()
    assert again.connections["writer"].connect_args == secretive.connections["writer"].connect_args
    assert again.connections["writer"].sqlalchemy_url() == secretive.connections["writer"].sqlalchemy_url()


def test_secrets_deep_in_driver_arguments_are_masked_too() -> None:
    deep: dict[str, Any] = {"credentials": {"value": SECRET}, "hosts": [{"password": SECRET}], "peer": f"redis://u:{SECRET}@h"}
    settings = DatabaseSettings(connections={"writer": {"url": "sqlite://", "connect_args": deep}})
    assert settings.connections["writer"].connect_args == deep
    assert SECRET not in f"{settings!r}{settings.origins()}"
    deep.pop("peer")
    settings = DatabaseSettings(connections={"writer": {"url": "sqlite://", "connect_args": deep}})
    assert SECRET not in f"{settings.model_dump()}{settings.model_dump_json()}"
    assert DatabaseSettings(**settings.model_dump()).connections["writer"].connect_args == deep


def test_settings_validated_by_pydantic_read_the_environment_too(environment: Set) -> None:
    environment(LOG__URL="sqlite:///l.db")
    settings = DatabaseSettings.model_validate({"connections": {"writer": {"url": "sqlite://"}}})
    again = DatabaseSettings.model_validate_json('{"connections": {"writer": {"url": "sqlite://"}}}')
    assert set(settings.connections) == set(again.connections) == {"writer", "log"}


def test_dumped_passwords_are_secret_strings() -> None:
    dumped = ConnectionSettings(url="sqlite://", password="x", query={"token": "x"}, connect_args={"passwd": "x"}).model_dump()
    assert all(
        isinstance(v, SecretStr)
        for v in (dumped["url"], dumped["password"], dumped["query"]["token"], dumped["connect_args"]["passwd"])
    )


def test_a_connection_refused_by_itself_does_not_show_its_input_either() -> None:
    with pytest.raises(ValidationError) as caught:
        ConnectionSettings(url=f"postgresql://u:{SECRET}@h", pool={"size": SECRET}, nonsense=SECRET)
    assert SECRET not in "".join(traceback.format_exception(caught.value))


def test_debugging_of_the_settings_reader_shows_no_secret(
    environment: Set, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PYDANTIC_SETTINGS_DEBUG", "1")
    environment(WRITER__URL=f"postgresql://u:{SECRET}@h")
    with caplog.at_level(logging.DEBUG):
        DatabaseSettings()
    assert SECRET not in caplog.text


# ---- as a field of an application's settings --------------------------------------------------------------------


class ShopSettings(BaseSettings):
    model_config = SettingsConfigDict(env_nested_delimiter="__", hide_input_in_errors=True)
    db: DatabaseSettings = Field(default_factory=DatabaseSettings)
    colours: int = 3


class ShopModel(BaseModel):
    db: DatabaseSettings
    colours: int = 3


def test_settings_can_be_a_field_and_read_their_own_variables(environment: Set) -> None:
    environment(WRITER__URL="sqlite:///w.db")
    assert ShopSettings().db.connection("reader").masked_url == "sqlite:///w.db"


def test_values_can_come_by_the_variables_of_the_application(environment: Set) -> None:
    environment(DB__CONNECTIONS__WRITER__URL=f"postgresql://u:{SECRET}@h/d", DB__CONNECTIONS__WRITER__POOL__CLASS="null")
    shop = ShopSettings()
    assert shop.db.connections["writer"].sqlalchemy_url().password == SECRET
    assert shop.db.connections["writer"].pool.class_ == "null"
    assert SECRET not in repr(shop)


def test_a_field_of_a_plain_model_takes_a_mapping_or_settings() -> None:
    shop = ShopModel.model_validate({"db": {"connections": {"writer": {"url": "sqlite://"}}}})
    assert ShopModel(db=shop.db).db is shop.db


def test_the_error_reaches_the_application_unchanged_and_unshown(environment: Set) -> None:
    environment(WRITER__URL=f"postgresql://u:{SECRET}@h/d", WRITER__POOL__SIZE=SECRET)
    makers: list[Callable[[], object]] = [ShopSettings, lambda: ShopModel.model_validate({"db": {}, "colours": "x"})]
    for make in makers:
        with pytest.raises(SettingsError) as caught:
            make()
        assert [problem.variable for problem in caught.value.problems] == ["APP_DB_CONNECTIONS__WRITER__POOL__SIZE"]
        assert SECRET not in "".join(traceback.format_exception(caught.value))


def test_the_applications_own_error_does_not_show_the_password(environment: Set, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLOURS", "many")
    for name in ("WRITER__URL", "DB__CONNECTIONS__WRITER__URL"):
        environment(**{name: f"postgresql://u:{SECRET}@h/d"})
        with pytest.raises(ValidationError) as caught:
            ShopSettings()
        assert SECRET not in "".join(traceback.format_exception(caught.value))


# ---- the example and the import ---------------------------------------------------------------------------------


def test_the_example_loads_as_it_stands() -> None:
    settings = DatabaseSettings(_env_file=EXAMPLE)
    assert {name: connection.masked_url for name, connection in settings.connections.items()} == {
        name: f"sqlite:///{name}.db" for name in ("writer", "warehouse", "log")
    }
    assert not settings.connections["log"].transactional
    assert settings.connection("reader").read_only
    assert settings.connections["writer"].model_dump(exclude={"url"}) == ConnectionSettings().model_dump(exclude={"url"})


def every_variable(model: type[BaseModel] = DatabaseSettings, prefix: str = "APP_DB_") -> Iterator[str]:
    inner: dict[str, tuple[type[BaseModel], str]] = {
        "connections": (ConnectionSettings, "WRITER__"),
        "pool": (PoolSettings, ""),
        "session": (SessionSettings, ""),
    }
    for name, field in model.model_fields.items():
        if name in inner:
            yield from every_variable(inner[name][0], f"{prefix}{name.upper()}__{inner[name][1]}")
        else:
            yield prefix + str(field.validation_alias or name).upper()


@pytest.mark.parametrize("variable", list(every_variable()))
def test_every_setting_is_in_the_example(variable: str) -> None:
    lines = EXAMPLE.read_text().splitlines()
    forms = [
        variable,
        variable.replace("__WRITER__MIRROR", "__READER__MIRROR"),
        variable.replace("__WRITER__REPLICA_OF", "__READER__REPLICA_OF"),
        variable.replace("__WRITER__MAX_LAG", "__READER__MAX_LAG"),
    ]
    assert any(line.removeprefix("# ").startswith((f"{form}=", f"{form}__")) for line in lines for form in forms)


@pytest.mark.parametrize("line", [line for line in EXAMPLE.read_text().splitlines() if line.startswith("# APP_DB_")])
def test_every_line_commented_out_in_the_example_names_a_setting(line: str) -> None:
    Path(".env").write_text(f"{line.removeprefix('# ')}\n")
    try:
        DatabaseSettings(connections={"base": {"url": "sqlite://"}})
    except SettingsError as error:
        assert not any("no such setting" in problem.message for problem in error.problems)  # noqa: PT017


IMPORT_ALONE = """
import sys, types
package = types.ModuleType("app_db")  # in place of the real one, whose __init__ imports every room
package.__path__ = [sys.argv[1]]
sys.modules["app_db"] = package
import app_db.settings
print(*(name for name in sys.argv[2:] if name in sys.modules))
"""


def test_the_module_imports_no_driver_no_orm_and_no_framework() -> None:
    heavy = [
        "sqlalchemy.orm",
        "sqlalchemy.dialects.postgresql",
        "psycopg",
        "pymysql",
        "dependency_injector",
        "zope.sqlalchemy",
        "fastapi",
    ]
    package = str(EXAMPLE.parent / "app_db")
    run = subprocess.run([sys.executable, "-c", IMPORT_ALONE, package, *heavy], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == ""


# ---- committing together --------------------------------------------------------------------------------------------


def test_decisions_go_where_they_are_told_to_and_nobody_recovers_unasked(environment: Set) -> None:
    environment(WRITER__URL="sqlite:///w.db", LOG__URL="sqlite:///l.db")
    assert (DatabaseSettings().decision_log, DatabaseSettings().recover_at_start) == (None, False)
    environment(APP_DB_DECISION_LOG="log", APP_DB_RECOVER_AT_START="yes")
    assert (DatabaseSettings().decision_log, DatabaseSettings().recover_at_start) == ("log", True)
    environment(APP_DB_DECISION_LOG="file:/var/lib/shop/decisions")
    assert DatabaseSettings().decision_log == "file:/var/lib/shop/decisions"


@pytest.mark.parametrize("log", ["", "file:", "/var/lib/decisions", "Log", "FILE:/x", "a b"])
def test_a_decision_log_that_is_neither_a_connection_nor_a_file_is_refused(environment: Set, log: str) -> None:
    environment(WRITER__URL="sqlite:///w.db", APP_DB_DECISION_LOG=log)
    assert "file: and a path" in refused()["APP_DB_DECISION_LOG"]


def test_a_decision_log_that_nobody_configured_is_refused_with_a_suggestion(environment: Set) -> None:
    environment(WRITER__URL="sqlite:///w.db", APP_DB_DECISION_LOG="writter")
    message = refused(ContradictorySettings)["APP_DB_DECISION_LOG"]
    assert "Did you mean 'writer'?" in message


def test_a_decision_log_must_be_where_units_of_work_write(environment: Set) -> None:
    environment(WRITER__URL="sqlite:///w.db", LOG__URL="sqlite:///l.db", APP_DB_DECISION_LOG="log", LOG__READ_ONLY="true")
    assert "read-only" in refused(ContradictorySettings)["APP_DB_DECISION_LOG"]
    environment(LOG__READ_ONLY="false", LOG__TRANSACTIONAL="false")
    assert "not transactional" in refused(ContradictorySettings)["APP_DB_DECISION_LOG"]
    environment(LOG__TRANSACTIONAL="true")
    assert DatabaseSettings().decision_log == "log"


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("sqlite:///w.db", "needs a database that can prepare"),
        ("postgresql+psycopg2://h/d", "is not supported by the driver psycopg2"),
    ],
)
def test_two_phase_is_refused_where_it_can_not_be(environment: Set, url: str, says: str) -> None:
    environment(WRITER__URL=url, WRITER__TWO_PHASE="true")
    problems = refused(ContradictorySettings) if "sqlite" in url else refused(_refusal_of(url))
    assert any(says in message or "pip install" in message for message in problems.values())


def _refusal_of(url: str) -> type[SettingsError]:
    """psycopg2 need not be installed."""
    from importlib.util import find_spec

    return ContradictorySettings if find_spec("psycopg2") else SettingsError


def test_the_name_of_a_two_phase_connection_is_short_enough_for_an_xid(environment: Set) -> None:
    name = "a" * 23
    environment(**{f"{name.upper()}__URL": "postgresql://h/d"})
    assert name in DatabaseSettings().connections
    environment(**{f"{name.upper()}__TWO_PHASE": "true"})
    assert "at most 22 characters" in refused(ContradictorySettings)[f"APP_DB_CONNECTIONS__{name.upper()}__TWO_PHASE"]
    environment(**{f"{'b' * 22}__URL".upper(): "postgresql://h/d", f"{'b' * 22}__TWO_PHASE".upper(): "true"})
    assert set(refused(ContradictorySettings)) == variables(f"{name.upper()}__TWO_PHASE")


# ---- secrets where they are hidden deeply -----------------------------------------------------------------------------------

SECRET = "s3cr3t-tok"
HIDING = {
    "password in the query": {"url": f"postgresql+psycopg://u@h/d?password={SECRET}"},
    "options": {"url": f"postgresql+psycopg://u@h/d?options=-c%20app.token%3D{SECRET}"},
    "nested arguments": {
        "url": f"postgresql+asyncpg://u:{SECRET}@h/d",
        "connect_args": {
            "server_settings": {"app.token": SECRET},
            "ssl": {"key_password": SECRET},
            "all": [{"password": SECRET}],
        },
    },
    "a query by parts": {"host": "h", "driver": "mysql+pymysql", "user": "u", "password": SECRET, "query": {"passwd": SECRET}},
}
SHOWN: dict[str, Callable[[DatabaseSettings], object]] = {
    "repr": repr,
    "connection": lambda settings: settings.connection("writer"),
    "URL": lambda settings: settings.connection("writer").sqlalchemy_url(),
    "repr of the URL": lambda settings: repr(settings.connection("writer").sqlalchemy_url()),
    "URL with another driver": lambda settings: settings.connection("writer").sqlalchemy_url().set(drivername="postgresql"),
    "dump": lambda settings: settings.model_dump(),
    "dump of a connection": lambda settings: settings.connection("writer").model_dump(),
    "JSON": lambda settings: settings.model_dump_json(),
    "dump for JSON": lambda settings: settings.model_dump(mode="json"),
    "origins": lambda settings: settings.origins(),
}


@pytest.mark.parametrize("where", HIDING)
@pytest.mark.parametrize("shown", SHOWN)
def test_no_secret_is_shown_however_deeply_it_is_hidden(where: str, shown: str) -> None:
    settings = DatabaseSettings(_env_file=None, connections={"writer": HIDING[where]})
    text = str(SHOWN[shown](settings))
    assert SECRET not in text
    assert "h/d" in text or "host" in text or "'h'" in text or shown.startswith(("repr of", "URL"))


def test_drivers_get_the_secrets_of_a_url_that_does_not_show_them() -> None:
    url = (
        DatabaseSettings(_env_file=None, connections={"writer": HIDING["password in the query"]})
        .connection("writer")
        .sqlalchemy_url()
    )
    assert url.query["password"] == SECRET
    assert SECRET in url.render_as_string(hide_password=False)
    assert create_engine(url).url == url


def test_secrets_in_driver_arguments_are_masked_in_every_form() -> None:
    arguments = {"password": SECRET, "server_settings": {"app.key": SECRET}, "n": 1}
    connection = ConnectionSettings(url="postgresql://h/db", connect_args=arguments)
    shown = [repr(connection), dict(connection), connection.model_dump(), connection.model_dump_json(), connection.connect_args]
    assert not [form for form in shown if SECRET in str(form)]
    assert connection.connect_args == arguments
    assert ConnectionSettings(**connection.model_dump()).connect_args == arguments
