"""What a forked child does before anything else.

Windows has no fork, and its Python no `os.register_at_fork`.
"""

from __future__ import annotations

import os
from collections.abc import Callable


def after_fork_in_child(function: Callable[[], object]) -> None:
    """Have `function` called in every child that this process forks; nothing happens where processes can't fork."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=function)
