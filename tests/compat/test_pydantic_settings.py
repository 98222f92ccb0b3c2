"""What app_db relies on of pydantic-settings that is not public."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic_settings import BaseSettings, EnvSettingsSource, InitSettingsSource, PydanticBaseSettingsSource

from app_db._compat.pydantic_settings import lines_left_out, means_none, tell_what_was_read


class Plain(BaseSettings):
    """Settings with one field."""

    colour: str | None = None


def test_a_source_can_be_told_what_was_read_before_it() -> None:
    source = InitSettingsSource(Plain, {})
    state: dict[str, Any] = {"colour": "red"}
    tell_what_was_read(source, state, {"Vault": state})
    assert (source.current_state, source.settings_sources_data) == (state, {"Vault": state})


def test_pydantic_settings_tells_its_sources_the_same() -> None:
    seen: list[Any] = []

    class Late(InitSettingsSource):
        def __call__(self) -> dict[str, Any]:
            seen.append((self.current_state, self.settings_sources_data["InitSettingsSource"]))
            return {}

    class Ours(Plain):
        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            return init_settings, Late(settings_cls, {})

    Ours(colour="red")
    assert seen == [({"colour": "red"}, {"colour": "red"})]


def test_a_text_that_means_none_is_known_by_its_class(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLOUR", "nothing")
    assert means_none(EnvSettingsSource(Plain, env_parse_none_str="nothing").env_vars["colour"])
    assert not means_none(EnvSettingsSource(Plain).env_vars["colour"])
    assert not means_none(None)


def test_statements_of_an_env_file_that_can_not_be_parsed_are_found(tmp_path: Path) -> None:
    file = tmp_path / "some.env"
    file.write_text("# a comment\nA=1\n\n\nB 2\nC\nD='x\ny'\nE=\n  F='\n")
    assert [(line, text.strip()) for line, text in lines_left_out(file, None)] == [(5, "B 2"), (10, "F='")]
