"""Dependencies between the rooms of app_db point downward, and the house stands on five libraries.

Every import counts: those inside functions, under TYPE_CHECKING and by importlib with a constant name too.
"""

from __future__ import annotations

import ast
import configparser
import re
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "app_db"
PLUGIN = ROOT / "pytest_app_db.py"

LAYERS = {
    "errors": 0,
    "urls": 0,
    "forks": 0,
    "sources": 1,
    "connection_settings": 1,
    "settings": 1,
    "statements": 0,
    "xids": 0,
    "lines": 0,
    "outlasting": 0,
    "preparing": 1,
    "decision_places": 1,
    "dialects": 1,
    "psycopg_cursors": 0,
    "models": 1,
    "decisions": 1,
    "decision_file": 1,
    "decision_table": 1,
    "manager": 1,
    "liveness": 0,
    "interruptions": 0,
    "blocks": 3,
    "engines": 1,
    "aio": 2,
    "awaited_lines": 1,
    "hooks": 2,
    "branches": 2,
    "overlays": 2,
    "stand_ins": 2,
    "watching": 2,
    "commits": 2,
    "coordinator": 2,
    "idle_sessions": 1,
    "sessions": 2,
    "async_sessions": 2,
    "options": 3,
    "units": 3,
    "parts": 3,
    "transactions": 3,
    "health": 3,
    "routes": 2,
    "routing": 3,
    "borrowing": 3,
    "async_routing": 3,
    "recovery": 3,
    "reflection": 3,
    "schema": 3,
    "bootstrapping": 3,
    "checks": 3,
    "engine_providers": 3,
    "container": 4,
    "overrides": 5,
    "row_counts": 5,
    "throw_away": 5,
    "worker_databases": 5,
    "testing": 5,
    "turns": 1,
    "shared_kinds": 1,
    "sharing": 2,
    "shared_engines": 2,
    "isolation": 3,
    "cli": 5,
    "__main__": 5,
    "integrations": 5,
}

CONTENTS = "app_db"
"""The root. It lists names of the layers below TOP, and only TOP's rooms may read the list."""

TOP = 5

SIDEWAYS = {
    ("coordinator", "branches"): "the coordinator orders and ends the branches",
    ("preparing", "awaited_lines"): "coroutines' branches are prepared on lines that are awaited",
    ("coordinator", "commits"): "how the branches commit is a chapter of its own",
    ("coordinator", "overlays"): "sessions without a branch end with the unit, too",
    ("commits", "overlays"): "they are flushed like the branches",
    ("overlays", "branches"): "they wait for threads, and off the loop, as branches do",
    ("borrowing", "routing"): "a session that borrows is one that finds its database where there is only one",
    ("async_routing", "routing"): "a session of coroutines is one of threads, awaited",
    ("commits", "branches"): "it is branches that commit",
    ("decision_file", "decisions"): "a file is one way to keep decisions",
    ("decision_places", "decision_file"): "the configured log may be a file",
    ("decision_table", "decisions"): "a table is one way to keep decisions",
    ("decision_places", "decision_table"): "most logs are tables",
    ("decision_places", "decisions"): "what is at the places are logs of decisions",
    ("decision_places", "engines"): "a place may be a database that the application has no connection to",
    ("decision_places", "settings"): "which places there are is a setting",
    ("shared_engines", "sharing"): "what their connections share is a room of its own",
    ("sessions", "branches"): "a session is a branch of its unit",
    ("watching", "branches"): "it is branches that allow what is executed",
    ("sessions", "watching"): "a session's engine is watched once it is used",
    ("transactions", "units"): "a transaction gives the unit that it begins",
    ("transactions", "options"): "it is made with what is asked of the unit",
    ("transactions", "parts"): "it plays a part in a unit of work",
    ("transactions", "blocks"): "it is a block",
    ("blocks", "options"): "a block is made with what is asked of the unit",
    ("blocks", "parts"): "it plays a part in a unit of work",
    ("blocks", "units"): "a block is given its unit",
    ("parts", "options"): "which part a block plays is an option",
    ("parts", "units"): "a block is given its unit",
    ("settings", "connection_settings"): "they are those of every connection, checked as a whole",
    ("connection_settings", "sources"): "what is wrong is told by the names that the sources gave",
    ("models", "connection_settings"): "a model knows its connection by the name the settings give it",
    ("stand_ins", "branches"): "what stands for a session is a branch of its unit",
    ("stand_ins", "coordinator"): "it joins the unit's coordinator",
    ("sessions", "stand_ins"): "a session goes on with what was begun in its stead",
    ("settings", "sources"): "settings are made of what their sources gave",
    ("engines", "settings"): "an engine is made from settings",
    ("engines", "dialects"): "an engine is tuned for its kind of database",
    ("dialects", "settings"): "how a kind of database is tuned is a setting",
    ("schema", "reflection"): "it knows the connections of a container, and what is reflected is not ours to make",
    ("bootstrapping", "reflection"): "it knows the connections of a container",
    ("bootstrapping", "schema"): "what is filled has to be made first",
    ("decisions", "settings"): "where decisions go is a setting",
    ("async_sessions", "sessions"): "a session of coroutines is one of threads, awaited",
    ("async_sessions", "coordinator"): "it belongs to the same unit",
    ("sessions", "coordinator"): "a session joins the unit's coordinator",
    ("urls", "errors"): "without a library that coroutines need, nothing can be told but an error",
    ("coordinator", "hooks"): "the work of a unit holds the hooks that follow it",
    ("testing", "overrides"): "what tests switch is overridden in one way",
    ("testing", "throw_away"): "throw-away databases are a switch of testing",
    ("throw_away", "overrides"): "they are other settings for a while",
    ("testing", "worker_databases"): "databases of a worker's own are a switch of testing",
    ("worker_databases", "overrides"): "they are other settings for a while",
    ("testing", "row_counts"): "what a test has left is found by counting",
    ("row_counts", "overrides"): "which connections there are is told there",
    ("cli", "testing"): "the command line shows what testing can do",
    ("__main__", "cli"): "python -m app_db is the command line",
}

