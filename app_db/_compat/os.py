"""Functions to call in forked children. Python on Windows has no `os.register_at_fork`."""

from __future__ import annotations

import os
from collections.abc import Callable


def after_fork_in_child(function: Callable[[], object]) -> None:
    """Call `function` in every child that this process forks. Do nothing where processes can't fork."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=function)
