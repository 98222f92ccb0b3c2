"""PyMySQL, whose `query()` is taken apart into its two halves: nothing else sends a statement without waiting for its answer."""

from __future__ import annotations

from typing import Any


def send(connection: Any, statement: str) -> None:
    """Send a statement, and don't wait for the answer."""
    from pymysql.constants import COMMAND

    connection._execute_command(COMMAND.COM_QUERY, statement)


def receive(connection: Any) -> None:
    """Read the answer to the statement that was sent; wait for what is missing of it."""
    connection._read_query_result()


def descriptor_of(connection: Any) -> int:
    """Return the file descriptor of the connection's socket."""
    number: int = connection._sock.fileno()
    return number


def has_decrypted(connection: Any) -> bool:
    """Return whether TLS holds decrypted bytes back, of which the descriptor tells nothing."""
    pending = getattr(connection._sock, "pending", None)
    return pending is not None and pending() > 0


def read_timeout_of(connection: Any) -> float | None:
    """Return the seconds after which the connection stops waiting for an answer."""
    seconds: float | None = connection._read_timeout
    return seconds


def close_at_once(connection: Any) -> None:
    """Close the connection without a word to the server."""
    connection._force_close()
