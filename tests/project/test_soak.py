"""A tenth of each program of `make soak`, in `make test-all`; and the runner says truly how they ended."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import soak
from soak import PROGRAMS, Program, environment


@pytest.mark.soak
@pytest.mark.timeout(600)
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.name)
def test_a_tenth_of_a_soak_program_finds_nothing_wrong(program: Program, postgres: object) -> None:
    """`postgres` is asked for only so that this is skipped where PostgreSQL is missing."""
    done = subprocess.run(
        program.command(tenth=True), env=environment(), capture_output=True, text=True, timeout=570, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(("ends_with", "status", "said"), [(0, 0, "==== all passed"), (3, 1, "==== FAILED: program")])
def test_a_soak_fails_when_a_program_does(  # noqa: PLR0917  # pytest gives them by name
    ends_with: int,
    status: int,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "program.py").write_text(f"import sys; print(sys.argv[1:], flush=True); sys.exit({ends_with})")
    monkeypatch.setattr(soak, "TESTS", tmp_path)
    monkeypatch.setattr(soak, "PROGRAMS", [Program("program", "--times", 40)])
    assert soak.main(["--tenth"]) == status
    printed = capfd.readouterr().out.splitlines()
    assert printed[:2] == ["==== python tests/program.py --times 4", "['--times', '4']"]
    assert printed[-1] == said


@pytest.mark.exhaustive
def test_every_program_of_a_soak_is_there() -> None:
    for program in PROGRAMS:
        subprocess.run([sys.executable, program.command()[1], "--help"], env=environment(), capture_output=True, check=True)
