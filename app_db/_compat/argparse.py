"""Private names of argparse, for which it has no public way."""

from __future__ import annotations

import argparse


def actions_of(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """Return the options and arguments of a parser. `add_argument` returns each, but not those that a group adds."""
    return parser._actions
