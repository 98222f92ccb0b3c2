"""How a database reads a text of SQL: without comments, and without the content of literals.

Comments and literals are read in one pass, by the rules of the database, so that the beginning of a comment in a literal hides
nothing. Some rules depend on settings of the server. Such a text has several readings, and whoever looks at it looks at each.
"""

from __future__ import annotations

import re
from functools import lru_cache
from itertools import product
from typing import Literal, NamedTuple

Syntax = Literal["postgresql", "mysql", "sqlite", "any"]
"""Whose rules to read a text by. `any`: the database is unknown, so it may be read by the rules of each."""


class _Rules(NamedTuple):
    outside: re.Pattern[str]
    inside: re.Pattern[str]
    """Inside a comment that MariaDB and MySQL execute."""
    nested: int = 1
    """How many comments may be open at once."""


_LETTER = r"A-Za-z_\u0080-\U0010ffff"
_NEXT_LINE = r"(?:[ \t\f\v]|--[^\r\n]*+)*+[\r\n](?:[ \t\f\v\r\n]|--[^\r\n]*+[\r\n])*+"
_PLAIN = "{0}(?:[^{0}]|{0}{0})*+(?:{0}|\\Z)"
_ESCAPED = r"{0}(?:[^{0}\\]|{0}{0}|\\(?:.|\Z))*+(?:{0}|\Z)"
_REST = r"|(?P<block>/\*)|(?P<other>.)"


def _compiled(*alternatives: str) -> re.Pattern[str]:
    return re.compile("|".join(alternatives) + _REST, re.DOTALL)


def _postgresql(*, escapes: bool) -> _Rules:
    """`escapes`: `standard_conforming_strings` is off."""
    escaped = _ESCAPED.format("'")
    tokens = _compiled(
        # A name may contain $, and a number ends before it. E and U& belong to the literal that follows.
        rf"(?P<text>(?:(?![eE]'|[uU]&['\"])[{_LETTER}][{_LETTER}0-9$]*+|(?:[0-9]++\.?+[0-9]*+|\.[0-9]++)(?:[eE][+-]?[0-9]++)?"
        rf"|\$[0-9]++|[^{_LETTER}0-9$'\"/-]|-(?!-)|/(?!\*))++)",
        rf"(?P<string>[eE]{escaped}(?:{_NEXT_LINE}{escaped})*+|(?:[uU]&)?+{(_ESCAPED if escapes else _PLAIN).format(chr(39))}"
        rf"|\$(?P<tag>(?:[{_LETTER}][{_LETTER}0-9]*+)?+)\$.*?(?:\$(?P=tag)\$|\Z))",
        rf"(?P<unicode_name>[uU]&{_PLAIN.format(chr(34))})",
        rf"(?P<name>{_PLAIN.format(chr(34))})",
        r"(?P<line>--[^\r\n]*+)",
    )
    return _Rules(tokens, tokens, 1_000_000)


_MYSQL_COMMENT = r"--(?=[\x00-\x20\x7f]|\Z)"
_EXECUTED = r"/\*(?P<mariadb>M)?!(?P<version>[0-9]{5,6})?+"


class _Server(NamedTuple):
    """What decides whether MariaDB or MySQL executes a comment with a version."""

    is_mariadb: bool
    version: int
    digits: int = 6
    """How many digits of a version it reads. MySQL used to read five."""

    def executes(self, comment: re.Match[str]) -> bool:
        version = int((comment["version"] or "0")[: self.digits])
        if comment["mariadb"]:
            return self.is_mariadb and version <= self.version
        return version <= self.version and not (self.is_mariadb and 50_700 <= version < 100_000)


_ANY_SERVER = (_Server(is_mariadb=True, version=100_000),)
"""For texts without such comments."""


def _servers(text: str) -> tuple[_Server, ...]:
    """Return a server for each way in which the comments of a text are executed: from MariaDB 10.0 and MySQL 5.7 on."""
    written = {found["version"] for found in _EXECUTED_COMMENT.finditer(text)} - {None}
    versions = {int(version) for version in written}
    return (
        *(_Server(True, version) for version in {100_000, *versions} if version >= 100_000),
        *(_Server(False, version) for version in {50_700, *versions} if 50_700 <= version < 100_000),
        *(_Server(False, version, 5) for version in {50_700, *(int(version[:5]) for version in written)} if version >= 50_700),
    )


def _mysql(*, escapes: bool, ansi: bool) -> _Rules:
    """`escapes`: not NO_BACKSLASH_ESCAPES. `ansi`: ANSI_QUOTES."""
    literal = _ESCAPED if escapes else _PLAIN

    def tokens(star: str, *end: str) -> re.Pattern[str]:
        return _compiled(
            *end,
            rf"(?P<text>(?:[^'\"`#/*-]|-(?!{_MYSQL_COMMENT[1:]})|/(?!\*)|{star})++)",
            rf"(?P<string>{literal.format(chr(39))}{'' if ansi else '|' + literal.format(chr(34))})",
            rf"(?P<name>{_PLAIN.format('`')}{'|' + _PLAIN.format(chr(34)) if ansi else ''})",
            rf"(?P<line>(?:\#|{_MYSQL_COMMENT})[^\n\0]*+)",
            rf"(?P<executed>{_EXECUTED})",
        )

    return _Rules(tokens(r"\*"), tokens(r"\*(?!/)", r"(?P<end>\*/)"))


