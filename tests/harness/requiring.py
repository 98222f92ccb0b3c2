"""What a test needs and this machine may not have: without it the test is skipped, or fails where nothing may be missing."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from importlib.metadata import requires, version
from importlib.util import find_spec
from typing import NoReturn, TypeVar

import pytest
from packaging.requirements import Requirement

from harness.servers import Server, ServerMissing

S = TypeVar("S", bound=Server)
T = TypeVar("T")

REQUIRE_SERVERS = "APP_DB_TEST_REQUIRE_SERVERS"
REQUIRED = os.environ.get(REQUIRE_SERVERS, "") not in ("", "0")
"""Whether what is missing is a failure."""


def made(make: Callable[[], T]) -> T:
    """Make what needs a program that this machine may not have."""
    try:
        return make()
    except ServerMissing as missing:
        _do_without(str(missing))


def started(make: Callable[[], S]) -> S:
    """Make a server and start it."""
    server = made(make)
    try:
        return server.start()
    except BaseException:
        server.close()
        raise


class Servers(Mapping[str, Server]):
    """Servers by name. Each starts when a test first asks for it; where it is missing, that test alone is skipped."""

    def __init__(self, **makers: Callable[[], Server]) -> None:
        self._makers = makers
        self._started: dict[str, Server] = {}

    def __getitem__(self, name: str) -> Server:
        if name not in self._started:
            self._started[name] = started(self._makers[name])
        return self._started[name]

    def __contains__(self, name: object) -> bool:
        return name in self._makers

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)

    def close(self) -> None:
        """End those that were started."""
        for server in self._started.values():
            server.close()


def need_program(package: str, *names: str) -> None:
    """Go on only where one of these programs is installed."""
    if not any(map(shutil.which, names)):
        _do_without(f"{names[0]} is not installed. Debian and Ubuntu: apt-get install {package}")


def need(*modules: str) -> None:
    """Go on only where modules of the group `test` are installed."""
    for module in modules:
        if find_spec(module) is None:
            _do_without(f"{module} is not installed: `pip install --group test` does that")


def need_fitting(library: str, *distributions: str) -> None:
    """Go on only where the installed version of a library is one that these distributions can use. pip does not see to extras."""
    installed = version(library)
    for distribution in distributions:
        for line in requires(distribution) or ():
            wanted = Requirement(line)
            if wanted.name == library and installed not in wanted.specifier:
                needs = f"{distribution} {version(distribution)} needs {library}{wanted.specifier}"
                _do_without(f"A fitting {library} is missing: {needs}, and {installed} is installed.")


def need_working(module: str) -> None:
    """Go on only where a module can be imported with the versions of others that are installed."""
    try:
        import_module(module)
    except ImportError as error:
        _do_without(f"A fitting {module} is missing: {error}.")


def need_command(*arguments: str) -> None:
    """Go on only where a command can be run."""
    try:
        subprocess.run(arguments, check=True, capture_output=True, timeout=30)
    except (OSError, subprocess.CalledProcessError) as error:
        _do_without(f"`{' '.join(arguments)}` does not work here ({error}).")


def _do_without(problem: str) -> NoReturn:
    if REQUIRED:
        pytest.fail(f"{problem} {REQUIRE_SERVERS} is set, so this is a failure.", pytrace=False)
    pytest.skip(problem)
