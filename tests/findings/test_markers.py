"""Markers in the application's modules are found that would not be replaced when their functions are called."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import pytest
from dependency_injector import containers, providers

from app_db import Connection, DatabaseContainer, DatabaseSettings
from app_db._findings.find import find
from app_db._findings.finding import Finding
from harness.findings import matters, run

MODULE = """
from __future__ import annotations
from typing import Annotated
from app_db import Connection, DatabaseContainer, Provide, transactional
from dependency_injector.wiring import Closing, Provider, inject
from sqlalchemy.orm import Session

class Container(DatabaseContainer):
    main = Connection()

class Unrelated(DatabaseContainer):
    other = Connection()
"""

SOUND = """
@transactional
def by_object(session: Session = Provide[Container.main.session]) -> None: ...

@transactional
async def annotated(session: Annotated[Session, Provide["main.session"]]) -> None: ...

@inject
def closing(session: Session = Closing[Provide["main_session"]], later = Provider[Container.main.session]) -> None: ...

class Service:
    @transactional
    def method(self, session: Session = Provide[Container.main_session]) -> None: ...

    @staticmethod
    @inject
    def static(settings = Provide[Container.settings.provided.application]) -> None: ...

def plain(session: Session | None = None) -> None: ...
"""

Checked = Callable[..., list[Finding]]


@pytest.fixture
def checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sqlite_url: str) -> Iterator[Checked]:
    """`checked("shop", text, wired=True)` makes a module, imports its container, and returns what is found."""
    monkeypatch.syspath_prepend(str(tmp_path))
    run(sqlite_url, "CREATE TABLE t (id INTEGER)")
    settings = DatabaseSettings(_env_file=None, connections={"main": {"url": sqlite_url}})
    made: list[DatabaseContainer] = []

    def check(name: str, text: str, *, wired: list[str], modules: tuple[str, ...] = ()) -> list[Finding]:
        (tmp_path / f"{name}.py").write_text(MODULE + text)
        container: DatabaseContainer = __import__(name).Container(settings=settings)
        made.append(container)
        if wired:
            container.wire(modules=wired)
        return find(container, modules or (name,))

    yield check
    for container in made:
        container.unwire()
        container.shutdown_resources()
    for name in [name for name in sys.modules if "_shop" in name]:
        del sys.modules[name]


def test_markers_that_are_all_replaced(checked: Checked) -> None:
    assert checked("sound_shop", SOUND, wired=["sound_shop"]) == []


def test_a_module_that_is_not_wired(checked: Checked, tmp_path: Path) -> None:
    (tmp_path / "wired_alone.py").write_text("")
    [finding] = checked("unwired_shop", SOUND, wired=["wired_alone"])
    assert (finding.matter, finding.severity, finding.where) == ("not-wired", "warning", "unwired_shop")
    assert "by_object, annotated, closing, Service.method, Service.static would get markers" in finding.what


def test_a_container_that_wires_nothing(checked: Checked) -> None:
    [finding] = checked("wireless_shop", SOUND, wired=[])
    assert (finding.matter, finding.severity) == ("nothing-wired", "hint")


@pytest.mark.parametrize(
    ("marker", "says"),
    [
        ('Provide["main.sesion"]', "names 'main.sesion', which"),
        ('Provide["warehouse_session"]', "names 'warehouse_session', which"),
        ("Provide[Unrelated.other.session]", "of another container, which"),
        ("Closing[Provide[Unrelated.other.engine]]", "of another container, which"),
    ],
)
def test_a_marker_that_names_what_the_container_does_not_have(checked: Checked, marker: str, says: str) -> None:
    [finding] = checked("lost_shop", f"@inject\ndef buy(what: str, thing = {marker}) -> None: ...", wired=["lost_shop"])
    assert (finding.matter, finding.severity, finding.where) == ("unresolved", "error", "lost_shop.buy")
    assert finding.what.startswith("The parameter 'thing' of buy ")
    assert says in finding.what


def test_a_provider_that_a_subclass_replaces_is_not_found_by_its_base(checked: Checked) -> None:
    text = """
