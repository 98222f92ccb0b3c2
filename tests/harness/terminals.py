"""A terminal: what a program shows a reader.

with Terminal(columns=100) as terminal:
    terminal.type("SELECT 1;\\n")
    subprocess.run(program, stdin=terminal.slave, stdout=terminal.slave, stderr=terminal.slave)
    print(terminal.read())
"""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import termios
import threading
from dataclasses import dataclass
from typing import Self

_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[=>]|\x1b\][^\x07]*\x07")


@dataclass(frozen=True)
class Screen:
    """What a command has shown, and its exit code."""

    code: int
    raw: str

    @property
    def text(self) -> str:
        """Without colours and spaces at the ends of lines."""
        plain = _CONTROL.sub("", self.raw).replace("\r\n", "\n")
        return "\n".join(line.rstrip() for line in plain.split("\n")).strip("\n")

    @property
    def is_coloured(self) -> bool:
        return re.search(r"\x1b\[(3\d|9\d|1;3\d)", self.raw) is not None


class Terminal:
    """A pseudo terminal. What is shown on it is read all the time, so that no program has to wait."""

    def __init__(self, columns: int = 100) -> None:
        self._master, self.slave = pty.openpty()
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
        self.path = os.ttyname(self.slave)
        self._shown = b""
        self._reader = threading.Thread(target=self._read_on, daemon=True)
        self._reader.start()

    def type(self, text: str) -> None:
        """Type on its keyboard. "\\x04" is Ctrl-D, "\\x03" is Ctrl-C."""
        os.write(self._master, text.encode())

    def read(self) -> str:
        """Return all that was shown, and close it."""
        self._close_slave()
        self._reader.join(10)
        return self._shown.decode(errors="replace")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._close_slave()
        self._reader.join(10)
        os.close(self._master)

    def _close_slave(self) -> None:
        if self.slave >= 0:
            os.close(self.slave)
            self.slave = -1

    def _read_on(self) -> None:
        while True:
            try:
                self._shown += os.read(self._master, 65536)
            except OSError:  # all programs have closed the other end
                return
