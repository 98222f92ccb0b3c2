"""Run the programs that look for rare mistakes for a long time, one after the other; `make soak` does.

    python tests/soak.py                    # all of them, whole
    python tests/soak.py random_kills       # one
    python tests/soak.py --tenth            # all of them, for a tenth of the time, as `make test-all` does

Each prints what it has seen, and ends with a status other than 0 if something was wrong.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.paths import PYTHONPATH, TESTS


@dataclass(frozen=True)
class Program:
    """A program of this directory, and the option that says how much of it is to be done."""

    name: str
    option: str
    amount: int

    def command(self, *, tenth: bool = False) -> list[str]:
        """Return what to run."""
        amount = self.amount // 10 if tenth else self.amount
        return [sys.executable, str(TESTS / f"{self.name}.py"), self.option, str(amount)]


PROGRAMS = [
    Program("random_kills", "--kills", 10_000),
    Program("signals_at_random", "--seconds", 20),
    Program("who_wrote_at_random", "--units", 5000),
    Program("poolers_under_load", "--seconds", 30),
]
"""Add a line for a new one. A test in `test_soak.py` runs a tenth of each."""


def environment() -> dict[str, str]:
    """Return the environment of a program, which finds the app_db of this checkout."""
    return {**os.environ, "PYTHONPATH": PYTHONPATH}


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = [program.name for program in PROGRAMS]
    parser.add_argument("names", nargs="*", metavar="PROGRAM", help=f"{', '.join(known)}; without it, all of them")
    parser.add_argument("--tenth", action="store_true", help="a tenth of each")
    options = parser.parse_args(arguments)
    if unknown := set(options.names) - set(known):
        parser.error(f"there is no program {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    failed = []
    for program in PROGRAMS:
        if options.names and program.name not in options.names:
            continue
        command = program.command(tenth=options.tenth)
        print(f"==== python tests/{Path(command[1]).name} {' '.join(command[2:])}", flush=True)
        began = time.monotonic()
        status = subprocess.run(command, env=environment(), check=False).returncode
        print(
            f"==== {'passed' if status == 0 else f'FAILED (status {status})'} after {time.monotonic() - began:.0f} s", flush=True
        )
        if status:
            failed.append(program.name)
    print(f"==== FAILED: {', '.join(failed)}" if failed else "==== all passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
