"""A network between a test and a database server: it takes its time, and loses what it is told to lose.

    with Proxy(server, rtt=1.0) as proxy:
        url = proxy.url(server.url("shop"))
        lost = proxy.lose("answer", to=rb"COMMIT PREPARED")         # the server does it, the client is never told
        ...
        lost.wait()

The proxy is a process of its own, so that it takes no time from a client that is measured. Everything it forwards is on its
way for half of `rtt` (milliseconds). What it loses, it loses once: the first request that matches a regular expression, or one
after it. A connection that lost something is closed on both sides, or (`then="stall"`) hangs until `cut()`: nothing arrives any
more on either side, not even that the other one has hung up.

This file runs alone, too, as `python proxies.py HOST PORT RTT`: each line of its stdin is a command in JSON, answered on stdout.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Literal, Protocol, Self

Loss = Literal["request", "answer"]
Aftermath = Literal["close", "stall"]

HEADROOM = 1 << 20
"""Bytes on their way in one direction, from which on no more are read."""


# ---- for tests ----------------------------------------------------------------------------------------------------------


class Reachable(Protocol):
    """What the proxy forwards to: `servers.Server` is one."""

    host: str
    port: int


class Fault:
    """Something a proxy is to lose."""

    def __init__(self, proxy: Proxy, number: int) -> None:
        self._proxy = proxy
        self._number = number

    @property
    def happened(self) -> bool:
        """Whether it is lost. An answer is lost when the server has given it, and so has done what it was asked for."""
        return bool(self._proxy.ask("happened", number=self._number))

    def wait(self, within: float = 10.0) -> None:
        """Wait until it is lost."""
        deadline = time.monotonic() + within
        while not self.happened:
            if time.monotonic() > deadline:
                raise TimeoutError(f"the proxy has lost nothing within {within:g} s")
            time.sleep(0.002)


class Proxy:
    """A proxy in front of a server, for the length of a `with` block."""

    def __init__(self, server: Reachable, *, rtt: float = 0.0) -> None:
        self._server = server
        self._rtt = rtt
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self.host = "127.0.0.1"
        self.port = 0

    def __enter__(self) -> Self:
        # Without site-packages it starts at once, and no coverage is measured in it.
        command = [sys.executable, "-I", "-S", __file__, self._server.host, str(self._server.port), str(self._rtt)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.port = self.ask("port")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        process, self._process = self._process, None
        if process is not None and process.stdin is not None and process.stdout is not None:
            process.stdin.close()  # which ends it
            process.stdout.close()
            process.wait(10)

    def url(self, url: str) -> str:
        """The same database by way of the proxy."""
        from sqlalchemy import make_url

        return make_url(url).set(host=self.host, port=self.port).render_as_string(hide_password=False)

    def lose(self, what: Loss, *, to: bytes, after: int = 0, then: Aftermath = "close") -> Fault:
        """Lose a request in whose bytes the regular expression `to` is found, or the server's answer to it.

        The first such request from now on is meant, or one after so many others.
        """
        re.compile(to)  # a mistake in it is the test's, not the proxy's
        number = self.ask("lose", what=what, to=to.decode("latin-1"), after=after, then=then)
        return Fault(self, number)

    @property
    def accepted(self) -> int:
        """How many connections were made to the proxy."""
        return int(self.ask("accepted"))

    def cut(self) -> None:
        """Close all connections, stalled ones as well, and forget what was to be lost. New connections are welcome."""
        self.ask("cut")

    def ask(self, command: str, /, **options: Any) -> Any:
        """Send a command to the process, and return its answer."""
        process = self._process
        if process is None or process.stdin is None or process.stdout is None:
            raise RuntimeError("the proxy is not running")
        with self._lock:
            process.stdin.write(json.dumps({"command": command, **options}).encode() + b"\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())


# ---- the process --------------------------------------------------------------------------------------------------------


class _Loss:
    """What is to be lost, once."""

    def __init__(self, what: str, to: str, after: int, then: str) -> None:
        self.what = what
        self.then = then
        self.happened = False
        self.taken = False
        self._pattern = re.compile(to.encode("latin-1"))
        self._after = after

    def takes(self, request: bytes) -> bool:
        if self.taken or self._pattern.search(request) is None:
            return False
        self.taken = self._after == 0
        self._after -= 1
        return self.taken


class _Way:
    """One direction of a connection: what is on its way, and when it arrives."""

    def __init__(self, source: socket.socket, target: socket.socket) -> None:
        self.source = source
        self.target = target
        self.ended = False
        self.size = 0
        self._under_way: deque[tuple[float, bytes]] = deque()

    @property
    def next(self) -> float | None:
        return self._under_way[0][0] if self._under_way else None

    def put(self, arrival: float, data: bytes) -> None:
        self._under_way.append((arrival, data))
        self.size += len(data)

    def clear(self) -> None:
        self._under_way.clear()
        self.size = 0

    def deliver(self, now: float) -> bool:
        """Hand over what has arrived; return whether the target must be waited for, because it takes no more."""
        while self._under_way and self._under_way[0][0] <= now:
            arrival, data = self._under_way.popleft()
            try:
                sent = self.target.send(data)
            except BlockingIOError:
                sent = 0
            self.size -= sent
            if sent < len(data):
                self._under_way.appendleft((arrival, data[sent:]))
                return True
        return False


class _Link:
    """One client's connection, forwarded."""

    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        self.requests = _Way(client, server)
        self.answers = _Way(server, client)
        self.open = True
        self._request = b""  # since the last answer: one may come in pieces
        self._loss: _Loss | None = None
        self._stalled = False

    def ways(self) -> tuple[_Way, _Way]:
        return self.requests, self.answers

    def read(self, way: _Way, arrival: float, losses: list[_Loss]) -> None:
        data = way.source.recv(1 << 16)
        if not data:
            way.ended = True
            if self._stalled:
                way.source.close()  # without a word to the other side
        elif self._stalled:
            pass
        elif way is self.answers and self._loss is not None:
            self._lose(self._loss)
        elif way is self.answers:
            self._request = b""
            way.put(arrival, data)
        else:
            self._forward_request(data, arrival, losses)

    def _forward_request(self, data: bytes, arrival: float, losses: list[_Loss]) -> None:
        self._request += data
        self._loss = self._loss or next((loss for loss in losses if loss.takes(self._request)), None)
        if self._loss is not None and self._loss.what == "request":
            self._lose(self._loss)
        else:
            self.requests.put(arrival, data)

    def _lose(self, loss: _Loss) -> None:
        loss.happened = True
        if loss.then == "stall":
            self._stalled = True
            self.requests.clear()
            self.answers.clear()
        else:
            self.close()

    def wait_for(self) -> tuple[list[socket.socket], float | None]:
        """Return the sockets to read from, and when the next bytes arrive."""
        sources = [way.source for way in self.ways() if not way.ended and way.size < HEADROOM]
        return sources, min((way.next for way in self.ways() if way.next is not None), default=None)

    def deliver(self, now: float) -> list[socket.socket]:
        """Hand over what has arrived, and close when a side has hung up; return the sockets that take no more for now."""
        full = [way.target for way in self.ways() if way.deliver(now)]
        if not self._stalled and any(way.ended and way.size == 0 for way in self.ways()):
            self.close()
        return full

    def close(self) -> None:
        self.open = False
        self.requests.source.close()
        self.answers.source.close()