NO_ROOMS = {"utils", "util", "helpers", "helper", "common", "misc", "tools"}

FOUNDATIONS = {
    "dependency_injector": "a dependency",
    "pydantic": "comes with pydantic-settings, which takes its models and types",
    "pydantic_settings": "a dependency",
    "sqlalchemy": "a dependency",
    "transaction": "a dependency",
    "zope.interface": "comes with transaction, whose interfaces are written in it",
    "zope.sqlalchemy": "a dependency",
}

ON_DEMAND = {
    "aiosqlite": "an extra: asked for when a connection uses it",
    "anyio": "used where the application has it running",
    "asyncpg": "an extra: asked for when a connection uses it",
    "greenlet": "an extra: asked for by async code",
    "psycopg": "an extra: asked for when a connection uses it",
    "pymysql": "an extra: asked for when a connection uses it",
    "typing_extensions": "for type checkers only",
}
"""What may be imported inside a function, under TYPE_CHECKING or in a `try`, and never by importing app_db."""

ABOUT_ONE_DRIVER = {"psycopg_cursors": "psycopg"}
"""Rooms that import a driver, and are themselves imported on demand, where that driver is used."""

EDGES = {"integrations", "testing", "cli", "__main__"}
"""Rooms that meet a framework, a test runner or a terminal: those may import it."""


@dataclass(frozen=True)
class Import:
    importer: str
    target: str
    line: int
    names: tuple[str, ...]
    on_demand: bool

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.target}"


def module_name(path: Path, package: Path = PACKAGE) -> str:
    if package not in path.parents:
        return path.stem
    parts = (package.name, *path.relative_to(package).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path, package: Path = PACKAGE) -> Iterator[Import]:
    importer = module_name(path, package)
    parent = importer if path.name == "__init__.py" else importer.rpartition(".")[0]
    tree = ast.parse(path.read_text(), str(path))
    deferred = set(_deferred(tree))
    for node in ast.walk(tree):
        line, on_demand = getattr(node, "lineno", 0), id(node) in deferred
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(importer, alias.name, line, (), on_demand)
        elif isinstance(node, ast.ImportFrom):
            above = parent.rsplit(".", node.level - 1)[0] if node.level > 1 else parent
            base = ".".join(filter(None, [above if node.level else "", node.module]))
            names = tuple(alias.name for alias in node.names)
            modules = [name for name in names if _is_module(f"{base}.{name}", package)]
            for name in modules:
                yield Import(importer, f"{base}.{name}", line, (), on_demand)
            if len(modules) < len(names):
                yield Import(importer, base, line, tuple(name for name in names if name not in modules), on_demand)
        elif isinstance(node, ast.Call) and (name := _dynamic(node)):
            yield Import(importer, name if not name.startswith(".") else parent + name, line, (), on_demand)


