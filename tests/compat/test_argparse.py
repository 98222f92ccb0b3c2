"""What app_db's uses of argparse's private names rest on."""

from __future__ import annotations

import argparse

from app_db._compat.argparse import actions_of


def test_the_actions_of_a_parser_are_listed_with_those_of_its_groups() -> None:
    """Without it, a shell completes no options."""
    parser = argparse.ArgumentParser()
    parser.add_argument("name")
    parser.add_mutually_exclusive_group().add_argument("--grouped", choices=["a", "b"])
    listed = [(action.option_strings, action.dest, action.choices) for action in actions_of(parser)]
    assert listed == [(["-h", "--help"], "help", None), ([], "name", None), (["--grouped"], "grouped", ["a", "b"])]
