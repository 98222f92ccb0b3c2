"""What app_db knows of the interpreter's frames that other interpreters need not have."""

from __future__ import annotations

import sys

from app_db._compat.frames import frame_at


def test_the_frame_of_a_caller_is_found() -> None:
    """Without `sys._getframe`, a block could not tell an ExitStack that enters it from a `with` statement."""

    def called() -> object:
        return frame_at(1).f_code

    assert called() is sys._getframe().f_code
