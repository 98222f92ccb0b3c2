"""PyMySQL's `query()` in two halves: PyMySQL has no public way to send a statement without waiting for the answer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, TypeGuard

if TYPE_CHECKING:
    from socket import socket


class Connection(Protocol):
    """The private names of PyMySQL's connection that are used here, and a public one."""

    open: bool
    _sock: socket
    _read_timeout: float | None

    def _execute_command(self, command: int, sql: str) -> None: ...
    def _read_query_result(self) -> None: ...
    def _force_close(self) -> None: ...


def is_pymysql(driver_connection: object) -> TypeGuard[Connection]:
    """Return whether a connection is PyMySQL's."""
    return any(base.__module__.startswith("pymysql.") for base in type(driver_connection).__mro__)


def send(connection: Connection, statement: str) -> None:
    """Send a statement, and don't wait for the answer."""
    from pymysql.constants import COMMAND

    connection._execute_command(COMMAND.COM_QUERY, statement)


def receive(connection: Connection) -> None:
    """Read the answer to the statement that was sent. Wait if a part of it is missing."""
    connection._read_query_result()


def descriptor_of(connection: Connection) -> int:
    """Return the file descriptor of the connection's socket."""
    return connection._sock.fileno()


def has_decrypted(connection: Connection) -> bool:
    """Return whether TLS holds decrypted bytes. The file descriptor is not ready for these."""
    pending = getattr(connection._sock, "pending", None)
    return pending is not None and pending() > 0


def read_timeout_of(connection: Connection) -> float | None:
    """Return the seconds after which the connection stops waiting for an answer."""
    return connection._read_timeout


def set_read_timeout(connection: Connection, seconds: float | None) -> None:
    """Set after how many seconds the connection stops waiting for an answer. Publicly that is possible only when connecting."""
    connection._read_timeout = seconds


def close_at_once(connection: Connection) -> None:
    """Close the connection, and send nothing to the server."""
    connection._force_close()
