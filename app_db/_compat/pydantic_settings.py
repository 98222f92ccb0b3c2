"""pydantic-settings: what a source knows of the sources before it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic_settings import PydanticBaseSettingsSource


def tell_what_was_read(source: PydanticBaseSettingsSource, state: dict[str, Any], states: Mapping[str, dict[str, Any]]) -> None:
    """Set `current_state` and `settings_sources_data` of a source, which it may read when it is called."""
    source._set_current_state(state)
    source._set_settings_sources_data(dict(states))


def means_none(text: object) -> bool:
    """Return whether the text of a variable is what `env_parse_none_str` says means None."""
    return type(text).__name__ == "EnvNoneType"
