"""The pytest plugin of app_db: fixtures over `app_db.testing`. It does nothing for a project that doesn't use them.

It is a package beside `app_db`, because pytest imports a plugin and the plugin's package when it
starts. In `app_db`, it would make every project that has app_db installed wait for SQLAlchemy.
Coverage begins to measure later, and would miss what the package does when it is imported. So its
modules import pytest and the standard library only, and app_db when a fixture is used.
"""

pytest_plugins = [
    "pytest_app_db.options",
    "pytest_app_db.lasting",
    "pytest_app_db.containers",
    "pytest_app_db.isolating",
    "pytest_app_db.cases",
    "pytest_app_db.fresh",
    "pytest_app_db.counting",
    "pytest_app_db.serving",
    "pytest_app_db.isolated_only",
]
"""The modules with hooks and fixtures. pytest imports them."""
