"""The sources of settings, which are those of pydantic-settings.

`settings_customise_sources` says which there are, and in which order. Variables of the environment,
of env files and of the secrets directories are read here, from the sources' own text, because
pydantic-settings ignores a misspelt variable and doesn't say which one has a value that can't be
used. Any other source is called, and says what it has.
"""

from __future__ import annotations

import inspect
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeAlias, cast

from pydantic_settings import (
    BaseSettings,
    CliSettingsSource,
    DotEnvSettingsSource,
    EnvSettingsSource,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SecretsSettingsSource,
)
from pydantic_settings.sources import DefaultSettingsSource

from app_db._compat.pydantic_settings import lines_left_out, tell_what_was_read
from app_db.errors import Problem, SettingsError
from app_db.settings._reading import IN_CODE, Reading, Values
from app_db.settings._spelling import Spelling
from app_db.settings._urls import is_object
from app_db.settings._variables import VariableReader, tried, with_texts

Paths: TypeAlias = Path | str | Sequence[Path | str] | None
"""Files or directories: one, several or none."""

Options: TypeAlias = dict[str, object]
"""The arguments of BaseSettings that begin with an underscore, without it."""

_Source: TypeAlias = Callable[[], dict[str, Any]]
_FILES = ("toml_file_path", "yaml_file_path", "json_file_path", "env_file", "secrets_dir")
"""The attributes of sources that name the files they read."""


def read(model: type[BaseSettings], own: Iterable[str], given: Mapping[str, object], options: Options) -> Reading:
    """Read all sources of `model`. `own` has the names of the fields that app_db reads, and `given` is what code gives."""
    built = cast("tuple[tuple[_Source, ...], object] | None", options.pop("build_sources", None))
    reader = _Reader(model, own, options)
    sources = built[0] if built else reader.sources(given)
    layers = [reader.layer(source) for source in sources]
    for layer in reversed(layers):
        reader.reading.add(layer)
    return reader.reading


