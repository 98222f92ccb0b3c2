"""app_db as its users get it: built as a wheel and installed elsewhere."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from harness.paths import ROOT
from harness.requiring import need


def install(place: Path) -> Path:
    """Build the wheel and install it in a directory, without what it depends on; return the one to import from."""
    need("hatchling")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    no_more = ["--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*pip, "wheel", *no_more, "--wheel-dir", place / "wheel", ROOT], check=True, timeout=110)
    (wheel,) = (place / "wheel").iterdir()
    subprocess.run([*pip, "install", *no_more[:2], "--target", place / "site", wheel], check=True, timeout=110)
    return place / "site"
