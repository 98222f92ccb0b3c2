"""Writers, readers, time limits, two-phase units and recovery, all at once through PgBouncer, in both of its modes.

    python tests/poolers_under_load.py --seconds 30
    python tests/poolers_under_load.py --seconds 30 --mode session --driver asyncpg

Threads and tasks share two server connections for each database, with a plain program beside them. Each mode and each driver
takes that many seconds, and each line says what was done in them. The exit status is 1 if a writer was refused, a reader wrote,
a unit's rows are not as acknowledged, or a server connection is not as it was when it was made.
"""

from __future__ import annotations

import argparse
import sys
from itertools import product

from harness.pooled_load import Load
from harness.poolers import PgBouncer
from harness.requiring import REQUIRED
from harness.servers import PostgresServer, ServerMissing, Setting

MODES = ("transaction", "session")
DRIVERS = ("psycopg", "asyncpg")

EXAMPLES = 5
"""How many things that went wrong are shown for each."""

POSTGRESQL: dict[str, Setting] = {"max_prepared_transactions": 200}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=30, help="for each mode and driver")
    parser.add_argument("--mode", choices=MODES)
    parser.add_argument("--driver", choices=DRIVERS, help="of coroutines; threads use psycopg")
    options = parser.parse_args(arguments)
    wrong = 0
    server = PostgresServer(settings=POSTGRESQL).start()
    try:
        for mode, driver in product([options.mode] if options.mode else MODES, [options.driver] if options.driver else DRIVERS):
            pooler = PgBouncer(server, mode=mode)
            try:
                seen = Load(driver, mode, server, pooler).run(options.seconds)
            finally:
                pooler.close()
            print(f"{mode} {driver}: {dict(seen.done)}, {len(seen.wrong)} wrong", flush=True)
            for example in seen.wrong[:EXAMPLES]:
                print(f"    {example}", flush=True)
            wrong += len(seen.wrong)
    except ServerMissing as missing:
        print(f"not run: {missing}")
        return int(REQUIRED)
    finally:
        server.close()
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
