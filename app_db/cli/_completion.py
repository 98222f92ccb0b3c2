"""`app-db completion`: the scripts by which bash, zsh and fish complete verbs, options, their values and connection names.

Verbs and options stand in the script. Connection names are asked for when they are wanted: `app-db completion names` prints them.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field

from app_db._compat.argparse import actions_of
from app_db.cli._calls import FINE, Call, Commands

NAMES = "names"
"""Stands for a shell, and prints the names of the connections."""


def add_to(commands: Commands) -> None:
    """Add `completion`."""
    completion = commands.add("completion", _completion)
    completion.add_argument("shell", choices=["bash", "zsh", "fish", NAMES], metavar="SHELL", help="bash, zsh or fish")


def _completion(call: Call) -> int:
    """Print a script that makes a shell complete verbs, options and the names of connections. Write it into a file:
    ~/.local/share/bash-completion/completions/app-db for bash, ~/.config/fish/completions/app-db.fish for fish, and for zsh one
    that ~/.zshrc sources after compinit.
    """
    if call.options.shell == NAMES:
        with suppress(Exception):  # where there is no container, there is nothing to complete
            for name in call.names():
                call.out.line(name)
        return FINE
    verbs = {name: _words_of(parser) for name, parser in call.options.every_verb().items()}
    script = {"bash": _bash, "zsh": _zsh, "fish": _fish}[call.options.shell](verbs)
    call.out.line(script)
    call.out.data({"shell": call.options.shell, "script": script})
    return FINE


@dataclass
class _Words:
    """What may follow a verb."""

    options: list[str] = field(default_factory=list)
    values: dict[str, list[str]] = field(default_factory=dict)
    """The values of options that have choices, and of the argument, as that of ""."""
    takes_names: bool = False
    options_with_names: list[str] = field(default_factory=list)
    """The options whose value is the name of a connection."""


def _words_of(parser: argparse.ArgumentParser) -> _Words:
    words = _Words()
    for action in actions_of(parser):
        words.options += [option for option in action.option_strings if option.startswith("--")]
        if action.choices:
            for option in action.option_strings or [""]:
                words.values[option] = [str(choice) for choice in action.choices if choice != NAMES]
        if action.metavar == "NAME":
            words.options_with_names += action.option_strings
            words.takes_names |= not action.option_strings
    return words


_ASKED = f'$(app-db completion {NAMES} ${{container:+--container="$container"}} 2>/dev/null)'
"""Asks for the names of the connections, in bash and zsh."""

_TYPED_IN_FISH = '(commandline -cp | string match -r -- "--container[= ]\\S+" | string replace " " "=")'
_ASKED_IN_FISH = f"(app-db completion {NAMES} {_TYPED_IN_FISH} 2>/dev/null)"

_COMMON = ["--container", "--json", "--help"]


# ---- bash and zsh ---------------------------------------------------------------------------------------------------------


def _bash(verbs: Mapping[str, _Words]) -> str:
    return f"{_function(verbs)}\ncomplete -F _app_db app-db"


def _zsh(verbs: Mapping[str, _Words]) -> str:
    """Zsh can use the completions of bash, too."""
    return f"autoload -Uz bashcompinit && bashcompinit\n{_bash(verbs)}"


def _function(verbs: Mapping[str, _Words]) -> str:
    lines = [
        "_app_db() {",
        '  local word="${COMP_WORDS[COMP_CWORD]}" before="${COMP_WORDS[COMP_CWORD-1]}" verb="" words="" container="" each',
        # Not from COMP_WORDS: bash splits MODULE:NAME at its colon.
        '  case "$COMP_LINE" in *--container[=\\ ]*) container="${COMP_LINE#*--container[= ]}"; esac',
        '  container="${container%% *}"',
        '  for each in "${COMP_WORDS[@]:1:$((COMP_CWORD-1))}"; do',
        f'    case "$each" in {"|".join(verbs)}) verb="$each"; break;; esac',
        "  done",
        '  case "$verb:$before" in',
        *(f'    {verb}:{option}) words="{" ".join(values)}";;' for verb, option, values in _choices(verbs) if option),
        *(f'    {verb}:{option}) words="{_ASKED}";;' for verb, words in verbs.items() for option in words.options_with_names),
        '    *) case "$verb" in',
        f'      "") words="{" ".join([*verbs, *_COMMON, "--version"])}";;',
        *(f"      {verb}) {_words_in_bash(words)};;" for verb, words in verbs.items()),
        "    esac;;",
        "  esac",
        '  COMPREPLY=($(compgen -W "$words" -- "$word"))',
        "}",
    ]
    return "\n".join(lines)


def _words_in_bash(words: _Words) -> str:
    listed = " ".join([*words.options, *words.values.get("", [])])
    asked = f'; [[ "$word" == -* ]] || words="$words {_ASKED}"' if words.takes_names else ""
    return f'words="{listed}"{asked}'


def _choices(verbs: Mapping[str, _Words]) -> Iterator[tuple[str, str, list[str]]]:
    for verb, words in verbs.items():
        for option, values in words.values.items():
            yield verb, option, values


# ---- fish -----------------------------------------------------------------------------------------------------------------


def _fish(verbs: Mapping[str, _Words]) -> str:
    none = f"not __fish_seen_subcommand_from {' '.join(verbs)}"
    lines = [
        "complete -c app-db -f",
        f"complete -c app-db -n '{none}' -a '{' '.join(verbs)}'",
        f"complete -c app-db -n '{none}' -l version",
        "complete -c app-db -l json",
        "complete -c app-db -l container -x",
    ]
    for verb, words in verbs.items():
        seen = f"complete -c app-db -n '__fish_seen_subcommand_from {verb}'"
        lines += [f"{seen} -l {option[2:]}{_values_in_fish(words, option)}" for option in words.options if option not in _COMMON]
        if "" in words.values:
            lines.append(f"{seen} -a '{' '.join(words.values[''])}'")
        if words.takes_names:
            lines.append(f"{seen} -a '{_ASKED_IN_FISH}'")
    return "\n".join(lines)


def _values_in_fish(words: _Words, option: str) -> str:
    if option in words.options_with_names:
        return f" -x -a '{_ASKED_IN_FISH}'"
    return f" -x -a '{' '.join(words.values[option])}'" if option in words.values else ""