_SQLITE_TOKENS = _compiled(
    r"(?P<text>(?:[^'\"`\[/-]|-(?!-)|/(?!\*))++)",
    rf"(?P<string>{_PLAIN.format(chr(39))})",
    rf"(?P<name>{_PLAIN.format(chr(34))}|{_PLAIN.format('`')}|\[[^\]]*+(?:\]|\Z))",
    r"(?P<line>--[^\n]*+)",
)
_SQLITE = _Rules(_SQLITE_TOKENS, _SQLITE_TOKENS)
_STRINGS_ARE_NAMES = re.compile(r"[\s;(]*(?:PRAGMA|SAVEPOINT|RELEASE|ROLLBACK)\b", re.IGNORECASE)  # on SQLite

_POSTGRESQL = {escapes: _postgresql(escapes=escapes) for escapes in (False, True)}
_MYSQL = {(escapes, ansi): _mysql(escapes=escapes, ansi=ansi) for escapes in (True, False) for ansi in (False, True)}
_EXECUTED_COMMENT = re.compile(_EXECUTED)
_SPECIAL = re.compile(r"""['"`\[$\#]|--|/\*""")
_COMMENT_EDGE = re.compile(r"/\*|\*/")
_COMMENT_END = re.compile(r"\*/")
_NO_LETTER = re.compile(r"\W")


@lru_cache(maxsize=2048)
def readings(statement: str, syntax: Syntax) -> tuple[str, ...]:
    """Return a text as the database reads it: one text, or several if that depends on settings of the server.

    A comment is a space, a literal `''`, and a quoted name `"name"`, with `_` and a number for what is no letter in it. The
    content of comments that are executed is kept.
    """
    if _SPECIAL.search(statement) is None:
        return (statement,)
    found: list[str] = []
    if syntax in ("postgresql", "any"):
        found += [_read(statement, _POSTGRESQL[escapes]) for escapes in ((False, True) if "\\'" in statement else (False,))]
    if syntax in ("mysql", "any"):
        escaping = (True, False) if "\\" in statement else (True,)
        quoting = (False, True) if '"' in statement else (False,)
        servers = _servers(statement) if "*!" in statement or "*M!" in statement else _ANY_SERVER
        ways = product(escaping, quoting, servers)
        found += [_read(statement, _MYSQL[escapes, ansi], server) for escapes, ansi, server in ways]
    if syntax in ("sqlite", "any"):
        read = _read(statement, _SQLITE)
        found.append(_read(statement, _SQLITE, strings_are_names=True) if _STRINGS_ARE_NAMES.match(read) else read)
    distinct = tuple(dict.fromkeys(found))
    return tuple(filter(str.strip, distinct)) or distinct[:1]  # an empty statement does nothing


def _read(text: str, rules: _Rules, server: _Server = _ANY_SERVER[0], *, strings_are_names: bool = False) -> str:
    pieces: list[str] = []
    place, is_inside = 0, False
    while (token := (rules.inside if is_inside else rules.outside).match(text, place)) is not None:
        place, kind = token.end(), token.lastgroup
        if kind in ("text", "other"):
            pieces.append(token[0])
        elif kind == "name" or (kind == "string" and strings_are_names):
            pieces.append(_name(token[0]))
        elif kind == "unicode_name":
            pieces.append(f"U&{_name(token[0][2:])}")
        elif kind == "string":
            pieces.append("''")
        else:
            pieces.append(" ")
            if kind == "executed" and server.executes(token):
                is_inside = True
            elif kind == "executed":
                place = _end_of_comment(text, place, 2)
            elif kind == "block":
                place = _end_of_comment(text, place, rules.nested)
            elif kind == "end":
                is_inside = False
    return "".join(pieces)


def _name(quoted: str) -> str:
    """Return a name in double quotes that contains letters, digits and `_` only. Other names stay other names."""
    return f'"{_NO_LETTER.sub(lambda found: f"_{ord(found[0])}_", quoted[1:-1])}"'


def _end_of_comment(text: str, place: int, most: int) -> int:
    """Return where a comment ends whose content begins at `place`, with at most `most` comments open at once."""
    is_open = 1
    while is_open:
        found = (_COMMENT_END if is_open == most else _COMMENT_EDGE).search(text, place)
        if found is None:
            return len(text)
        place = found.end()
        is_open += 1 if found[0] == "/*" else -1
    return place
