"""Whatever a source or a mapping holds, it makes settings or one error by name; and it never shows a secret."""

from __future__ import annotations

import traceback
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource

from app_db.errors import SettingsError
from app_db.settings import DatabaseSettings

MARKER = "hUnTeR2zZ"

words = st.sampled_from([
    "connections", "application", "atomicity", "two_phase", "decision_log", "writer", "reader", "log", "url", "pool", "size",
    "mirror", "query", "connect_args", "password", "class", "class_", "", "A", "a.b", "a__b", "colour",
])  # fmt: skip
scalars = st.one_of(
    st.sampled_from([None, True, 0, -1, 1.5, float("nan"), MARKER, f"postgresql://u:{MARKER}@h/d", "sqlite://", "writer", b"x"]),
    st.text(max_size=5),
)
trees = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.dictionaries(words, inner, max_size=4),
        st.dictionaries(st.one_of(st.integers(), st.none()), inner, max_size=2),
        st.lists(inner, max_size=3),
    ),
    max_leaves=12,
)
connections = st.dictionaries(
    st.sampled_from(["writer", "reader", "log", "Class"]),
    st.dictionaries(words, trees, max_size=4).map(lambda own: {"url": f"postgresql://u:{MARKER}@h/d", **own}),
    max_size=3,
)
contents = st.one_of(
    st.dictionaries(words, trees, max_size=5),
    st.fixed_dictionaries({"connections": connections}, optional={"two_phase": st.booleans(), "colour": trees}),
)
keys = st.lists(words, min_size=1, max_size=4)

many = settings(max_examples=300, deadline=None)


class Content(PydanticBaseSettingsSource):
    """A source that has whatever a test puts into it."""

    found: Any = None

    def get_field_value(self, field: Any, field_name: str) -> tuple[Any, str, bool]:
        return None, field_name, False

    def __call__(self) -> Any:
        return self.found


class FromContent(DatabaseSettings):
    """Settings that have this source alone."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (Content(settings_cls),)


def judged(make: Any) -> SettingsError | None:
    """Return the error of making settings, after looking for secrets in all that is shown."""
    made = outcome(make)
    if isinstance(made, DatabaseSettings):
        assert MARKER not in "".join(made.connection(name).masked_url for name in made.connections)
        return None
    assert made.problems
    assert made.__context__ is None
    assert MARKER not in "".join(traceback.format_exception(made)) + repr(made.problems)
    return made


def outcome(make: Any) -> DatabaseSettings | SettingsError:
    try:
        made: DatabaseSettings = make()
    except SettingsError as error:
        return error
    return made


@pytest.mark.exhaustive
@many
@given(content=contents)
def test_whatever_a_source_returns_makes_settings_or_one_error(content: Any) -> None:
    Content.found = content
    error = judged(FromContent)
    for problem in error.problems if error else ():
        assert problem.variable.startswith("APP_DB_")


@pytest.mark.exhaustive
@many
@given(
    content=st.dictionaries(keys.map(".".join), trees, max_size=5), prefix=st.sampled_from(["app_db.", "sa.", "APP_DB_", "x."])
)
def test_whatever_a_mapping_holds_makes_settings_or_one_error(content: dict[str, Any], prefix: str) -> None:
    mapping = {prefix + key: value for key, value in content.items()}
    error = judged(lambda: DatabaseSettings.from_mapping(mapping, prefixes={"log": "sa."}))
    for problem in error.problems if error else ():
        assert problem.variable.lower().startswith(("app_db", "sa."))
