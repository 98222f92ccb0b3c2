"""Modules that are being imported. Python has no public way to ask for them."""

from __future__ import annotations

import sys
from itertools import accumulate


def is_being_imported(module: str) -> bool:
    """Return whether the code of a module, or of a package around it, has begun to run and has not ended."""
    packages = accumulate(module.split("."), "{}.{}".format)
    specs = [getattr(sys.modules.get(name), "__spec__", None) for name in packages]
    return any(getattr(spec, "_initializing", False) for spec in specs)