class _Reader:
    """Reads each source into values of its own, from the first, which wins, to the last."""

    def __init__(self, model: type[BaseSettings], own: Iterable[str], options: Options) -> None:
        self.model = model
        self.options = options
        self.reading = Reading(model, Spelling())
        self._variables = VariableReader(self.reading, own)
        self.reading.spelling = self._variables.spelling(self.variables())
        self._alone: dict[str, DotEnvSettingsSource] = {}
        self._states: dict[str, dict[str, object]] = {}
        self._read: list[Values] = []

    def variables(self) -> EnvSettingsSource:
        """Return pydantic-settings' source of environment variables, with the options given."""
        return EnvSettingsSource(self.model, **_accepted(EnvSettingsSource, self.options))

    def sources(self, given: Mapping[str, object]) -> list[_Source]:
        """Return the sources that pydantic-settings would read. Raises SettingsError if they can't be made."""
        model = self.model
        customise = partial(
            model.settings_customise_sources,
            model,
            init_settings=InitSettingsSource(model, dict(given)),
            env_settings=self.variables(),
            dotenv_settings=self._env_files(),
            file_secret_settings=self._secrets(),
        )
        customised, failure = tried(customise)
        if failure is not None:
            self.reading.problems.append((SettingsError, _failed(failure, "settings_customise_sources")))
            raise self.reading.error()
        sources: list[_Source] = list(cast("Iterable[_Source]", customised))
        if self._option("nested_model_default_partial_update"):
            sources.append(DefaultSettingsSource(model, nested_model_default_partial_update=True))
        return [*self._command_line(sources), *sources]

    def _command_line(self, sources: list[_Source]) -> list[_Source]:
        """Return the source of command line arguments, if they are to be read and it isn't among the sources."""
        arguments, own = self._option("cli_parse_args"), self._option("cli_settings_source")
        customised = next((source for source in sources if isinstance(source, CliSettingsSource)), None)
        if customised is not None:
            if arguments not in (None, False) and not customised.env_vars:
                customised(args=cast("Any", arguments))
            return []
        if isinstance(own, CliSettingsSource):
            return [own]
        if arguments is None:
            return []
        options = {"case_sensitive": self._option("case_sensitive"), **self.options}
        return [CliSettingsSource(self.model, **_accepted(CliSettingsSource, options))]

    def _secrets(self) -> SecretsSettingsSource:
        source = SecretsSettingsSource(self.model, **_accepted(SecretsSettingsSource, self.options))
        source.secrets_dir = cast("Any", self._option("secrets_dir"))  # its own argument can't say that there is none
        return source

    def _env_files(self) -> DotEnvSettingsSource:
        """Return pydantic-settings' source of env files, without the files that can't be read. Each of these is a problem.

        The variables of each file are read once, because it may be a pipe.
        """
        for file in _listed(self._option("env_file")):
            source, failure = tried(partial(self._env_file, file))
            if failure is None:
                self._alone[str(file)] = alone = cast("DotEnvSettingsSource", source)
                self._refuse_lines(Path(file).expanduser(), alone.env_file_encoding)
            elif isinstance(failure, (OSError, UnicodeError)):
                self._lack(Problem(str(file), "can't be read as a file of variables."))
            else:
                raise failure
        whole = self._env_file(None)
        whole.env_file = list(self._alone) or None
        whole.env_vars = {name: text for source in self._alone.values() for name, text in source.env_vars.items()}
        return whole

    def _refuse_lines(self, file: Path, encoding: str | None) -> None:
        """Note the lines that mean to set a variable of ours and can't be read: python-dotenv ignores them."""
        if not file.is_file():  # a pipe can be read once
            return
        variables = self.variables()
        roots = (root for roots in self._variables.roots(variables).values() for root in roots)
        beginnings = tuple(root.lower() for root in (variables.env_prefix, "DATABASE_URL ", *roots) if root)
        left_out = [(line, re.match(r"(?:export\s+)?[\"']?(\w+)", text)) for line, text in lines_left_out(file, encoding)]
        names = {found[1]: line for line, found in left_out if found and f"{found[1].lower()} ".startswith(beginnings)}
        for name, line in names.items():
            how = f"Write {name}=value. A value that begins with a quotation mark has to end with it"
            self._lack(Problem(name, f"can't be read in line {line} of {file}. {how}."))

    def _env_file(self, file: str | Path | None) -> DotEnvSettingsSource:
        options: Options = {**self.options, "env_file": file}
        return DotEnvSettingsSource(self.model, **_accepted(DotEnvSettingsSource, options, with_none=("env_file",)))

    def _option(self, name: str) -> object:
        given = self.options.get(name)
        if given is None and not (name in _MAY_BE_NONE and name in self.options):
            return cast("Mapping[str, object]", self.model.model_config).get(name)
        return given

    def _lack(self, problem: Problem) -> None:
        """Note the problem of a source that says nothing. What may be missing because of it is no problem of its own."""
        self.reading.problems.append((SettingsError, problem))
        self.reading.refuse(("connections",))

    # ---- one source ----

    def layer(self, source: _Source) -> Values:
        """Return the values of a source. What is wrong with it is a problem of the reading."""
        kind = type(source)
        if kind is InitSettingsSource:
            layer = self._settings_of(cast("InitSettingsSource", source).init_kwargs, IN_CODE)
        elif kind is EnvSettingsSource:
            layer = self._variables.read(cast("EnvSettingsSource", source), "environment")
        elif kind is DotEnvSettingsSource:
            layer = self._read_env_files(cast("DotEnvSettingsSource", source))
        elif kind is SecretsSettingsSource:
            layer = self._read_secrets(cast("SecretsSettingsSource", source))
        else:
            layer = self._read_other(source)
        self._states[getattr(source, "__name__", kind.__name__)] = layer.plain()
        self._read.append(layer)
        return layer

    def _settings_of(self, found: Mapping[str, object], source: str, note: str = "") -> Values:
        layer = Values()
        for key, value in found.items():
            layer.put((self.reading.field_of(str(key)),), value, self.reading.spelling, source, note)
        return layer

    def _read_other(self, source: _Source) -> Values:
        """Call a source that may be anybody's."""
        if isinstance(source, PydanticBaseSettingsSource):
            before = Values()
            for layer in reversed(self._read):
                before.update(layer)
            tell_what_was_read(source, before.plain(), self._states)
        label = _label(source)
        found, failure = tried(source)
        if failure is not None:
            self._lack(_failed(failure, label))
        elif not is_object(found):
            self._lack(Problem(label, "must return a dict of settings."))
        elif isinstance(source, DefaultSettingsSource):
            return self._settings_of({key: value for key, value in found.items() if key in self._variables.others}, "default")
        else:
            return self._settings_of(found, label, f" It comes from {label}.")
        return Values()

    # ---- variables ----

    def _read_env_files(self, source: DotEnvSettingsSource) -> Values:
        files = list(_listed(source.env_file))
        if len(files) < 2:
            return self._variables.read(source, str(next(iter(files), "")))
        layer = Values()
        options = {name: getattr(source, name) for name in _OF_ENV_FILES if hasattr(source, name)}
        for file in files:
            alone = self._alone.get(str(file)) or DotEnvSettingsSource(self.model, env_file=file, **options)
            layer.update(self._variables.read(with_texts(source, alone.env_vars), str(file)))
        return layer

    def _read_secrets(self, source: SecretsSettingsSource) -> Values:
        """Read the files whose names are those of variables, at any depth. Other files are ignored."""
        layer = Values()
        variables = self.variables()
        variables.env_prefix, variables.case_sensitive = source.env_prefix, source.case_sensitive
        roots = [root for roots in self._variables.roots(variables).values() for root in roots]
        beginnings = tuple(root.lower() for root in (source.env_prefix, "DATABASE_URL", *roots))
        directories = list(_listed(source.secrets_dir))
        for directory in directories:
            folder = Path(directory).expanduser()
            if not folder.is_dir():
                warnings.warn(f"the secrets directory {str(folder)!r} does not exist", stacklevel=2)
                continue
            files = [file for file in folder.iterdir() if file.is_file() and file.name.lower().startswith(beginnings)]
            # Bytes that are not UTF-8 become text that pydantic refuses: a problem of this
            # variable, not an error here.
            texts = {file.name: file.read_text("utf-8", "surrogateescape").rstrip("\r\n") for file in files}
            layer.update(
                self._variables.read(with_texts(variables, texts), "secrets" if len(directories) == 1 else f"secrets {directory}")
            )
        return layer


