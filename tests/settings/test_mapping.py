"""A mapping can say which databases there are: a WSGI environ, the settings of Paste and Pyramid, keys of engine_from_config."""

from __future__ import annotations

import traceback
from configparser import ConfigParser
from typing import Any

import pytest
from pydantic import Field
from pydantic_settings import SettingsConfigDict
from sqlalchemy import engine_from_config
from sqlalchemy.pool import AssertionPool, NullPool, QueuePool, StaticPool

from app_db import container_of
from app_db.errors import ContradictorySettings, NothingConfigured, SettingsError, UnknownVariable
from app_db.settings import DatabaseSettings, PoolSettings

SECRET = "s3cr3t-pa55"
READER = {"reader": "sqlalchemy_reader."}


def refused(mapping: dict[Any, Any], kind: type[SettingsError] = SettingsError, **given: Any) -> dict[str, str]:
    """Return what is wrong, by key, of exactly this kind. It has been seen that no secret is shown."""
    with pytest.raises(SettingsError) as caught:
        DatabaseSettings.from_mapping(mapping, **given)
    assert type(caught.value) is kind
    assert SECRET not in "".join(traceback.format_exception(caught.value)) + repr(caught.value)
    assert caught.value.__context__ is None
    return {problem.variable: problem.message for problem in caught.value.problems}


# ---- a WSGI environ


def test_a_wsgi_environ_has_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("APP_DB_CONNECTIONS__ARCHIVE__URL", "sqlite:///environment.db")
    environ = {
        "REQUEST_METHOD": "GET",
        "wsgi.input": object(),
        "APP_DB_CONNECTIONS__WRITER__URL": f"postgresql://u:{SECRET}@h/d",
        "APP_DB_CONNECTIONS__WRITER__POOL": '{"size": 3, "timeout": 1}',
        "APP_DB_CONNECTIONS__WRITER__POOL__SIZE": "7",
        "APP_DB_ATOMICITY": "best_effort",
    }
    settings = DatabaseSettings.from_mapping(environ)
    assert list(settings.connections) == ["writer"]
    assert settings.connections["writer"].pool == PoolSettings(size=7, timeout=1)
    assert settings.connections["writer"].sqlalchemy_url().password == SECRET
    assert settings.atomicity == "best_effort"
    assert {origin.source for origin in settings.origins()} == {"mapping"}
    assert SECRET not in repr(settings.origins())


def test_the_writer_may_be_database_url() -> None:
    settings = DatabaseSettings.from_mapping({"DATABASE_URL": "sqlite:///w.db"})
    assert settings.connection("writer").masked_url == "sqlite:///w.db"


def test_a_prefix_of_ones_own_is_that_of_errors_too() -> None:
    settings = DatabaseSettings.from_mapping({"SHOP_CONNECTIONS__WRITER__URL": "sqlite:///w.db", "APP_DB_X": "1"}, prefix="SHOP_")
    assert settings.connection("writer").masked_url == "sqlite:///w.db"
    mapping = {"SHOP_CONNECTIONS__WRITER__URL": "sqlite:///w.db", "SHOP_COLOUR": SECRET, "SHOP_CONNECTIONS__WRITER__ECHO": SECRET}
    assert set(refused(mapping, prefix="SHOP_")) == {"SHOP_COLOUR", "SHOP_CONNECTIONS__WRITER__ECHO"}
    assert set(refused({}, NothingConfigured, prefix="SHOP_")) == {"SHOP_CONNECTIONS__WRITER__URL"}
    assert set(refused({}, NothingConfigured)) == {"APP_DB_CONNECTIONS__WRITER__URL"}


# ---- Paste and Pyramid

INI = """
[app:main]
use = egg:shop
pyramid.reload_templates = true
app_db.atomicity = best_effort
app_db.connections.writer.url = sqlite:///w.db
app_db.connections.writer.pool.size = 3
app_db.connections.writer.connect_args.timeout = 5
app_db.connections.reader.mirror = writer
app_db.connections.reader.read_only = on
"""


def test_an_ini_file_has_keys_with_dots() -> None:
    parser = ConfigParser()
    parser.read_string(INI)
    settings = DatabaseSettings.from_mapping(dict(parser["app:main"]))
    assert settings.atomicity == "best_effort"
    assert settings.connections["writer"].pool.size == 3
    assert settings.connections["writer"].connect_args == {"timeout": 5}
    assert settings.connection("reader").read_only
    assert "app_db.connections.writer.url" in [origin.variable for origin in settings.origins()]


def test_values_need_not_be_text() -> None:
    mapping = {"app_db.connections": {"writer": {"url": "sqlite://", "pool": {"size": 3}}}, "app_db.two_phase": True}
    settings = DatabaseSettings.from_mapping(mapping)
    assert (settings.connections["writer"].pool.size, settings.two_phase) == (3, True)


