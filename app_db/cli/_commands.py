"""The command line: its parser, its exit codes, and `main`. What a verb does stands in the verb's file.

Importing app_db takes longer than most of what is done here, so only the file of the verb that is asked for is imported, and
the container only when a verb asks for it.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from inspect import cleandoc
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from app_db._wording import did_you_mean
from app_db.cli._calls import COULD_NOT_RUN, EXIT_CODES, FINE, Call, CannotRun, Verb, listed
from app_db.cli._printing import Printer, flush, make_printable

if TYPE_CHECKING:
    from app_db.container import DatabaseContainer

VERBS: Mapping[str, Mapping[str, str]] = {
    "_showing": {"show": "show the connections, and where each setting came from"},
    "_pinging": {"ping": "ask whether each database answers, and what it tells about itself"},
    "_pools": {"pool": "list who is connected to each database"},
    "_checking": {"check": "check whether units of work can commit as promised"},
    "_drawing": {"graph": "draw the container as it is configured"},
    "_shells": {
        "shell": "start Python in a unit of work, with sessions and models",
        "dbshell": "start the database's own program: psql, mariadb, sqlite3",
    },
    "_migrations": {
        "migrate": "run the pending migrations",
        "revision": "write migrations for what has changed in the models",
        "downgrade": "undo migrations",
        "current": "show which revision each database has",
        "history": "list all migrations",
        "stamp": "note that a database is at a revision, and run nothing",
        "sql": "print the SQL of migrations, and connect to nothing",
    },
    "_recovering": {
        "recover": "settle what a crash left prepared",
        "in-doubt": "list what a crash left prepared, and change nothing",
    },
    "_completion": {"completion": "print what makes a shell complete verbs, options and names"},
}
"""By file: its verbs, and the line of each in `--help`."""


def main(arguments: Sequence[str] | None = None, *, program: str | None = None) -> int:
    """Run a command and return its exit code: 0, 1 or 2, as `--help` says.

    Without `arguments` it reads those of the process. `program` is what the usage calls it. Errors are printed, and not raised.
    """
    program = program or _program()
    make_printable()
    given = list(sys.argv[1:] if arguments is None else arguments)
    out = Printer(as_json="--json" in _before_dashes(given))
    try:
        common, rest = _common_options(program, given)
        if common.version:
            return _print_version(out)
        options = _options(program, rest, common)
        options.every_verb = lambda: _every_verb(program)
        return _run(Call(options, out, program, lambda: _find_container(common.container)))
    except _WrongUsage as error:
        if not out.as_json:
            print(error.usage, end="", file=sys.stderr)
        out.error(str(error))
    except CannotRun as error:
        out.error(str(error))
    except KeyboardInterrupt as error:
        out.error(" ".join(["Interrupted.", *(_notes(error) or ["Nothing is lost by that: run it again."])]))
    except Exception as error:  # noqa: BLE001  # a traceback does not help an operator
        out.error(_explained(error))
    return COULD_NOT_RUN


def _explained(error: Exception) -> str:
    from app_db._databases.telling import described  # here, because it imports SQLAlchemy
    from app_db.errors import AppDbError

    if isinstance(error, AppDbError):
        return "\n".join([str(error), *_env_file_above(error)])
    return " ".join([f"app_db could not go on: {described(error)}.", *_notes(error)])


def _env_file_above(error: Exception) -> list[str]:
    """Return where the env file is if nothing is configured because the working directory is below that of the project."""
    from app_db.errors import NothingConfigured
    from app_db.settings import DatabaseSettings
    from app_db.settings._project import project_file

    file, name = project_file(), DatabaseSettings.model_config.get("env_file")
    if file is None or not isinstance(name, str) or not isinstance(error, NothingConfigured):
        return []
    is_above = file.with_name(name).is_file() and not Path(name).exists()
    return [f"There is a {name} in {file.parent}: run the command there."] if is_above else []


def _notes(error: BaseException) -> list[str]:
    """Return what app_db has noted on another library's error: the connection, and the variable to look at."""
    return getattr(error, "__notes__", [])


def _find_container(option: str | None) -> DatabaseContainer:
    from app_db.cli._finding import find_container

    return find_container(option)


def _run(call: Call) -> int:
    with _without_log_records():
        try:
            code = int(call.options.verb(call))
            flush()
            return code
        finally:
            call.close()


def _print_version(out: Printer) -> int:
    from app_db._compat.packaging import version_of

    version = version_of("app-db")
    out.line(f"app-db {version}")
    out.data({"version": version})
    flush()
    return FINE


def _program() -> str:
    """Return how this process was started."""
    return "python -m app_db" if Path(sys.argv[0]).name == "__main__.py" else "app-db"


@contextmanager
def _without_log_records() -> Generator[None]:
    """Keep log records of recovery off the terminal, whose output says the same, unless the application configures logging."""
    handler = logging.NullHandler()
    logging.root.addHandler(handler)
    try:
        yield
    finally:
        logging.root.removeHandler(handler)


