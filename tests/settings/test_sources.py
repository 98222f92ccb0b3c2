"""Settings come from whatever pydantic-settings can read, as its documentation says, and each says where it came from."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import FrameType, ModuleType, SimpleNamespace
from typing import Any

import pydantic_settings
import pytest
from pydantic import AliasChoices, AliasPath, BaseModel, Field, SecretStr, model_validator
from pydantic_settings import (
    BaseSettings,
    CliApp,
    CliSettingsSource,
    EnvSettingsSource,
    JsonConfigSettingsSource,
    PydanticBaseSettingsSource,
    PyprojectTomlConfigSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
    YamlConfigSettingsSource,
)

from app_db.errors import ConnectionNotConfigured, ContradictorySettings, NothingConfigured, SettingsError, UnknownVariable
from app_db.settings import ConnectionSettings, DatabaseSettings

SECRET = "s3cr3t-pa55"
SHOP = {"application": "shop", "connections": {"writer": {"url": "sqlite:///w.db", "pool": {"size": 3, "class": "null"}}}}


def customised(*makers: Any, first: bool = False, config: SettingsConfigDict | None = None) -> type[DatabaseSettings]:
    """Return settings that have other sources, too: each maker is called with the class of the settings."""

    class Ours(DatabaseSettings):
        model_config = config or SettingsConfigDict()

        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            usual = (init_settings, env_settings, dotenv_settings, file_secret_settings)
            others = tuple(maker(settings_cls) for maker in makers)
            return (*others, *usual) if first else (*usual, *others)

    return Ours


def refused(make: Any, kind: type[SettingsError] = SettingsError) -> dict[str, str]:
    """Return what is wrong, by variable or source, of exactly this kind. It has been seen that no secret is shown."""
    with pytest.raises(SettingsError) as caught:
        make()
    assert type(caught.value) is kind
    assert SECRET not in "".join(traceback.format_exception(caught.value)) + repr(caught.value)
    assert caught.value.__context__ is None
    return {problem.variable: problem.message for problem in caught.value.problems}


def origins(settings: DatabaseSettings) -> dict[str, str]:
    return {origin.variable.removeprefix("APP_DB_"): origin.source for origin in settings.origins()}


# ---- files


def as_toml(value: Any) -> str:
    """Return a value as TOML writes it."""
    if not isinstance(value, dict):
        return json.dumps(value)
    return "{" + ", ".join(f"{json.dumps(key)} = {as_toml(item)}" for key, item in value.items()) + "}"


def toml(values: dict[str, Any]) -> str:
    """Return the text of a TOML file."""
    return "\n".join(f"{key} = {as_toml(value)}" for key, value in values.items())


FILES: dict[str, tuple[Any, str, Any]] = {
    "TomlConfigSettingsSource": (TomlConfigSettingsSource, "shop.toml", toml),
    "YamlConfigSettingsSource": (YamlConfigSettingsSource, "shop.yaml", json.dumps),
    "JsonConfigSettingsSource": (JsonConfigSettingsSource, "shop.json", json.dumps),
    "PyprojectTomlConfigSettingsSource": (
        PyprojectTomlConfigSettingsSource,
        "pyproject.toml",
        lambda values: toml({"tool": {"pydantic-settings": values}}),
    ),
}


@pytest.fixture(params=FILES)
def file_source(request: pytest.FixtureRequest) -> tuple[type[DatabaseSettings], str, Any]:
    """Settings with one of pydantic-settings' sources for files, and the name and the format of its file."""
    source, file, dumps = FILES[request.param]
    config: Any = {} if file == "pyproject.toml" else {f"{Path(file).suffix[1:]}_file": file}
    return customised(source, config=config), file, dumps