def test_mistakes_are_named_by_key() -> None:
    mapping = {
        "app_db.colour": SECRET,
        "app_db.connections.writer.url": f"postgresql://u:{SECRET}@h/d",
        "app_db.connections.writer.host": SECRET,
        "app_db.connections.writer.pool.sise": SECRET,
        "app_db.connections.writer.echo": SECRET,
        "app_db.connections.log.pool": SECRET,
        "app_db.connections.log.mirror": "writter",
        "app_db.decision_log": "writter",
    }
    problems = refused(mapping)
    assert set(problems) == {
        "app_db.colour",
        "app_db.connections.writer.url",
        "app_db.connections.writer.pool.sise",
        "app_db.connections.writer.echo",
        "app_db.connections.log.pool",
        "app_db.connections.log.mirror",
        "app_db.decision_log",
    }
    assert "'app_db.connections.writer.pool.size'?" in problems["app_db.connections.writer.pool.sise"]


def test_both_spellings_may_say_the_same_and_nothing_else() -> None:
    same = {"app_db.connections.writer.url": "sqlite:///a.db", "APP_DB_CONNECTIONS__WRITER__URL": "sqlite:///a.db"}
    assert DatabaseSettings.from_mapping(same).connection("writer").masked_url == "sqlite:///a.db"
    problems = refused({**same, "app_db.connections.writer.url": f"sqlite:///{SECRET}.db"}, ContradictorySettings)
    assert "APP_DB_CONNECTIONS__WRITER__URL" in problems["app_db.connections.writer.url"]
    cases = {"app_db.application": "a", "APP_DB.application": "b", "app_db.connections.writer.url": "sqlite://"}
    assert "'app_db.application'" in refused(cases, ContradictorySettings)["APP_DB.application"]


# ---- engine_from_config

FROM_CONFIG: dict[str, tuple[Any, Any]] = {
    "pool_size": ("7", lambda own: own.pool.size == 7),
    "max_overflow": ("-1", lambda own: own.pool.max_overflow == -1),
    "pool_timeout": ("2", lambda own: own.pool.timeout == 2),
    "pool_recycle": ("3600", lambda own: own.pool.recycle == 3600),
    "pool_recycle ": ("-1", lambda own: own.pool.recycle is None),
    "pool_use_lifo": ("false", lambda own: not own.pool.use_lifo),
    "pool_pre_ping": ("true", lambda own: own.pool.alive_window == 0),
    "pool_pre_ping ": (False, lambda own: own.pool.alive_window == 30),
    "echo": ("true", lambda own: own.echo),
    "isolation_level": ("READ_COMMITTED", lambda own: own.isolation_level == "READ COMMITTED"),
    "connect_args": ({"timeout": 3}, lambda own: own.connect_args == {"timeout": 3}),
    "connect_args ": ('{"timeout": 3}', lambda own: own.connect_args == {"timeout": 3}),
    "poolclass": (NullPool, lambda own: own.pool.class_ == "null"),
    "poolclass ": (StaticPool, lambda own: own.pool.class_ == "static"),
    "poolclass  ": (QueuePool, lambda own: own.pool.class_ == "queue"),
    "poolclass   ": (AssertionPool, lambda own: own.pool.class_ == "sqlalchemy.pool.impl:AssertionPool"),
    "future": ("true", lambda own: own.masked_url == "sqlite:///r.db"),
    "read_only": ("true", lambda own: own.read_only),
    "session.autoflush": ("false", lambda own: not own.session.autoflush),
}


@pytest.mark.parametrize("argument", FROM_CONFIG)
def test_what_engine_from_config_takes_is_a_setting(argument: str) -> None:
    value, holds = FROM_CONFIG[argument]
    mapping = {"sqlalchemy_reader.url": "sqlite:///r.db", f"sqlalchemy_reader.{argument.strip()}": value, "other.url": "x"}
    settings = DatabaseSettings.from_mapping(mapping, prefixes=READER)
    assert holds(settings.connections["reader"])


def test_one_configuration_makes_the_same_engine_either_way(tmp_path: Any) -> None:
    configuration = {"sa.url": f"sqlite:///{tmp_path}/r.db", "sa.pool_size": "3", "sa.max_overflow": "2", "sa.echo": "false"}
    plain = engine_from_config(configuration, prefix="sa.")
    container = container_of("log")(settings=DatabaseSettings.from_mapping(configuration, prefixes={"log": "sa."}))
    own = container.log_engine()
    assert own.url == plain.url
    assert own.pool.size() == plain.pool.size() == 3  # type: ignore[attr-defined]
    container.shutdown_resources()
    plain.dispose()


def test_a_key_that_is_the_prefix_itself_is_the_url() -> None:
    environ = {"user_db": "sqlite:///users.db", "products_db": "sqlite:///products.db", "user_db_of_others": "x"}
    settings = DatabaseSettings.from_mapping(environ, prefixes={"user": "user_db", "products": "products_db"})
    assert {name: each.masked_url for name, each in settings.connections.items()} == {
        "user": "sqlite:///users.db",
        "products": "sqlite:///products.db",
    }


