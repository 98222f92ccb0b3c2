"""dependency-injector's own tests of containers and wiring pass on DatabaseContainer, but for what a table in the docs names.

They are in its source distribution, which pip fetches: that takes half a minute. Each test runs twice, with DeclarativeContainer
and with DatabaseContainer as the base. What fails on both, for want of a package, says nothing.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path

import pytest

from harness.paths import ROOT

DIFFERENCES = {
    "`providers` and `traverse()` list app_db's own providers, too": """
        cls/test_main_py2_py3.py::test_inherited_providers_attribute
        cls/test_main_py2_py3.py::test_providers_attribute
        cls/test_main_py2_py3.py::test_providers_attribute_with_redefinition
        cls/test_main_py2_py3.py::test_set_get_del_providers
        instance/test_main_py2_py3.py::test_set_get_del_providers
        instance/test_self_py2_py3.py::test_providers_attribute_1
        instance/test_self_py2_py3.py::test_providers_attribute_2
        test_traversal_py3.py::test_container_cls_nested_providers
        test_traversal_py3.py::test_container_cls_nested_providers_with_filtering
        test_traversal_py3.py::test_nested_providers
        test_traversal_py3.py::test_nested_providers_with_filtering
        """,
    "`provider_type` can't be narrower than app_db's own providers": """
        cls/test_main_py2_py3.py::test_declare_with_valid_provider_type
        cls/test_main_py2_py3.py::test_set_invalid_provider_type
        cls/test_main_py2_py3.py::test_seth_valid_provider_type
        """,
    "`reset_last_overriding()` wants every provider to be overridden": """
        cls/test_main_py2_py3.py::test_reset_last_overriding
        """,
}
"""Why tests fail, and which, in tests/unit/containers/. None of tests/unit/wiring/ does."""

PLUGIN = """
import json, os
from dependency_injector import containers

if os.environ["BASE"] == "DatabaseContainer":
    from app_db import DatabaseContainer
    containers.DeclarativeContainer = DatabaseContainer

passed = []

def pytest_runtest_logreport(report):
    if report.when == "call" and report.passed:
        passed.append(report.nodeid)

def pytest_sessionfinish():
    with open(os.environ["PASSED"], "w") as file:
        json.dump(passed, file)
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked source distribution of the dependency-injector that is installed here."""
    place = tmp_path_factory.mktemp("dependency-injector")
    download = f"download dependency-injector=={version('dependency-injector')} --no-deps --no-binary dependency-injector".split()
    try:
        subprocess.run(
            [sys.executable, "-m", "pip", "--quiet", "--retries=0", *download],
            cwd=place,
            check=True,
            capture_output=True,
            timeout=200,
        )
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired):
        pytest.skip(f"dependency-injector's own tests are not to be had here: `pip {' '.join(download)}` must work")
    (archive,) = place.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        opened.extractall(place, filter="data")
    (unpacked,) = (path for path in place.iterdir() if path.is_dir())
    (unpacked / "base_of_tests.py").write_text(PLUGIN)
    return unpacked


def passed_on(base: str, source: Path) -> set[str]:
    """Which tests pass on a base class."""
    places = "tests/unit/containers", "tests/unit/wiring"
    plugins = [f"-pno:{name}" for name in ("app_db", "cacheprovider", "randomly", "xdist")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(source), str(ROOT)]),
        "BASE": base,
        "PASSED": str(source / base),
        "APP_DB_CONNECTIONS__WRITER__URL": "sqlite://",  # `init_resources()` reads the settings
    }
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-pbase_of_tests", *plugins, "--continue-on-collection-errors", *places],
        cwd=source,
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert (source / base).exists(), run.stdout + run.stderr
    return set(json.loads((source / base).read_text()))


@pytest.mark.exhaustive
@pytest.mark.timeout(420)
def test_only_what_the_docs_name_differs(source: Path) -> None:
    expected = {f"tests/unit/containers/{test}" for tests in DIFFERENCES.values() for test in tests.split()}
    declarative = passed_on("DeclarativeContainer", source)
    assert len(declarative) > 100
    assert declarative - passed_on("DatabaseContainer", source) == expected & declarative


def test_the_docs_name_them() -> None:
    page = (ROOT / "docs" / "container.md").read_text()
    assert [difference for difference in DIFFERENCES if difference not in page] == []