def test_a_file_is_read_below_the_environment_and_is_named_by_origins(
    file_source: tuple[type[DatabaseSettings], str, Any], monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    ours, file, dumps = file_source
    Path(file).write_text(dumps(SHOP))
    monkeypatch.setenv("APP_DB_CONNECTIONS__WRITER__POOL__SIZE", "7")
    settings = ours()
    assert settings.application == "shop"
    assert settings.connection("writer").masked_url == "sqlite:///w.db"
    assert (settings.connection("writer").pool.size, settings.connection("writer").pool.class_) == (7, "null")
    found = origins(settings)
    assert found["CONNECTIONS__WRITER__POOL__SIZE"] == "environment"
    assert found["APPLICATION"].startswith(request.node.callspec.params["file_source"])
    assert found["APPLICATION"].endswith(file)


def test_a_mistake_in_a_file_is_named_by_variable_and_file(file_source: tuple[type[DatabaseSettings], str, Any]) -> None:
    ours, file, dumps = file_source
    wrong = {"connections": {"writer": {"url": "sqlite:///w.db", "port": SECRET, "pool": {"sise": 1}}}, "colour": SECRET}
    Path(file).write_text(dumps(wrong))
    problems = refused(ours)
    assert set(problems) == {
        "APP_DB_COLOUR",
        "APP_DB_CONNECTIONS__WRITER__PORT",
        "APP_DB_CONNECTIONS__WRITER__POOL__SISE",
    }
    assert "POOL__SIZE'?" in problems["APP_DB_CONNECTIONS__WRITER__POOL__SISE"]
    assert "whole number" in problems["APP_DB_CONNECTIONS__WRITER__PORT"]
    assert all(f"{file}." in message for message in problems.values())


def test_a_contradiction_in_a_file_names_the_file(file_source: tuple[type[DatabaseSettings], str, Any]) -> None:
    ours, file, dumps = file_source
    Path(file).write_text(dumps({"connections": {"writer": {"url": "sqlite:///w.db", "host": "h"}}}))
    assert file in refused(ours, ContradictorySettings)["APP_DB_CONNECTIONS__WRITER__URL"]


def test_a_broken_file_is_named_with_its_line_and_not_quoted(file_source: tuple[type[DatabaseSettings], str, Any]) -> None:
    ours, file, _ = file_source
    Path(file).write_text(f'application = "shop"\n{SECRET}: [ "{SECRET}\n')
    [(name, message)] = refused(ours).items()
    assert name.split()[0] in FILES
    assert name.endswith(file)
    assert "can't be read" in message
    assert "line " in message


def test_several_files_refine_each_other_and_all_are_named() -> None:
    Path("a.toml").write_text(toml(SHOP))
    Path("b.toml").write_text(toml({"application": "other"}))
    settings = customised(TomlConfigSettingsSource, config=SettingsConfigDict(toml_file=["a.toml", "b.toml"]))()
    assert (settings.application, settings.connection("writer").pool.size) == ("other", 3)
    assert origins(settings)["APPLICATION"] == "TomlConfigSettingsSource a.toml, b.toml"


def test_two_sources_of_one_class_are_two() -> None:
    Path("a.toml").write_text(toml({"application": "a"}))
    Path("b.toml").write_text(toml({**SHOP, "application": "b"}))
    ours = customised(
        lambda model: TomlConfigSettingsSource(model, "a.toml"), lambda model: TomlConfigSettingsSource(model, "b.toml")
    )
    assert origins(ours())["APPLICATION"] == "TomlConfigSettingsSource a.toml"
    assert origins(ours())["CONNECTIONS__WRITER__URL"] == "TomlConfigSettingsSource b.toml"


def test_a_file_that_is_not_there_says_nothing(file_source: tuple[type[DatabaseSettings], str, Any]) -> None:
    refused(file_source[0], NothingConfigured)


# ---- sources of one's own


class Vault(PydanticBaseSettingsSource):
    """A source as the documentation shows it: a value for each field."""

    content: Any = SHOP

    def get_field_value(self, field: Any, field_name: str) -> tuple[Any, str, bool]:
        return self.content.get(field_name), field_name, False

    def __call__(self) -> dict[str, Any]:
        values = {name: self.get_field_value(field, name)[0] for name, field in self.settings_cls.model_fields.items()}
        return {name: value for name, value in values.items() if value is not None}


def test_a_source_of_ones_own_is_asked_and_named() -> None:
    settings = customised(Vault)()
    assert settings.connection("writer").masked_url == "sqlite:///w.db"
    assert origins(settings)["CONNECTIONS__WRITER__URL"] == "Vault"


def test_the_order_of_the_sources_is_that_of_the_tuple(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("APP_DB_APPLICATION", "environment")
    assert customised(Vault)().application == "environment"
    assert customised(Vault, first=True)().application == "shop"
    assert customised(Vault, first=True)(application="code").application == "shop"


def test_sources_that_are_left_out_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    class Ours(DatabaseSettings):
        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            return (Vault(settings_cls),)

    monkeypatch.setenv("APP_DB_APPLICATION", "environment")
    monkeypatch.setenv("APP_DB_COLOUR", "red")
    assert Ours().application == "shop"


def test_a_source_sees_what_the_sources_before_it_have_read(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    class Late(Vault):
        def __call__(self) -> dict[str, Any]:
            seen.append((self.current_state, self.settings_sources_data))
            return {}

    monkeypatch.setenv("APP_DB_CONNECTIONS__WRITER__POOL__SIZE", "7")
    customised(Vault, Late)(atomicity="best_effort")
    [(state, states)] = seen
    assert state["atomicity"] == "best_effort"
    assert state["connections"]["writer"] == {"url": "sqlite:///w.db", "pool": {"size": "7", "class": "null"}}
    assert states["InitSettingsSource"] == {"atomicity": "best_effort"}
    assert states["EnvSettingsSource"] == {"connections": {"writer": {"pool": {"size": "7"}}}}
    assert states["Vault"] == SHOP


def test_a_source_that_raises_is_one_problem_beside_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(Vault):
        def __call__(self) -> dict[str, Any]:
            raise RuntimeError(f"no luck with {SECRET}")

    monkeypatch.setenv("APP_DB_COLOUR", SECRET)
    problems = refused(customised(Broken))
    assert "RuntimeError" in problems["Broken"]
    assert "test_sources.py:" in problems["Broken"]
    assert "APP_DB_COLOUR" in problems
    assert not any(name.endswith("__URL") for name in problems)


def test_a_source_that_can_not_be_made_is_named() -> None:
    class Broken(Vault):
        def __init__(self, model: type[BaseSettings]) -> None:
            super().__init__(model)
            raise ConnectionError(SECRET)

    assert "ConnectionError" in refused(customised(Broken))["Broken"]


def test_a_package_that_a_source_needs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Needing(Vault):
        def __call__(self) -> dict[str, Any]:
            import_module("no_such_vault")
            return {}

    assert "needs what is not installed: No module named 'no_such_vault'" in refused(customised(Needing))["Needing"]


def test_sources_that_can_not_be_listed_are_a_problem_of_the_hook() -> None:
    def broken(model: type[BaseSettings]) -> PydanticBaseSettingsSource:
        raise LookupError(SECRET)

    assert "LookupError" in refused(customised(broken))["settings_customise_sources"]


@pytest.mark.parametrize("content", [None, [SECRET], SECRET])
def test_a_source_that_returns_no_dict_is_a_problem(content: Any) -> None:
    class Broken(Vault):
        def __call__(self) -> Any:
            return content

    assert "must return a dict" in refused(customised(Broken))["Broken"]


def test_a_subclass_of_the_environments_source_prepares_values_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    class Reversed(EnvSettingsSource):
        def prepare_field_value(self, field_name: str, field: Any, value: Any, value_is_complex: bool) -> Any:
            return value[::-1] if field_name == "application" and value else None

    monkeypatch.setenv("APP_DB_APPLICATION", "pohs")
    settings = customised(Reversed, first=True)(connections=SHOP["connections"])
    assert (settings.application, origins(settings)["APPLICATION"]) == ("shop", "Reversed")


def test_two_sources_of_variables_have_each_their_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = customised(lambda model: EnvSettingsSource(model, env_prefix="SHOP_"))
    monkeypatch.setenv("APP_DB_CONNECTIONS__WRITER__URL", "sqlite:///w.db")
    monkeypatch.setenv("SHOP_CONNECTIONS__WRITER__ECHO", "true")
    assert [origin.variable for origin in ours().origins()] == [
        "APP_DB_CONNECTIONS__WRITER__URL",
        "SHOP_CONNECTIONS__WRITER__ECHO",
    ]
    monkeypatch.setenv("SHOP_CONNECTIONS__WRITER__ECHO", SECRET)
    monkeypatch.setenv("SHOP_COLOUR", SECRET)
    assert set(refused(ours)) == {"SHOP_CONNECTIONS__WRITER__ECHO", "SHOP_COLOUR"}


def test_what_a_source_calls_its_file_may_be_anything() -> None:
    class Odd(Vault):
        toml_file_path = 5

        def __call__(self) -> dict[str, Any]:
            return {"application": "1"}

    assert "Odd 5." in refused(customised(Odd))["APP_DB_APPLICATION"]


# ---- secret managers


def aws(monkeypatch: pytest.MonkeyPatch, content: dict[str, str]) -> Any:
    """pydantic-settings' source for AWS, with a client that has the secret."""
    text = json.dumps({name.replace("__", "--"): value for name, value in content.items()})
    client = SimpleNamespace(get_secret_value=lambda **request: {"SecretString": text})
    module: Any = ModuleType("boto3")
    module.client = lambda *_, **__: client
    types: Any = ModuleType("mypy_boto3_secretsmanager.client")  # older pydantic-settings imports it
    types.SecretsManagerClient = object
    for made in (module, ModuleType("mypy_boto3_secretsmanager"), types):
        monkeypatch.setitem(sys.modules, made.__name__, made)
    source: Any = pydantic_settings.AWSSecretsManagerSettingsSource
    return lambda model: source(model, "shop/databases", env_prefix="")


def azure(monkeypatch: pytest.MonkeyPatch, content: dict[str, str]) -> Any:
    """pydantic-settings' source for Azure, with a client that has the secrets."""
    secrets = {name.replace("__", "--").replace("_", "-"): text for name, text in content.items()}
    client = SimpleNamespace(
        list_properties_of_secrets=lambda: [SimpleNamespace(name=name, enabled=True) for name in secrets],
        get_secret=lambda name: SimpleNamespace(value=secrets[name]),
    )
    modules: dict[str, Any] = {
        "azure.core.credentials": {"TokenCredential": object},
        "azure.core.exceptions": {"ResourceNotFoundError": KeyError},
        "azure.keyvault.secrets": {"SecretClient": lambda **_: client},
    }
    for name, content_of in modules.items():
        module = ModuleType(name)
        vars(module).update(content_of)
        monkeypatch.setitem(sys.modules, name, module)
        for length in (1, 2):
            parent = ".".join(name.split(".")[:length])
            monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
    source: Any = pydantic_settings.AzureKeyVaultSettingsSource
    return lambda model: source(model, "https://shop.vault", object(), env_prefix="")


def google(monkeypatch: pytest.MonkeyPatch, content: dict[str, str]) -> Any:
    """pydantic-settings' source for Google Cloud, with a client that has the secrets."""

    def access(name: str) -> Any:
        secret = name.split("/")[3]
        if secret not in content:
            raise KeyError(secret)
        return SimpleNamespace(payload=SimpleNamespace(data=content[secret].encode()))

    client = SimpleNamespace(
        list_secrets=lambda parent: [SimpleNamespace(name=f"{parent}/secrets/{name}") for name in content],
        common_project_path=lambda project: f"projects/{project}",
        parse_secret_path=lambda name: {"secret": name.split("/")[3]},
        secret_version_path=lambda project, secret, version: f"projects/{project}/secrets/{secret}/versions/{version}",
        access_secret_version=access,
    )
    modules: dict[str, Any] = {
        "google": {},
        "google.auth": {"default": lambda: (object(), "shop")},
        "google.auth.credentials": {"Credentials": object},
        "google.cloud": {},
        "google.cloud.secretmanager": {"SecretManagerServiceClient": lambda **_: client},
        "google.api_core": {},
        "google.api_core.exceptions": {"NotFound": KeyError},
    }
    for name, content_of in modules.items():
        module = ModuleType(name)
        vars(module).update(content_of)
        monkeypatch.setitem(sys.modules, name, module)
    source: Any = pydantic_settings.GoogleSecretManagerSettingsSource
    return lambda model: source(model, project_id="shop", secret_client=client, env_prefix="", case_sensitive=False)


MANAGERS = {
    name: maker
    for name, maker in {
        "AWSSecretsManagerSettingsSource": aws,
        "AzureKeyVaultSettingsSource": azure,
        "GoogleSecretManagerSettingsSource": google,
    }.items()
    if hasattr(pydantic_settings, name)  # the oldest pydantic-settings has not all
}


@pytest.mark.parametrize("name", MANAGERS)
def test_a_secret_manager_is_a_source(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    content = {"connections__writer__url": f"postgresql://u:{SECRET}@h/d", "connections__writer__echo": "true"}
    settings = customised(MANAGERS[name](monkeypatch, content))()
    assert settings.connection("writer").sqlalchemy_url().password == SECRET
    assert settings.connection("writer").echo
    assert origins(settings)["CONNECTIONS__WRITER__URL"] == name
    assert SECRET not in repr(settings.origins())


@pytest.mark.parametrize("name", MANAGERS)
def test_a_mistake_in_a_secret_manager_names_it(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    content = {"connections__writer__url": "sqlite://", "connections__writer__port": SECRET}
    problems = refused(customised(MANAGERS[name](monkeypatch, content)))
    assert f"It comes from {name}." in problems["APP_DB_CONNECTIONS__WRITER__PORT"]


# ---- names


def test_a_prefix_of_ones_own_is_that_of_every_variable_and_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Ours(DatabaseSettings):
        model_config = SettingsConfigDict(env_prefix="SHOP_DB_")

    monkeypatch.setenv("APP_DB_COLOUR", "somebody else's")
    assert set(refused(Ours, NothingConfigured)) == {"SHOP_DB_CONNECTIONS__WRITER__URL"}
    monkeypatch.setenv("SHOP_DB_CONNECTIONS__WRITER__URL", "sqlite:///w.db")
    settings = Ours()
    assert [origin.variable for origin in settings.origins()] == ["SHOP_DB_CONNECTIONS__WRITER__URL"]
    assert settings.connections["writer"].variable("url") == "SHOP_DB_CONNECTIONS__WRITER__URL"
    with pytest.raises(ConnectionNotConfigured, match="Set SHOP_DB_CONNECTIONS__LOG__URL,"):
        settings.connection("log")
    monkeypatch.setenv("SHOP_DB_CONNECTIONS__WRITER__TWO_PHASE", "true")
    monkeypatch.setenv("SHOP_DB_CONNECTIONS__LOG__MIRROR", "writter")
    monkeypatch.setenv("SHOP_DB_DECISION_LOG", "writter")
    monkeypatch.setenv("SHOP_DB_COLOUR", "red")
    assert set(refused(Ours)) == {
        "SHOP_DB_COLOUR",
        "SHOP_DB_CONNECTIONS__LOG__MIRROR",
        "SHOP_DB_CONNECTIONS__WRITER__TWO_PHASE",
        "SHOP_DB_DECISION_LOG",
    }


def test_the_arguments_of_pydantic_settings_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("X_connections-writer-url", "sqlite:///w.db")
    monkeypatch.setenv("X_connections-writer-echo", "")
    monkeypatch.setenv("X_connections-writer-mirror", "nothing")
    settings = DatabaseSettings(
        _env_prefix="X_", _env_nested_delimiter="-", _case_sensitive=True, _env_ignore_empty=True, _env_parse_none_str="nothing"
    )
    assert settings.connection("writer").masked_url == "sqlite:///w.db"
    assert "X_connections-writer-url" in [origin.variable for origin in settings.origins()]


def test_case_counts_if_it_is_to(monkeypatch: pytest.MonkeyPatch) -> None:
    class Ours(DatabaseSettings):
        model_config = SettingsConfigDict(case_sensitive=True)

    monkeypatch.setenv("APP_DB_connections__writer__url", "sqlite:///w.db")
    assert Ours().connection("writer").masked_url == "sqlite:///w.db"
    monkeypatch.setenv("APP_DB_CONNECTIONS__WRITER__ECHO", "true")
    problems = refused(Ours, UnknownVariable)
    assert set(problems) == {"APP_DB_CONNECTIONS__WRITER__ECHO"}


def test_another_delimiter_separates_the_levels(monkeypatch: pytest.MonkeyPatch) -> None:
    class Ours(DatabaseSettings):
        model_config = SettingsConfigDict(env_nested_delimiter=".")

    monkeypatch.setenv("APP_DB_CONNECTIONS.WRITER.URL", "sqlite:///w.db")
    monkeypatch.setenv("APP_DB_CONNECTIONS.WRITER.PORT", "x")
    assert set(refused(Ours)) == {"APP_DB_CONNECTIONS.WRITER.PORT"}


def test_several_env_files_are_read_and_each_is_named() -> None:
    Path("a.env").write_text("APP_DB_APPLICATION=a\nAPP_DB_CONNECTIONS__WRITER__URL=sqlite:///a.db\n")
    Path("b.env").write_text("APP_DB_APPLICATION=b\n")
    Path("bad.env").write_bytes(b"APP_DB_X=\xff" + SECRET.encode())

    class Ours(DatabaseSettings):
        model_config = SettingsConfigDict(env_file=("a.env", "b.env", "none.env"))

    made: Any = Ours
    for settings in (Ours(), DatabaseSettings(_env_file=["a.env", Path("b.env")])):
        assert (settings.application, settings.connection("writer").masked_url) == ("b", "sqlite:///a.db")
        assert origins(settings) == {"APPLICATION": "b.env", "CONNECTIONS__WRITER__URL": "a.env"}
    assert set(refused(lambda: made(_env_file=("a.env", "bad.env")))) == {"bad.env"}


@contextmanager
def piped(*texts: str) -> Iterator[list[str]]:
    """Give pipes, each with a text to be read once."""
    pipes = [os.pipe() for _ in texts]
    for text, (_, writing) in zip(texts, pipes, strict=True):
        with os.fdopen(writing, "w") as file:
            file.write(text)
    yield [f"/dev/fd/{reading}" for reading, _ in pipes]
    for reading, _ in pipes:
        os.close(reading)


@pytest.mark.parametrize("count", [1, 2])
def test_an_env_file_may_be_a_pipe_as_far_as_pydantic_settings_reads_one(count: int) -> None:
    class Plain(BaseSettings):
        colour: str = "none"

    plain: Any = Plain
    with piped("COLOUR=red") as [file]:
        reads_pipes = plain(_env_file=file).colour == "red"
    with piped(*(f"APP_DB_CONNECTIONS__C{number}__URL=sqlite://\n" for number in range(count))) as files:
        settings = DatabaseSettings(_env_file=files, connections={"log": {"url": "sqlite://"}})
    assert len(settings.connections) == 1 + count * reads_pipes


def test_several_secrets_directories_are_read_and_the_last_wins(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "app_db_application").write_text(name)
    (tmp_path / "one" / "APP_DB_CONNECTIONS__WRITER__URL").write_text("sqlite:///w.db")

    class Ours(DatabaseSettings):
        model_config = SettingsConfigDict(secrets_dir=(str(tmp_path / "one"), str(tmp_path / "two")))

    made: Any = Ours
    for settings in (Ours(), DatabaseSettings(_secrets_dir=[tmp_path / "one", tmp_path / "two"])):
        assert (settings.application, settings.connection("writer").masked_url) == ("two", "sqlite:///w.db")
        assert origins(settings) == {
            "APPLICATION": f"secrets {tmp_path / 'two'}",
            "CONNECTIONS__WRITER__URL": f"secrets {tmp_path / 'one'}",
        }
    refused(lambda: made(_secrets_dir=None), NothingConfigured)


def test_secrets_may_lie_in_directories_of_directories(tmp_path: Path) -> None:
    nested: Any = getattr(pydantic_settings, "NestedSecretsSettingsSource", None)
    if nested is None:  # in the oldest pydantic-settings
        return

    class Ours(DatabaseSettings):
        model_config = SettingsConfigDict(secrets_dir=str(tmp_path), env_prefix="")

        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            return init_settings, nested(file_secret_settings, secrets_nested_subdir=True)

    folder = tmp_path / "connections" / "writer"
    folder.mkdir(parents=True)
    (folder / "url").write_text(f"postgresql://u:{SECRET}@h/d")
    settings = Ours()
    assert settings.connection("writer").sqlalchemy_url().password == SECRET
    assert [origin.source for origin in settings.origins()] == [f"NestedSecretsSettingsSource {tmp_path}"]


# ---- a subclass


class Cache(BaseModel):
    url: str = "memory://"
    hosts: list[str] = []


class Fuller(DatabaseSettings):
    """Settings with fields of every kind beside those of app_db."""

    colour: str = "red"
    tags: list[str] = Field(default_factory=list)
    ports: dict[str, int] = Field(default_factory=dict)
    cache: Cache = Cache()
    zone: str = Field(default="", validation_alias=AliasChoices("SHOP_ZONE", "ZONE"))
    first: str = Field(default="", validation_alias=AliasPath("shop_hosts", 0))
    limit: int | None = None


def test_a_subclass_has_fields_as_pydantic_settings_reads_them(monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {
        "APP_DB_CONNECTIONS__WRITER__URL": "sqlite:///w.db",
        "APP_DB_COLOUR": "blue",
        "APP_DB_TAGS": '["a", "b"]',
        "APP_DB_PORTS__WEB": "80",
        "APP_DB_CACHE": '{"hosts": ["h"]}',
        "APP_DB_CACHE__URL": "redis://h",
        "ZONE": "eu",
        "SHOP_HOSTS": '["h1", "h2"]',
        "APP_DB_LIMIT": "3",
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    settings = Fuller()
    assert (settings.colour, settings.tags, settings.ports) == ("blue", ["a", "b"], {"web": 80})
    assert settings.cache == Cache(url="redis://h", hosts=["h"])
    assert (settings.zone, settings.first, settings.limit) == ("eu", "h1", 3)
    assert origins(settings)["COLOUR"] == "environment"
    with_others = settings.with_connections({"log": ConnectionSettings(url="sqlite://")})
    assert (list(with_others.connections), with_others.application) == (["log"], "app_db")


def test_mistakes_in_the_fields_of_a_subclass_are_problems_like_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("APP_DB_CONNECTIONS__WRITER__URL", "sqlite:///w.db")
    monkeypatch.setenv("APP_DB_TAGS", SECRET)
    monkeypatch.setenv("APP_DB_LIMIT", SECRET)
    monkeypatch.setenv("APP_DB_COLOR", "blue")
    problems = refused(Fuller)
    assert set(problems) == {"APP_DB_TAGS", "APP_DB_LIMIT", "APP_DB_COLOR"}
    assert "APP_DB_COLOUR'?" in problems["APP_DB_COLOR"]


def test_a_check_of_a_subclass_that_fails_is_a_problem_of_the_class(monkeypatch: pytest.MonkeyPatch) -> None:
    class Ours(DatabaseSettings):
        @model_validator(mode="after")
        def check(self) -> Ours:
            raise ValueError("must have a writer")

    monkeypatch.setenv("APP_DB_CONNECTIONS__LOG__URL", "sqlite://")
    assert refused(Ours) == {"Ours": "must have a writer."}


def test_a_field_of_app_db_may_have_an_alias(monkeypatch: pytest.MonkeyPatch) -> None:
    class Ours(DatabaseSettings):
        connections: dict[str, ConnectionSettings] = Field(default_factory=dict, alias="DATABASES")

    monkeypatch.setenv("DATABASES__WRITER__URL", "sqlite:///w.db")
    settings = Ours(DATABASES={"log": ConnectionSettings(url="sqlite:///l.db")})
    assert sorted(settings.connections) == ["log", "writer"]
    assert [origin.variable for origin in settings.origins()] == ["DATABASES__LOG__URL", "DATABASES__WRITER__URL"]
    monkeypatch.setenv("DATABASES__WRITER__PORT", SECRET)
    assert set(refused(Ours)) == {"DATABASES__WRITER__PORT"}


def test_defaults_are_updated_in_part_if_they_are_to(monkeypatch: pytest.MonkeyPatch) -> None:
    class Ours(DatabaseSettings):
        model_config = SettingsConfigDict(nested_model_default_partial_update=True)
        cache: Cache = Cache(url="redis://h")

    monkeypatch.setenv("APP_DB_CACHE__HOSTS", '["h"]')
    monkeypatch.setenv("APP_DB_CONNECTIONS__WRITER__URL", "sqlite:///w.db")
    assert Ours().cache == Cache(url="redis://h", hosts=["h"])


# ---- the command line


def test_arguments_of_the_command_line_win(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("APP_DB_APPLICATION", "environment")
    arguments = ["--application", "cli", "--connections", '{"writer": {"url": "sqlite:///w.db"}}']
    for settings in (
        DatabaseSettings(_cli_parse_args=arguments),
        DatabaseSettings(_cli_settings_source=CliSettingsSource(DatabaseSettings, cli_parse_args=arguments)),
        customised(lambda model: CliSettingsSource(model, cli_parse_args=arguments), first=True)(),
    ):
        assert (settings.application, settings.connection("writer").masked_url) == ("cli", "sqlite:///w.db")
        assert origins(settings)["APPLICATION"] == "CliSettingsSource"


def test_settings_can_be_a_command(monkeypatch: pytest.MonkeyPatch) -> None:
    class Command(DatabaseSettings):
        verbose: bool = False

        def cli_cmd(self) -> None:
            ran.append(f"{self.application} {self.verbose} {self.connection('writer').masked_url}")

    ran: list[str] = []
    monkeypatch.setenv("APP_DB_CONNECTIONS__WRITER__URL", "sqlite:///w.db")
    command = CliApp.run(Command, cli_args=["--application", "shop", "--verbose", "true"])
    assert ran == ["shop True sqlite:///w.db"]
    assert origins(command)["APPLICATION"] == "CliSettingsSource"
    assert origins(command)["CONNECTIONS__WRITER__URL"] == "environment"
    monkeypatch.setenv("APP_DB_COLOUR", SECRET)
    assert set(refused(lambda: CliApp.run(Command, cli_args=[]), UnknownVariable)) == {"APP_DB_COLOUR"}


def test_settings_can_be_a_part_of_a_command(monkeypatch: pytest.MonkeyPatch) -> None:
    class Shop(BaseSettings):
        db: DatabaseSettings = Field(default_factory=DatabaseSettings)

    monkeypatch.setenv("APP_DB_APPLICATION", "environment")
    shop = CliApp.run(Shop, cli_args=["--db.connections", '{"writer": {"url": "sqlite:///w.db"}}'])
    assert (shop.db.application, shop.db.connection("writer").masked_url) == ("environment", "sqlite:///w.db")


# ---- part of the application's settings


def test_the_application_can_give_its_settings_for_databases_an_alias(monkeypatch: pytest.MonkeyPatch) -> None:
    class Shop(BaseSettings):
        model_config = SettingsConfigDict(env_nested_delimiter="__", env_prefix="SHOP_")
        db: DatabaseSettings = Field(default_factory=DatabaseSettings, validation_alias="databases")

    monkeypatch.setenv("DATABASES__CONNECTIONS__WRITER__URL", "sqlite:///w.db")
    monkeypatch.setenv("APP_DB_ATOMICITY", "best_effort")
    shop = Shop()
    assert (shop.db.connection("writer").masked_url, shop.db.atomicity) == ("sqlite:///w.db", "best_effort")


def test_the_applications_files_configure_its_databases() -> None:
    class Shop(BaseSettings):
        model_config = SettingsConfigDict(toml_file="shop.toml")
        db: DatabaseSettings

        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            return (TomlConfigSettingsSource(settings_cls),)

    Path("shop.toml").write_text(toml({"db": SHOP}))
    assert CliApp.run(Shop, cli_args=[]).db.connection("writer").pool.size == 3


# ---- cost


def calls(count: int) -> int:
    """Return how many functions are called to make the settings of so many connections."""
    connections = {f"c{number}": {"url": f"sqlite:///{number}.db", "pool": {"size": 2}} for number in range(count)}
    environment = {f"APP_DB_CONNECTIONS__C{number}__ECHO": "true" for number in range(count)}
    counted = 0

    def count_one(frame: FrameType, event: str, argument: object) -> None:
        nonlocal counted
        counted += event in ("call", "c_call")

    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        DatabaseSettings(connections=connections)
        before = sys.getprofile()
        sys.setprofile(count_one)
        try:
            settings = DatabaseSettings(connections=connections)
        finally:
            sys.setprofile(before)
    assert len(settings.connections) == count
    return counted


def test_the_cost_grows_with_the_number_of_connections_and_not_faster() -> None:
    ten, hundred, thousand = calls(10), calls(100), calls(1000)
    each = (hundred - ten) / 90
    assert (thousand - hundred) / 900 == pytest.approx(each, rel=0.05)


def test_a_field_of_the_applications_own_that_is_missing_or_wrong_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    class Shop(DatabaseSettings):
        api_key: SecretStr
        workers: int
        code: str = Field(pattern="^[a-z]+$")

    monkeypatch.setenv("APP_DB_CONNECTIONS__WRITER__URL", "sqlite:///w.db")
    monkeypatch.setenv("APP_DB_WORKERS", "many")
    monkeypatch.setenv("APP_DB_CODE", "1")
    with pytest.raises(SettingsError) as refused:
        Shop()  # type: ignore[call-arg]
    assert [str(problem) for problem in refused.value.problems] == [
        "APP_DB_API_KEY: is not set.",
        "APP_DB_CODE: must match ^[a-z]+$.",
        "APP_DB_WORKERS: must be a whole number.",
    ]
