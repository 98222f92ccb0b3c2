"""What app_db knows of asyncio that asyncio does not promise. Each test says what breaks when it goes."""

from __future__ import annotations

import asyncio
import gc
import socket
import ssl
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from app_db._compat.asyncio import begin_unseen, hang_up, running_loop


def test_the_running_loop_is_known_without_an_exception_where_none_runs() -> None:
    """Each unit of work asks for it. `asyncio.get_running_loop()` raises where none runs, at five times the price."""

    async def here() -> tuple[object, object]:
        return running_loop(), await asyncio.to_thread(running_loop)

    loop = asyncio.new_event_loop()
    assert loop.run_until_complete(here()) == (loop, None)
    loop.close()
    assert running_loop() is None


def test_the_end_of_a_loop_does_not_cancel_an_unseen_task() -> None:
    """Without `_unregister_task`, Ctrl-C or the end of `asyncio.run()` would cancel a COMMIT, or a disposal, halfway."""
    ended = asyncio.Event()
    outcomes: list[str] = []

    async def work() -> None:
        try:
            await asyncio.sleep(0.05)
            outcomes.append("finished")
        except asyncio.CancelledError:
            outcomes.append("cancelled")
        finally:
            ended.set()

    async def outliving() -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            await ended.wait()  # keeps the loop running

    async def main() -> tuple[asyncio.Task[None], asyncio.Task[None]]:
        unseen, seen = begin_unseen(work()), asyncio.create_task(outliving())
        assert unseen not in asyncio.all_tasks()
        await asyncio.sleep(0)
        return unseen, seen

    unseen, _ = asyncio.run(main())
    assert unseen.done()
    assert outcomes == ["finished"]


# ---- transports ------------------------------------------------------------------------------------------------------------


class EndOfLine:
    """A server that tells when its only client has gone."""

    def __init__(self, *, encrypted: bool) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(30)
        self._context = _context(ssl.PROTOCOL_TLS_SERVER) if encrypted else None
        self.client_context = _context(ssl.PROTOCOL_TLS_CLIENT) if encrypted else None
        self.address = self._listener.getsockname()
        self.has_client = threading.Event()
        self.client_has_gone = threading.Event()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        client, _ = self._listener.accept()
        client.settimeout(30)
        if self._context is not None:
            client = self._context.wrap_socket(client, server_side=True, suppress_ragged_eofs=True)
        self.has_client.set()
        with client:
            try:
                gone = client.recv(1) == b""
            except ConnectionError:
                gone = True
        if gone:
            self.client_has_gone.set()

    def close(self) -> None:
        self._thread.join(30)  # it may not have come to accept the client yet
        self._listener.close()


def _context(protocol: int) -> ssl.SSLContext:
    """Encryption without certificates: the two ends agree on a key and don't ask who they are."""
    context = ssl.SSLContext(protocol)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers("AECDH:@SECLEVEL=0")
    return context


@pytest.fixture(params=[False, True], ids=["plain", "encrypted"])
def server(request: pytest.FixtureRequest) -> Iterator[EndOfLine]:
    server = EndOfLine(encrypted=request.param)
    yield server
    server.close()


class Protocol(asyncio.Protocol):
    """Notes that its connection is lost."""

    def __init__(self) -> None:
        self.lost = asyncio.Event()

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost.set()


async def connected(server: EndOfLine) -> tuple[asyncio.Transport, Protocol]:
    host, port = server.address
    connection = await asyncio.get_running_loop().create_connection(Protocol, host, port, ssl=server.client_context)
    assert await asyncio.to_thread(server.has_client.wait, 10)  # or its socket would appear while a test counts sockets
    return connection


def sockets() -> int:
    gc.collect()
    return sum("socket:" in str(it.readlink()) for it in Path("/proc/self/fd").iterdir() if it.is_symlink())


def test_the_socket_of_a_closed_loop_can_be_closed_without_a_complaint(server: EndOfLine) -> None:
    """Without `_sock` (and `_ssl_protocol._transport`, which has it) a pool of asyncpg or asyncmy would stay connected after
    `asyncio.run()`, until the garbage collector comes.
    """
    transport, _ = asyncio.run(connected(server))
    before = sockets()
    hang_up(transport, transport.close)
    assert sockets() < before  # those of other tests may go, too
    assert server.client_has_gone.wait(10)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        del transport
        gc.collect()
    assert caught == []


@pytest.mark.filterwarnings("ignore:unclosed transport:ResourceWarning")
def test_the_public_way_does_not_close_the_socket_of_a_closed_loop(server: EndOfLine) -> None:
    """When this fails, asyncio has learnt to, and `hang_up` needs no private name any more."""
    transport, _ = asyncio.run(connected(server))
    before = sockets()
    with pytest.raises(RuntimeError, match="Event loop is closed"):
        transport.abort()
    assert sockets() == before
    hang_up(transport, transport.close)


def test_a_live_loop_closes_the_socket_itself_which_another_thread_has_shut_down(server: EndOfLine) -> None:
    """Without the transport's `_loop`, `hang_up` would close a file descriptor that the loop still waits for, and which the next
    socket gets.
    """
    threads: list[threading.Thread] = []

    async def work() -> None:
        transport, protocol = await connected(server)
        inside = threading.current_thread()

        def close() -> None:
            threads.append(threading.current_thread())
            transport.close()

        await asyncio.to_thread(hang_up, transport, close)
        assert await asyncio.to_thread(server.client_has_gone.wait, 10)
        await asyncio.wait_for(protocol.lost.wait(), 10)
        assert threads == [inside]

    asyncio.run(work())
