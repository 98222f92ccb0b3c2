"""The fixtures are in a module, from which tests can import."""

pytest_plugins = ["testing.beside.fixtures"]
