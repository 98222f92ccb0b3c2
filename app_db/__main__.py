"""`python -m app_db`."""

import sys

from app_db.cli import main

sys.exit(main())