def test_both_kinds_of_keys_make_one_configuration() -> None:
    mapping = {
        "sqlalchemy_reader.url": "sqlite:///r.db",
        "sqlalchemy_reader.pool_size": 3,
        "app_db.connections.reader.read_only": "true",
        "app_db.connections.writer.url": "sqlite:///w.db",
    }
    settings = DatabaseSettings.from_mapping(mapping, prefixes=READER)
    assert settings.connection("reader").read_only
    assert settings.connection("reader").pool.size == 3
    assert [origin.variable for origin in settings.origins()] == [
        "app_db.connections.reader.read_only",
        "app_db.connections.writer.url",
        "sqlalchemy_reader.pool_size",
        "sqlalchemy_reader.url",
    ]


@pytest.mark.parametrize(
    ("argument", "value", "words"),
    [
        ("echo", "debug", "sqlalchemy.engine"),
        ("echo_pool", "true", "sqlalchemy.pool"),
        ("pool_pre_ping", SECRET, "true or false"),
        ("creator", SECRET, "password_provider"),
        ("execution_options", SECRET, "isolation_level"),
        ("plugins", SECRET, "?plugin="),
        ("encoding", SECRET, "SQLAlchemy 2.0"),
        ("json_serializer", SECRET, "override"),
        ("pool_size", SECRET, "whole number"),
        ("isolation_level", SECRET, "SERIALIZABLE"),
        ("connect_args", SECRET, "JSON object"),
        ("pool.size", "none", "whole number"),
    ],
)
def test_what_can_not_be_taken_is_refused_by_key_with_what_to_write(argument: str, value: str, words: str) -> None:
    mapping = {"sqlalchemy_reader.url": "sqlite://", f"sqlalchemy_reader.{argument}": value}
    problems = refused(mapping, prefixes=READER)
    assert set(problems) == {f"sqlalchemy_reader.{argument}"}
    assert words in problems[f"sqlalchemy_reader.{argument}"]


@pytest.mark.parametrize(("typo", "meant"), [("pool_sise", "pool_size"), ("session.auto_flush", "session.autoflush")])
def test_a_misspelt_key_is_an_error_that_guesses_what_was_meant(typo: str, meant: str) -> None:
    mapping = {"sqlalchemy_reader.url": "sqlite://", f"sqlalchemy_reader.{typo}": SECRET}
    problems = refused(mapping, UnknownVariable, prefixes=READER)
    assert f"Did you mean {meant!r}?" in problems[f"sqlalchemy_reader.{typo}"]


def test_contradictory_keys_are_named() -> None:
    mapping = {
        "sqlalchemy_reader.url": f"sqlite:///{SECRET}.db",
        "app_db.connections.reader.url": "sqlite:///other.db",
        "sqlalchemy_reader.pool_size": "3",
        "sqlalchemy_reader.pool.size": "4",
    }
    problems = refused(mapping, ContradictorySettings, prefixes=READER)
    assert "'app_db.connections.reader.url'" in problems["sqlalchemy_reader.url"]
    assert "'sqlalchemy_reader.pool_size'" in problems["sqlalchemy_reader.pool.size"]


def test_settings_that_exclude_each_other_are_named_by_key() -> None:
    mapping = {"sqlalchemy_reader.url": "sqlite://", "sqlalchemy_reader.host": SECRET, "sqlalchemy_reader.mirror": "other"}
    problems = refused(mapping, ContradictorySettings, prefixes=READER)
    assert set(problems) == {"sqlalchemy_reader.mirror"}
    del mapping["sqlalchemy_reader.mirror"]
    assert "HOST" in refused(mapping, ContradictorySettings, prefixes=READER)["sqlalchemy_reader.url"]


def test_a_connection_that_was_asked_for_must_have_a_database() -> None:
    problems = refused({"app_db.connections.writer.url": "sqlite://"}, ContradictorySettings, prefixes=READER)
    assert set(problems) == {"sqlalchemy_reader.url"}
    assert "is not set" in problems["sqlalchemy_reader.url"]


def test_the_longest_prefix_wins() -> None:
    mapping = {"db.url": "sqlite:///w.db", "db.log.url": "sqlite:///l.db"}
    settings = DatabaseSettings.from_mapping(mapping, prefixes={"writer": "db.", "log": "db.log."})
    assert settings.connection("writer").masked_url == "sqlite:///w.db"
    assert settings.connection("log").masked_url == "sqlite:///l.db"


def test_a_subclass_reads_its_own_fields_too() -> None:
    class Ours(DatabaseSettings):
        tags: list[str] = Field(default_factory=list)

    settings = Ours.from_mapping({"app_db.tags": '["a"]', "app_db.connections.writer.url": "sqlite://"})
    assert isinstance(settings, Ours)
    assert settings.tags == ["a"]


def test_the_prefix_of_a_class_is_that_of_its_mappings() -> None:
    class ShopSettings(DatabaseSettings):
        model_config = SettingsConfigDict(env_prefix="SHOP_DB_")

    settings = ShopSettings.from_mapping({"SHOP_DB_CONNECTIONS__WRITER__URL": "sqlite:///w.db"})
    assert settings.connections["writer"].masked_url == "sqlite:///w.db"
    with pytest.raises(NothingConfigured, match="SHOP_DB_CONNECTIONS__WRITER__URL: is not set"):
        ShopSettings.from_mapping({})
