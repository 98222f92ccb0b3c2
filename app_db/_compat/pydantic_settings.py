"""pydantic-settings: what a source knows of the sources before it, and the lines of env files that it leaves out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic_settings import PydanticBaseSettingsSource


def tell_what_was_read(source: PydanticBaseSettingsSource, state: dict[str, Any], states: Mapping[str, dict[str, Any]]) -> None:
    """Set `current_state` and `settings_sources_data` of a source, which it may read when it is called."""
    source._set_current_state(state)
    source._set_settings_sources_data(dict(states))


def lines_left_out(file: Path, encoding: str | None) -> Iterator[tuple[int, str]]:
    """Yield the number and the text of each statement of an env file that can't be parsed.

    A name alone can be: Docker takes its value from the environment. pydantic-settings reads env files by python-dotenv, which
    leaves out the others, and logs their numbers at most.
    """
    from dotenv.parser import parse_stream

    with file.open(encoding=encoding or "utf-8") as stream:
        for binding in parse_stream(stream):
            text = binding.original.string.lstrip()
            if binding.error:
                yield binding.original.line + binding.original.string[: -len(text)].count("\n"), text


def means_none(text: object) -> bool:
    """Return whether the text of a variable is what `env_parse_none_str` says means None."""
    return type(text).__name__ == "EnvNoneType"
