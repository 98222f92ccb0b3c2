"""`python -m app_db`."""

import sys

from app_db.cli._commands import main

sys.exit(main())
