"""A real Redis for the tests: a broker for Celery, taskiq, arq, Dramatiq and FastStream. It is gone when the tests are."""

from __future__ import annotations

import shutil
import socket
import subprocess
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from harness.servers import ServerFailed, free_port, guarded, quick_tempdir, redis_program


class RedisServer:
    """A Redis server that keeps nothing on a disk. Databases 0 to 15 are there from the beginning."""

    def __init__(self) -> None:
        self.port = free_port()
        self._directory = Path(tempfile.mkdtemp(prefix="app_db-redis-", dir=quick_tempdir()))
        log = self._directory / "log"
        options = {"port": self.port, "bind": "127.0.0.1", "save": "", "appendonly": "no", "dir": self._directory, "logfile": log}
        arguments = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
        self._process = subprocess.Popen(
            [redis_program(), *arguments], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self._guard = guarded(self._process.pid, self._directory)
        try:
            self._wait_until_it_answers(log)
        except BaseException:
            self.close()
            raise

    def url(self, database: int = 0) -> str:
        """Return the URL of one of the databases."""
        return f"redis://127.0.0.1:{self.port}/{database}"

    def close(self) -> None:
        """End the server."""
        with suppress(BrokenPipeError):
            self._guard.communicate(b"done\n")
        self._process.kill()
        self._process.wait()
        shutil.rmtree(self._directory, ignore_errors=True)

    def ask(self, *words: str) -> bytes:
        """Send a command, and return the beginning of what the server answers."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=5) as connection:
            connection.sendall(f"*{len(words)}\r\n".encode() + b"".join(f"${len(w)}\r\n{w}\r\n".encode() for w in words))
            return connection.recv(4096)

    def flush(self) -> None:
        """Delete everything in all databases."""
        self.ask("FLUSHALL")

    def _wait_until_it_answers(self, log: Path) -> None:
        give_up = time.monotonic() + 15
        while time.monotonic() < give_up and self._process.poll() is None:
            try:
                if self.ask("PING").startswith(b"+PONG"):
                    return
            except OSError:
                time.sleep(0.02)
        raise ServerFailed(f"Redis does not answer: {log.read_text()[-2000:] if log.exists() else ''}")
