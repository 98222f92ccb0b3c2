"""What jedi, and so an editor, completes after the names of a container."""

from __future__ import annotations

from pathlib import Path

import jedi
import pytest
from jedi.api.environment import InterpreterEnvironment

from harness.paths import ROOT

CONTAINER = """
from app_db import Connection, DatabaseContainer, Provide
class Container(DatabaseContainer):
    writer = Connection()
container = Container()
"""

COMPLETED = {
    "container.writer.": {"session", "engine", "sessionmaker", "scoped_session", "async_session", "async_engine"},
    "container.writer.session().": {"add", "scalars", "execute", "get", "begin_nested"},
    "Container.writer.session().": {"add", "scalars", "execute", "get", "begin_nested"},
    "container.writer.async_session().": {"add", "scalars", "execute", "stream_scalars"},
    "container.writer.engine().": {"connect", "dialect", "dispose"},
    "container.session().": {"add", "scalars", "using"},
    "container.settings().": {"connections", "application", "atomicity"},
    "container.": {"writer", "transaction", "unit", "settings", "session"},
    "Provide[Container.writer.session].": {"add", "scalars", "execute"},
}


@pytest.fixture
def completions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Completions:
    monkeypatch.setattr(jedi.settings, "cache_directory", str(tmp_path))
    return Completions(tmp_path)


class Completions:
    def __init__(self, directory: Path) -> None:
        self._path = directory / "shop.py"
        self._project = jedi.Project(directory, added_sys_path=[str(ROOT)])

    def after(self, line: str) -> set[str]:
        script = jedi.Script(CONTAINER + line, path=self._path, project=self._project, environment=InterpreterEnvironment())
        return {completion.name for completion in script.complete()}


@pytest.mark.exhaustive
def test_an_editor_completes_the_names_with_a_dot(completions: Completions) -> None:
    assert {line: names - completions.after(line) for line, names in COMPLETED.items()} == {line: set() for line in COMPLETED}


@pytest.mark.exhaustive
def test_an_editor_completes_nothing_after_a_name_with_an_underscore(completions: Completions) -> None:
    """The documentation says so. `writer_session` is made while the class is, which no analysis of the source sees."""
    assert completions.after("container.writer_session().") == set()