Base = Container

class Container(Base):
    main = Connection()

@inject
def buy(session = Provide[Base.main.session]) -> None: ...
"""
    assert matters(checked("derived_shop", text, wired=["derived_shop"])) == [("unresolved", None)]


def test_a_provider_of_the_container_that_depends_on_nothing(sqlite_url: str) -> None:
    class Container(DatabaseContainer):
        main = Connection()
        broker: providers.Dependency[str] = providers.Dependency(instance_of=str)

    run(sqlite_url, "CREATE TABLE t (id INTEGER)")
    container = Container(settings=DatabaseSettings(_env_file=None, connections={"main": {"url": sqlite_url}}))
    [finding] = find(container)
    assert (finding.matter, finding.connection) == ("unresolved", None)
    assert "broker" in finding.what
    container.broker.override(providers.Object("redis://"))
    assert find(container) == []
    container.shutdown_resources()


def test_a_module_that_can_not_be_imported(checked: Checked, tmp_path: Path) -> None:
    (tmp_path / "broken_shop.py").write_text("raise ValueError('s3cr3t')")
    [finding] = checked("whole_shop", SOUND, wired=["whole_shop"], modules=("broken_shop", "whole_shop"))
    assert (finding.matter, finding.severity) == ("module", "error")
    assert finding.what == "The module 'broken_shop' can't be imported: ValueError."
    [finding] = checked("whole_shop", SOUND, wired=["whole_shop"], modules=("no_such_shop",))
    assert finding.matter == "module"


def test_a_module_that_ends_the_process_is_a_finding_and_the_others_are_looked_at(checked: Checked, tmp_path: Path) -> None:
    for package in ("ending_shop", "ending_shop/jobs"):
        (tmp_path / package).mkdir()
    (tmp_path / "ending_shop" / "__init__.py").write_text("")
    (tmp_path / "ending_shop" / "jobs" / "__init__.py").write_text("raise SystemExit(0)")
    (tmp_path / "ending_shop" / "run.py").write_text("import sys; sys.exit(0)")
    (tmp_path / "ending_shop" / "see.py").write_text("raise ValueError")
    found = checked("later_shop", SOUND, wired=["later_shop"], modules=("ending_shop", "later_shop"))
    assert [(finding.matter, finding.where) for finding in found] == [
        ("module", "ending_shop.jobs"),
        ("module", "ending_shop.run"),
        ("module", "ending_shop.see"),
    ]


def test_all_modules_of_a_package_are_looked_at_and_it_is_not_started(checked: Checked, tmp_path: Path) -> None:
    package = tmp_path / "packed_shop"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "__main__.py").write_text("raise SystemExit('started')")
    (package / "selling.py").write_text(MODULE + "@inject\ndef sell(session = Provide['nothing']) -> None: ...")
    what = checked("packing_shop", SOUND, wired=["packing_shop", "packed_shop.selling"], modules=("packed_shop",))
    assert [(finding.matter, finding.where) for finding in what] == [("unresolved", "packed_shop.selling.sell")]


def test_a_container_in_one_of_the_application_is_wired_by_that(tmp_path: Path, sqlite_url: str) -> None:
    class Databases(DatabaseContainer):
        main = Connection()

    class Application(containers.DeclarativeContainer):
        databases = providers.Container(Databases)

    run(sqlite_url, "CREATE TABLE t (id INTEGER)")
    application = Application()
    application.databases.settings.override(DatabaseSettings(_env_file=None, connections={"main": {"url": sqlite_url}}))
    application.wire(modules=["harness.findings"])
    try:
        assert find(cast("DatabaseContainer", application.databases), ["harness.findings"]) == []
    finally:
        application.unwire()
        application.databases.shutdown_resources()
