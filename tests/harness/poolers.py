"""PgBouncer before a PostgreSQL server of the tests."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psycopg

from harness.servers import (
    PASSWORD,
    USER,
    PostgresServer,
    ServerFailed,
    pgbouncer_program,
    quick_tempdir,
    unprivileged,
)


class PgBouncer:
    """A pooler that gives out at most `size` connections to each database of a server."""

    def __init__(
        self, server: PostgresServer, mode: str = "transaction", size: int = 2, *, tls: tuple[Path, Path] | None = None
    ) -> None:
        """`tls` are the files of a key and a certificate: clients may use TLS then."""
        program = pgbouncer_program()
        self.server = server
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = int(free.getsockname()[1])
        owner = unprivileged()
        self.directory = Path(tempfile.mkdtemp(prefix="app_db-pgbouncer-", dir=quick_tempdir(owner)))
        (self.directory / "users.txt").write_text(f'"{USER}" "{PASSWORD}"\n')
        (self.directory / "pgbouncer.ini").write_text(
            f"[databases]\n* = host={server.host} port={server.port}\n"
            f"[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {self.port}\nauth_type = scram-sha-256\n"
            f"auth_file = {self.directory}/users.txt\npool_mode = {mode}\ndefault_pool_size = {size}\nmax_client_conn = 500\n"
            f"admin_users = {USER}\nunix_socket_dir =\nlogfile = {self.directory}/log\nserver_idle_timeout = 600\n"
            + (
                ""
                if tls is None
                else f"client_tls_sslmode = allow\nclient_tls_key_file = {tls[0]}\nclient_tls_cert_file = {tls[1]}\n"
            )
        )
        if owner is not None:
            for path in (self.directory, *self.directory.iterdir()):
                os.chown(path, owner.pw_uid, owner.pw_gid)
        identity = {} if owner is None else {"user": owner.pw_uid, "group": owner.pw_gid, "extra_groups": []}
        self._process = subprocess.Popen(
            [program, "-q", self.directory / "pgbouncer.ini"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            **identity,  # type: ignore[call-overload]  # of Popen's many overloads
        )
        self._wait_until_it_answers()

    def url(self, database: str, driver: str = "postgresql+psycopg") -> str:
        """Return the URL of a database by way of the pooler."""
        direct = self.server.url(database, driver=driver)
        return direct.replace(f":{self.server.port}/", f":{self.port}/")

    def close(self) -> None:
        """End the pooler and delete its files."""
        self._process.kill()
        self._process.wait()
        shutil.rmtree(self.directory, ignore_errors=True)

    @contextmanager
    def plain(self, database: str) -> Iterator[psycopg.Connection]:
        """Give a connection of another program, which does not know app_db."""
        with psycopg.connect(
            host="127.0.0.1", port=self.port, user=USER, password=PASSWORD, dbname=database, prepare_threshold=None
        ) as connection:
            yield connection

    def _wait_until_it_answers(self) -> None:
        give_up = time.monotonic() + 15
        while time.monotonic() < give_up and self._process.poll() is None:
            with suppress(psycopg.Error), self.plain("postgres") as connection:
                connection.execute("SELECT 1")
                return
            time.sleep(0.05)
        log = self.directory / "log"
        said = log.read_text() if log.exists() else ""
        self.close()
        raise ServerFailed(f"PgBouncer does not answer: {said[-2000:]}")