# ---- the parser ---------------------------------------------------------------------------------------------------------


def _common_options(program: str, arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return the options that may stand before or after the verb, and the arguments without them."""
    own = _before_dashes(arguments)
    parser = _Arguments(prog=program, add_help=False, allow_abbrev=False, usage=f"{program} COMMAND …")
    _add_common(parser)
    parser.add_argument("--version", action="store_true")
    parser.set_defaults(container=None, json=False)
    common, rest = parser.parse_known_args(own)
    return common, [*rest, *arguments[len(own) :]]


def _before_dashes(arguments: list[str]) -> list[str]:
    """Return the arguments before `--`. Those after it belong to the program that dbshell starts."""
    return arguments[: arguments.index("--")] if "--" in arguments else arguments


def _add_common(parser: argparse.ArgumentParser) -> None:
    """Add the options that every verb has. They have no default here, which would replace a value given before the verb."""
    parser.add_argument(
        "--container",
        metavar="MODULE:NAME",
        default=argparse.SUPPRESS,
        help="the container, its class or a function that returns it (default: APP_DB_CONTAINER; [tool.app_db] container in "
        "pyproject.toml; a container of all connections in the settings)",
    )
    parser.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print JSON instead of text")


def _options(program: str, arguments: list[str], common: argparse.Namespace) -> argparse.Namespace:
    """Return the options of a verb, together with the common ones."""
    verb, rest = _verb_first(arguments)
    parser, parsers = _parser(program, verb)
    options, unknown = parser.parse_known_args(rest, common)
    if unknown:
        parsers.get(verb or "", parser).error(f"unrecognized arguments: {' '.join(unknown)}")
    return options


def _parser(program: str, wanted: str | None) -> tuple[argparse.ArgumentParser, Mapping[str, argparse.ArgumentParser]]:
    """Return the parser, with the options of one verb, and the parsers of all verbs."""
    parser = _Parser(prog=program, description="Look after an application's databases.")
    parser.add_argument("--version", action="store_true", help="print the version of app_db")
    commands = _Commands(parser)
    for module, verbs in VERBS.items():
        if wanted in verbs:
            import_module(f"app_db.cli.{module}").add_to(commands)
        for verb in verbs:
            commands.add_name(verb)
    return parser, commands.parsers


def _every_verb(program: str) -> dict[str, argparse.ArgumentParser]:
    """Return the parsers of all verbs, with their options."""
    commands = _Commands(_Parser(prog=program))
    for module in VERBS:
        import_module(f"app_db.cli.{module}").add_to(commands)
    return commands.parsers


def _verb_first(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """Return the verb, None if there is none, and the arguments with the verb before its options. Raises CannotRun."""
    known = [name for verbs in VERBS.values() for name in verbs]
    verb = next((argument for argument in arguments if argument in known), None)
    if verb is not None:
        rest = list(arguments)
        rest.remove(verb)
        return verb, [verb, *rest]
    unknown = next((argument for argument in arguments if not argument.startswith("-")), None)
    if unknown is not None:
        raise CannotRun(f"There is no command {unknown!r}.{did_you_mean(unknown, known)} {listed('There are', known)}")
    return None, list(arguments)


class _WrongUsage(CannotRun):
    """The arguments can't be read."""

    def __init__(self, message: str, usage: str) -> None:
        super().__init__(message)
        self.usage = usage


class _Arguments(argparse.ArgumentParser):
    """A parser that leaves it to `main` to print what is wrong: `--json` prints it as JSON."""

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        flush()
        super().exit(status, message)

    def error(self, message: str) -> NoReturn:
        raise _WrongUsage(f"{self.prog}: error: {message}", self.format_usage())


class _Parser(_Arguments):
    """A parser with the options that every verb has, and the exit codes below its help."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments, allow_abbrev=False)
        self.epilog, self.formatter_class = EXIT_CODES, argparse.RawDescriptionHelpFormatter
        _add_common(self)


class _Commands:
    """The verbs of the parser. The help of each is in the table above."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self.parsers: dict[str, argparse.ArgumentParser] = {}
        self._program = parser.prog
        self._parsers = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)
        self._lines = {name: line for verbs in VERBS.values() for name, line in verbs.items()}

    def add(self, name: str, verb: Verb) -> argparse.ArgumentParser:
        parser = self._added(name, cleandoc(verb.__doc__ or ""))
        parser.set_defaults(verb=verb)
        return parser

    def add_name(self, name: str) -> None:
        """Add a verb for `--help` alone, unless it is there."""
        if name not in self.parsers:
            self._added(name, "")

    def _added(self, name: str, description: str) -> argparse.ArgumentParser:
        parser: argparse.ArgumentParser = self._parsers.add_parser(
            name, help=self._lines[name], description=description, prog=f"{self._program} {name}"
        )
        self.parsers[name] = parser
        return parser
