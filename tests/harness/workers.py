"""Real workers of task queues: processes that take tasks from a real broker."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from sqlalchemy import text

from harness.applications import Application
from harness.paths import PYTHONPATH
from harness.servers import guarded

SLOW_COMMIT = (
    """
    CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql AS
    $$ BEGIN IF starts_with(NEW.name, 'slow') THEN PERFORM pg_advisory_xact_lock(1); END IF; RETURN NULL; END $$
    """,
    "CREATE CONSTRAINT TRIGGER wait AFTER INSERT ON items DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION wait()",
)
"""On PostgreSQL: the COMMIT of an item whose name begins with "slow" waits for an advisory lock."""


@contextmanager
def commits_that_wait(app: Application) -> Iterator[None]:
    """Let the COMMIT of an item "slow…" wait until the block ends."""
    with app.plain_engine().connect() as connection:
        connection.execute(text("SELECT pg_advisory_lock(1)"))
        yield


class Worker:
    """A process and its log. It runs in a session of its own, so that the processes it starts end with it."""

    def __init__(self, arguments: list[str], environment: Mapping[str, str], log: Path) -> None:
        self.log = log
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, *arguments],
                env={**os.environ, "PYTHONPATH": PYTHONPATH, **environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._guard = guarded(self.process.pid)

    def stop(self, how: signal.Signals = signal.SIGTERM) -> int:
        """Let the worker end what it does, and return its exit code."""
        self.process.send_signal(how)
        return self.process.wait(30)

    def close(self) -> None:
        """Kill what is left of the worker."""
        with suppress(BrokenPipeError):
            self._guard.communicate(b"done\n")
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def said(self) -> str:
        return self.log.read_text()


@contextmanager
def working(arguments: list[str], environment: Mapping[str, str], log: Path) -> Iterator[Worker]:
    """Run a worker for the length of the block. If the block fails, say what the worker said."""
    worker = Worker(arguments, environment, log)
    try:
        yield worker
    except BaseException as error:
        error.add_note(f"The worker said:\n{worker.said()[-5000:]}")
        raise
    finally:
        worker.close()
