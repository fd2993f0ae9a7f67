"""The command `curation`. Thin: every command calls one function of the library."""

from curation.cli.main import main

__all__ = ["main"]
