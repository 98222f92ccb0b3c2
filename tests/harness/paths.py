"""Where the project and its tests are, for tests that read files or start programs."""

from __future__ import annotations

import os
from pathlib import Path

TESTS = Path(__file__).parents[1]
ROOT = TESTS.parent
PYTHONPATH = os.pathsep.join([str(ROOT), str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
"""What a process needs to find app_db and the harness: `python -m harness.NAME` then runs one of its programs."""
