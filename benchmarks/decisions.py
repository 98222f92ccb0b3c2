"""How many decisions a second a decision log takes, by its threads and processes.

    python benchmarks/decisions.py [DIRECTORY]

The directory, which is made anew in the present one unless it is given, must be on a real disk: a decision waits for it.
"""

from __future__ import annotations

import multiprocessing
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from app_db._two_phase.decision_file import FileLog
from app_db._two_phase.decisions import Verdict
from app_db._two_phase.xids import new_unit_id

if TYPE_CHECKING:
    from multiprocessing.synchronize import Barrier

SECONDS = 1.5
ROUNDS = 5
BATCH = 200
"""How many decisions are kept before they are forgotten in one go, as a container does."""

WRITERS = ((1, 1), (1, 8), (1, 32), (2, 4))
"""Processes, and threads in each."""


def main(directory: Path) -> None:
    """Print the table."""
    print("\nDecisions a second in a file: median of the rounds (slowest, fastest)")
    for processes, threads in WRITERS:
        rates = [_rate(directory / f"{processes}x{threads}-{turn}", processes, threads) for turn in range(ROUNDS)]
        who = f"{processes} process{'es' * (processes > 1)} of {threads} thread{'s' * (threads > 1)}"
        print(f"{who:<26}{statistics.median(rates):>8.0f}   ({min(rates):.0f}, {max(rates):.0f})")


def _rate(path: Path, processes: int, threads: int) -> float:
    log_id = FileLog(path).id
    together, counts = multiprocessing.Barrier(processes), multiprocessing.Queue()
    arguments = (path, log_id, threads, together, counts)
    workers = [multiprocessing.Process(target=_decide_all, args=arguments) for _ in range(processes)]
    for worker in workers:
        worker.start()
    decided = sum(counts.get() for _ in workers)
    for worker in workers:
        worker.join()
    return decided / SECONDS


def _decide_all(path: Path, log_id: str, threads: int, together: Barrier, counts: multiprocessing.Queue[int]) -> None:
    log, done = FileLog(path), [0] * threads
    units = [new_unit_id(log_id)]
    log.decide(units[0], Verdict.COMMIT, ["warehouse", "writer"])
    together.wait()
    end = time.monotonic() + SECONDS

    def work(number: int) -> None:
        mine: list[str] = []
        while time.monotonic() < end:
            mine.append(new_unit_id(log_id))
            if log.decide(mine[-1], Verdict.COMMIT, ["warehouse", "writer"]) is not Verdict.COMMIT:
                raise AssertionError(mine[-1])
            done[number] += 1
            if len(mine) >= BATCH:
                log.forget(mine)
                mine.clear()

    writers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    counts.put(sum(done))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory(dir=".") as made:
            main(Path(made))
