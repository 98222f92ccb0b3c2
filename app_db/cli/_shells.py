"""`app-db shell`: Python in a unit of work. `app-db dbshell`: the database's own program."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from app_db.cli._calls import FINE, WRONG, Call, CannotRun, Commands, names_in

if TYPE_CHECKING:
    from sqlalchemy import URL

    from app_db import UnitOfWork
    from app_db._databases.shells import Shell
    from app_db.container import DatabaseContainer
    from app_db.settings import ConnectionSettings

HERE = "<stdin>"
"""What the program is called that is read from stdin."""


def add_to(commands: Commands) -> None:
    """Add `shell` and `dbshell`."""
    shell = commands.add("shell", _shell)
    shell.add_argument("--write", action="store_true", help="let it write, and commit at its end (default: read-only)")
    shell.add_argument("--plain", action="store_true", help="use Python's own prompt where IPython is installed")
    shell.add_argument(
        "--modules",
        action="append",
        default=[],
        metavar="MODULE",
        help="import a module with models; may be repeated (default: modules in [tool.app_db])",
    )
    dbshell = commands.add("dbshell", _dbshell)
    dbshell.add_argument("name", metavar="NAME", help="the connection")
    dbshell.add_argument("arguments", nargs="*", default=[], metavar="ARGUMENT", help="arguments of the program, after --")


# ---- shell ----------------------------------------------------------------------------------------------------------------


class _RolledBack(Exception):
    """Ends the unit of a shell without a commit."""

    def __init__(self, reason: str, code: int) -> None:
        super().__init__(reason, code)
        self.reason, self.code = reason, code


def _shell(call: Call) -> int:
    """Start Python in a unit of work, with the container, the sessions and the models at hand. What is written on stdin is run
    as a program. The unit is read-only, or commits at the end with --write; after an error in a program it is rolled back.
    """
    from app_db.cli._finding import import_modules

    container, write = call.container, call.options.write
    import_modules(call.options.modules)
    if call.out.as_json:
        call.out.data(
            {"read_only": not write, "names": {name: _kind_of(value) for name, value in _names(container, None).items()}}
        )
        return FINE
    try:
        with container.transaction(read_only=not write) as unit:
            names = _names(container, unit)
            if _run(call, names) != FINE:
                raise _RolledBack("the program failed", WRONG)
            if not write:
                unsaved = "the unit is read-only. Start the shell with --write to keep changes" if _has_unsaved(names) else ""
                raise _RolledBack(unsaved, FINE)
    except _RolledBack as ended:
        if ended.reason:
            print(f"Rolled back, because {ended.reason}.", file=sys.stderr)
        return ended.code
    return FINE


def _run(call: Call, names: dict[str, Any]) -> int:
    if not sys.stdin.isatty():
        return _run_program(sys.stdin.read(), names)
    try:
        _interact(_banner(call, names), names, plain=call.options.plain)
    except SystemExit as ended:
        return FINE if ended.code in (None, 0) else WRONG
    return FINE


def _run_program(program: str, names: dict[str, Any]) -> int:
    try:
        exec(compile(program, HERE, "exec"), names)  # noqa: S102  # it is the operator's own
    except SystemExit as ended:
        return FINE if ended.code in (None, 0) else WRONG
    except Exception as error:  # noqa: BLE001  # the program may raise anything
        shown = traceback.TracebackException.from_exception(error)
        shown.stack = traceback.StackSummary.from_list([frame for frame in shown.stack if frame.filename == HERE])
        print("".join(shown.format(chain=False)).rstrip(), file=sys.stderr)
        return WRONG
    return FINE


def _interact(banner: str, names: dict[str, Any], *, plain: bool) -> None:
    if not plain and find_spec("IPython") is not None:
        from IPython import start_ipython

        print(banner)
        start_ipython(argv=["--no-banner"], user_ns=names)
        return
    import code

    code.interact(banner, local=names, exitmsg="")


def _names(container: DatabaseContainer, unit: UnitOfWork | None) -> dict[str, Any]:
    """Return what is at hand. Without a unit, the providers stand for the sessions."""
    from app_db.container import Connection

    declared = [name for name in names_in(container) if isinstance(container.providers.get(name), Connection)]
    providers: dict[str, Any] = {
        "session": container.session,
        **{f"{name}_session": container.connection(name).session for name in declared},
    }
    sessions = providers if unit is None else {name: provider() for name, provider in providers.items()}
    return {**_models(), **({} if unit is None else {"unit": unit}), **sessions, "container": container}


def _models() -> dict[str, type]:
    """Return the models by name. If several have the same name, each is called by its module as well."""
    from app_db._compat.sqlalchemy import mapped_classes

    models = [model for model in mapped_classes() if not model.__module__.startswith("app_db.")]
    names = [model.__name__ for model in models]
    return {
        name if names.count(name) == 1 else f"{model.__module__}.{name}".replace(".", "_"): model
        for name, model in sorted(zip(names, models, strict=True), key=lambda found: (found[0], found[1].__module__))
    }


def _banner(call: Call, names: Mapping[str, Any]) -> str:
    from app_db.cli._connections import name_of

    models = [name for name, value in names.items() if isinstance(value, type)]
    others = [name for name in names if name not in models]
    how = "It commits at the end" if call.options.write else "It is read-only; start with --write to change data"
    lines = [f"{name_of(call.container)}, in a unit of work. {how}.", f"At hand: {', '.join(others)}"]
    return "\n".join([*lines, f"Models: {', '.join(models)}"] if models else lines)


def _kind_of(value: object) -> str:
    return "model" if isinstance(value, type) else "session" if hasattr(value, "provided") else "container"


def _has_unsaved(names: Mapping[str, Any]) -> bool:
    """Return whether a session has objects that were not flushed."""
    sessions = [value for name, value in names.items() if name.endswith("_session")]
    return any(getattr(each, state, ()) for each in sessions for state in ("new", "dirty", "deleted"))


# ---- dbshell --------------------------------------------------------------------------------------------------------------


def _dbshell(call: Call) -> int:
    """Start the database's own program: psql, mariadb or sqlite3. The password is not on its command line. That of a read-only
    connection is read-only. Arguments of the program may follow after --.
    """
    from app_db._databases.shells import FILE

    [name] = call.names([call.options.name])
    shell = _shell_of(call.container, name)
    program = next(filter(None, map(shutil.which, shell.programs)), None)
    arguments = [*shell.arguments, *call.options.arguments]
    if call.out.as_json:
        call.out.data({"program": program, "arguments": arguments, "environment": sorted(shell.environment)})
        return FINE
    if program is None:
        raise CannotRun(f"{name}: there is no program {' or '.join(map(repr, shell.programs))}. {shell.install}.")
    with _file_with(shell.private) as file:
        return _run_to_its_end([program, *(each.replace(FILE, file) for each in arguments)], shell.environment)


def _shell_of(container: DatabaseContainer, name: str) -> Shell:
    from app_db._databases.registry import database_of
    from app_db.cli._connections import url_of

    settings, url = container.settings().connection(name), url_of(container, name)
    database = database_of(url.get_backend_name())
    shell = database.shell(url, settings, _password(settings, url))
    if shell is None:
        raise CannotRun(f"{name}: app_db knows no program for {url.get_backend_name()}. Use `app-db shell`.")
    return shell


def _password(settings: ConnectionSettings, url: URL) -> str | None:
    from app_db._databases.telling import described

    if not settings.password_provider:
        return url.password
    provider = settings.load_password_provider()
    try:
        return provider()
    except Exception as error:
        variable = settings.variable("password_provider")
        raise CannotRun(f"{variable}: calling it failed ({described(error)}). Call it in Python to see why.") from error


@contextmanager
def _file_with(private: str) -> Generator[str]:
    """Give the path of a file that only its owner can read, for as long as the block runs."""
    if not private:
        yield ""
        return
    descriptor, path = tempfile.mkstemp(prefix="app-db-")  # with the mode 0600
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(private)
        yield path
    finally:
        Path(path).unlink(missing_ok=True)


def _run_to_its_end(command: list[str], environment: Mapping[str, str]) -> int:
    """Run a program on this terminal. Ctrl-C is the program's own; what ends this process ends the program."""
    variables = {**os.environ, **environment}
    with subprocess.Popen(command, env=variables) as process, _signals_for(process):  # noqa: S603  # its own
        return FINE if process.wait() == 0 else WRONG


@contextmanager
def _signals_for(process: subprocess.Popen[bytes]) -> Generator[None]:
    def pass_on(number: int, frame: FrameType | None) -> None:
        process.send_signal(number)

    def ignore(number: int, frame: FrameType | None) -> None:
        """Leave it to the program: the terminal sends it to both."""

    handlers: dict[int, Callable[[int, FrameType | None], None]] = {
        signal.SIGINT: ignore,
        signal.SIGTERM: pass_on,
    }
    if threading.current_thread() is not threading.main_thread():
        handlers = {}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
