"""The marks that decide what `make test` runs, and what only `make test-all` does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from harness.paths import PYTHONPATH, ROOT, TESTS

CASES = """
import pytest

@pytest.mark.representative("sqlite-1", "postgresql-*")
@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("name", ["sqlite", "postgresql", "mariadb"])
def test_matrix(name, number): ...

@pytest.mark.exhaustive
def test_long(): ...

@pytest.mark.soak
def test_tenth(): ...

def test_short(): ...
"""

CHOSEN = ["test_matrix[sqlite-1]", "test_matrix[postgresql-1]", "test_matrix[postgresql-2]", "test_short"]


def collected(directory: Path, source: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run pytest with the project's configuration of marks on a file of tests, without running these."""
    (directory / "test_it.py").write_text(source)
    (directory / "conftest.py").write_text((TESTS / "conftest.py").read_text())
    (directory / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", "--rootdir", str(directory)]
    return subprocess.run(
        [*command, "test_it.py", *arguments],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": PYTHONPATH},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("arguments", "count"),
    [
        ((), 4),
        *(
            pytest.param(*each, marks=pytest.mark.exhaustive)
            for each in ((("-m", ""), 9), (("-m", "exhaustive"), 4), (("-m", "soak"), 1))
        ),
    ],
)
def test_a_plain_pytest_runs_the_representatives_and_an_empty_expression_all(
    arguments: tuple[str, ...], count: int, tmp_path: Path
) -> None:
    done = collected(tmp_path, CASES, *arguments)
    found = [line.partition("::")[2] for line in done.stdout.splitlines() if "::" in line]
    assert len(found) == count, done.stdout + done.stderr
    assert arguments or sorted(found) == sorted(CHOSEN)


@pytest.mark.exhaustive
def test_a_representative_that_is_no_case_is_an_error(tmp_path: Path) -> None:
    done = collected(tmp_path, CASES.replace('"sqlite-1"', '"sqlite-3"'))
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "test_it.py::test_matrix has no case 'sqlite-3'" in done.stderr