# ---- what sources are made of, and what they say ------------------------------------------------------------------------

_OF_ENV_FILES = ("env_file_encoding", "env_file_depth", "case_sensitive", "env_ignore_empty", "env_parse_none_str")
_MAY_BE_NONE = ("env_file", "secrets_dir")
"""Options that say 'none' with None. Any other option that is None has the value of `model_config`."""


def _accepted(source: type[PydanticBaseSettingsSource], options: Options, with_none: Sequence[str] = ()) -> dict[str, Any]:
    """Return the options that a source has an argument for, and that are given."""
    arguments = _arguments(source)
    return {name: value for name, value in options.items() if name in arguments and (value is not None or name in with_none)}


@cache
def _arguments(source: type[PydanticBaseSettingsSource]) -> frozenset[str]:
    return frozenset(inspect.signature(source.__init__).parameters)


def _listed(paths: object) -> Iterator[str | Path]:
    if isinstance(paths, (str, os.PathLike)):
        yield cast("str | Path", paths)
    elif paths is not None:
        yield from cast("Sequence[str | Path]", paths)


def _label(source: object) -> str:
    """Return the class of a source, and its files."""
    name = str(getattr(source, "__name__", type(source).__name__))
    files: object = next((found for attribute in _FILES if (found := getattr(source, attribute, None))), ())
    each = cast("Sequence[object]", files) if isinstance(files, (list, tuple)) else (files,)
    return f"{name} {', '.join(map(str, each))}".rstrip()


def _failed(failure: Exception, label: str) -> Problem:
    """Return the problem of a source that raised. It has no text of the error, which may quote what was read."""
    cause = failure.__cause__ if isinstance(failure.__cause__, Exception) else failure
    traceback, place = failure.__traceback__, ""
    while traceback is not None:
        source = traceback.tb_frame.f_locals.get("self")
        if isinstance(source, PydanticBaseSettingsSource):
            label = _label(source)
        place = f"{Path(traceback.tb_frame.f_code.co_filename).name}:{traceback.tb_lineno}"
        traceback = traceback.tb_next
    if isinstance(cause, ImportError):
        return Problem(label, f"needs what is not installed: {cause}")
    line = re.search(r"\bline (\d{1,7})\b", str(cause))
    if isinstance(cause, ValueError) or line:
        where = f", line {line[1]}" if line else ""
        return Problem(label, f"can't be read ({type(cause).__name__}{where}). Correct what is written there.")
    return Problem(label, f"raised {type(cause).__name__} ({place}). Its text is not shown, because it may quote a secret.")
