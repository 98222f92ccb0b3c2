"""Where the project and its tests are, for tests that read files or start programs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Container
from pathlib import Path

TESTS = Path(__file__).parents[1]
ROOT = TESTS.parent
PYTHONPATH = os.pathsep.join([str(ROOT), str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
"""What a process needs to find app_db and the harness: `python -m harness.NAME` then runs one of its programs."""


def run_python(*arguments: str, within: tuple[str, ...] = (), codes: Container[int] = (0,)) -> subprocess.CompletedProcess[str]:
    """Run Python in a process of its own, which the command `within` starts, and see that it ends with one of these codes."""
    done = subprocess.run(
        [*within, sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": PYTHONPATH},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode in codes, done.stdout + done.stderr
    return done