class _Forwarder:
    def __init__(self, host: str, port: int, rtt: float) -> None:
        self._address = (host, port)
        self._delay = rtt / 2000
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=100)
        self._links: list[_Link] = []
        self._losses: list[_Loss] = []
        self._accepted = 0

    def run(self) -> None:
        commands = b""
        while True:
            readable = self._wait()
            if 0 in readable:
                data = os.read(0, 1 << 16)
                if not data:
                    return
                *lines, commands = (commands + data).split(b"\n")
                for line in lines:
                    print(json.dumps(self._obey(**json.loads(line))), flush=True)
            if self._listener in readable:
                self._accept()
            arrival = time.monotonic() + self._delay
            for link in self._links:
                with self._closing(link):
                    for way in link.ways():
                        if way.source in readable and link.open:
                            link.read(way, arrival, self._losses)

    def _wait(self) -> list[Any]:
        """Deliver what has arrived, and return what can be read."""
        now = time.monotonic()
        sources: list[Any] = [0, self._listener]
        full: list[socket.socket] = []
        arrivals: list[float] = []
        for link in self._links:
            with self._closing(link):
                full += link.deliver(now)
        self._links = [link for link in self._links if link.open]
        for link in self._links:
            more, arrival = link.wait_for()
            sources += more
            if arrival is not None and arrival > now:
                arrivals.append(arrival)
        timeout = max(0.0, min(arrivals) - time.monotonic()) if arrivals else None
        return select.select(sources, full, [], timeout)[0]  # poll() and epoll() know whole milliseconds only

    @staticmethod
    @contextlib.contextmanager
    def _closing(link: _Link) -> Iterator[None]:
        """End the connection when one of its sides turns out to be gone."""
        try:
            yield
        except OSError:
            link.close()

    def _accept(self) -> None:
        client, _ = self._listener.accept()
        self._accepted += 1
        try:
            server = socket.create_connection(self._address, 10)
        except OSError:
            client.close()
            return
        for end in (client, server):
            end.setblocking(False)
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._links.append(_Link(client, server))

    def _obey(self, command: str, **options: Any) -> Any:
        if command == "port":
            return self._listener.getsockname()[1]
        if command == "accepted":
            return self._accepted
        if command == "lose":
            self._losses.append(_Loss(**options))
            return len(self._losses) - 1
        if command == "happened":
            return self._losses[options["number"]].happened
        if command == "cut":
            for link in self._links:
                link.close()
            self._links.clear()
            for loss in self._losses:
                loss.taken = True
            return True
        raise ValueError(command)


def _wake_up_in_time() -> None:
    """Have the kernel wake this process when it asked for, and not up to 50 µs later."""
    import ctypes

    set_timer_slack = 29
    with contextlib.suppress(OSError, AttributeError):  # Linux only
        ctypes.CDLL(None).prctl(set_timer_slack, 1, 0, 0, 0)


if __name__ == "__main__":
    _wake_up_in_time()
    _Forwarder(sys.argv[1], int(sys.argv[2]), float(sys.argv[3])).run()
