"""`python -m app_db`."""

import sys

from app_db.cli.commands import main

sys.exit(main())