def _deferred(tree: ast.AST) -> Iterator[int]:
    """The nodes that don't run when the module is imported, or may fail then."""
    for node in ast.walk(tree):
        lazy = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda | ast.Try)
        typing_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if lazy or typing_only:
            yield from map(id, ast.walk(node))


def _dynamic(call: ast.Call) -> str:
    function = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    constant = call.args[0].value if call.args and isinstance(call.args[0], ast.Constant) else None
    return constant if function in {"import_module", "__import__"} and isinstance(constant, str) else ""


def _is_module(name: str, package: Path) -> bool:
    if name.partition(".")[0] != package.name:
        return False
    path = package.joinpath(*name.split(".")[1:])
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists() or path.is_dir()


def room_of(module: str) -> str:
    """The room a module is in: its first name below the package, or the package itself."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else CONTENTS


def wrong_way(found: Import) -> str:
    """What is wrong with an import of one room by another; empty if nothing is."""
    importer, target = room_of(found.importer), room_of(found.target)
    if importer == target or (importer, target) in SIDEWAYS:
        return ""
    if importer == CONTENTS:
        return "" if LAYERS[target] < TOP else f"{found}: the root lists nothing of the top layer"
    if target == CONTENTS:
        return "" if LAYERS[importer] == TOP else f"{found}: only the top layer reads the root"
    here, there = LAYERS[importer], LAYERS[target]
    if here > there:
        return ""
    return f"{found}: {'sideways' if here == there else 'upward'}, from layer {here} to layer {there}"


def sources(package: Path = PACKAGE) -> list[Path]:
    return sorted(package.rglob("*.py"))


def all_imports() -> list[Import]:
    return [found for path in sources() for found in imports_of(path)]


def inner_imports() -> list[Import]:
    return [found for found in all_imports() if found.target.partition(".")[0] == PACKAGE.name]


def test_every_room_has_its_layer() -> None:
    rooms = {room_of(module_name(path)) for path in sources()} - {CONTENTS}
    assert rooms <= set(LAYERS), "a new room needs a layer in this file, and a line in the design"


def test_no_arrow_goes_up_or_sideways() -> None:
    known = [found for found in inner_imports() if {room_of(found.importer), room_of(found.target)} <= {*LAYERS, CONTENTS}]
    assert [problem for found in known if (problem := wrong_way(found))] == []


def test_no_import_goes_in_a_circle() -> None:
    arrows: dict[str, set[str]] = {}
    for found in inner_imports():
        # A package runs its __init__ before its modules; that is no arrow anybody has drawn.
        if found.target != found.importer and not found.importer.startswith(found.target + "."):
            arrows.setdefault(found.importer, set()).add(found.target)
    assert circle_in(arrows) == []


def circle_in(arrows: dict[str, set[str]]) -> list[str]:
    """The first circle found, as the names on it; empty if there is none."""
    done: set[str] = set()

    def visit(name: str, trail: list[str]) -> list[str]:
        if name in trail:
            return [*trail[trail.index(name) :], name]
        if name in done:
            return []
        for target in sorted(arrows.get(name, ())):
            if circle := visit(target, [*trail, name]):
                return circle
        done.add(name)
        return []

    return next((circle for name in sorted(arrows) if (circle := visit(name, []))), [])


def test_no_room_is_a_lumber_room() -> None:
    assert [path for path in PACKAGE.rglob("*") if path.stem.strip("_") in NO_ROOMS] == []


def test_the_core_stands_on_its_five_dependencies_and_the_standard_library() -> None:
    strangers = []
    for found in all_imports():
        top = found.target.partition(".")[0]
        name = ".".join(found.target.split(".")[:2]) if top == "zope" else top
        known = top in sys.stdlib_module_names or top == PACKAGE.name or name in FOUNDATIONS
        room = room_of(found.importer)
        if not known and not (found.on_demand and top in ON_DEMAND) and room not in EDGES and ABOUT_ONE_DRIVER.get(room) != top:
            strangers.append(str(found))
    assert strangers == []


def test_what_is_about_one_driver_is_imported_on_demand() -> None:
    found = [found for found in inner_imports() if room_of(found.target) in ABOUT_ONE_DRIVER]
    assert {room_of(found.target) for found in found} == set(ABOUT_ONE_DRIVER)
    assert [str(eager) for eager in found if not eager.on_demand] == []


def test_the_root_imports_nothing_but_app_db() -> None:
    root = [found for found in all_imports() if found.importer == CONTENTS and found.target != "__future__"]
    assert [str(found) for found in root if found.target.partition(".")[0] != PACKAGE.name] == []


def test_integrations_use_public_names_only() -> None:
    private = [
        f"{found}: {name}"
        for found in inner_imports()
        if room_of(found.importer) == "integrations" and room_of(found.target) != "integrations"
        for name in (*found.target.split("."), *found.names)
        if name.startswith("_")
    ]
    assert private == []


def test_the_plugin_of_pytest_stands_beside_the_package_and_uses_public_names_on_demand() -> None:
    found = [found for found in imports_of(PLUGIN) if found.target.partition(".")[0] not in {*sys.stdlib_module_names, "pytest"}]
    assert [str(eager) for eager in found if not eager.on_demand] == []
    assert {found.target.partition(".")[0] for found in found} == {"app_db", "sqlalchemy"}
    names = {(found.target, name) for found in found if found.target.startswith(PACKAGE.name) for name in found.names}
    public = {module: import_module(module) for module in ("app_db", "app_db.errors", "app_db.testing")}
    assert [f"{module}.{name}" for module, name in sorted(names) if name not in _listed(public[module])] == []


def _listed(module: ModuleType) -> list[str]:
    listed: list[str] = getattr(module, "__all__", None) or [name for name in vars(module) if not name.startswith("_")]
    return listed


# ---- the check itself can fail ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("importer", "source", "problem"),
    [
        ("errors", "from app_db.settings import DatabaseSettings", "upward, from layer 0 to layer 1"),
        ("engines", "def f():\n    from .container import DatabaseContainer", "upward, from layer 1 to layer 4"),
        ("engines", "if TYPE_CHECKING:\n    from app_db import coordinator", "upward, from layer 1 to layer 2"),
        ("engines", "importlib.import_module('app_db.recovery')", "upward, from layer 1 to layer 3"),
        ("manager", "import app_db.decisions", "sideways, from layer 1 to layer 1"),
        ("settings", "from . import engines", "sideways, from layer 1 to layer 1"),
        ("container", "from app_db import Connection", "only the top layer reads the root"),
        ("__init__", "from app_db.cli import main", "the root lists nothing of the top layer"),
        ("engines", "from .settings import ConnectionSettings", ""),
        ("sessions", "from app_db.coordinator import Coordinator\nfrom app_db.manager import x", ""),
        ("cli", "from app_db import DatabaseContainer", ""),
    ],
)
def test_a_wrong_arrow_is_noticed(tmp_path: Path, importer: str, source: str, problem: str) -> None:
    package = tmp_path / "app_db"
    package.mkdir()
    for room in (*LAYERS, "__init__"):
        (package / f"{room}.py").touch()
    path = package / f"{importer}.py"
    path.write_text(source)
    found = [
        problem for found in imports_of(path, package) if found.target.startswith("app_db") and (problem := wrong_way(found))
    ]
    assert (found != []) is bool(problem)
    assert all(problem in line for line in found)


def test_a_circle_is_noticed() -> None:
    assert circle_in({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle_in({"a": {"b", "c"}, "b": {"c"}}) == []


# ---- what is declared is what is meant ----------------------------------------------------------------------------------


def test_the_declared_dependencies_are_the_five() -> None:
    declared = {_distribution(line) for line in _project()["dependencies"]}
    assert declared == {"dependency-injector", "sqlalchemy", "zope-sqlalchemy", "transaction", "pydantic-settings"}


def test_the_lowest_versions_are_tested() -> None:
    """The pins of tox.ini's lowest environment are the lower bounds of pyproject.toml, extras included."""
    project = _project()
    lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    bounds = {_distribution(line): line.partition(">=")[2] for line in lines}
    tox = configparser.ConfigParser(interpolation=None)
    tox.read(ROOT / "tox.ini")
    pins = [line.partition("==") for line in tox["testenv:py311-lowest"]["deps"].split()]
    pinned = {_distribution(name): version for name, _, version in pins}
    assert {name: pinned.get(name) for name in bounds} == bounds


def _project() -> dict[str, dict[str, list[str]]]:
    project: dict[str, dict[str, list[str]]] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return project


def _distribution(requirement: str) -> str:
    return re.sub(r"[-_.]+", "-", re.split(r"[\[<>=!~; ]", requirement, maxsplit=1)[0]).lower()
