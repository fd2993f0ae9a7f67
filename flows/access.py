"""Who may talk to the Prefect server that this checkout starts: whoever can read one file of its owner.

A run's parameters name weights, which are unpickled, so whoever may create runs may run code as the owner. The server
therefore asks every request for an authentication string ("user:password"). It is made at the first start and kept in
PREFECT_HOME, where nobody else may look; the environment variable PREFECT_API_AUTH_STRING, Prefect's own, comes first.
This module never puts the string on a command line, into a log or into anything but that file and environments.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import tempfile
from pathlib import Path
from urllib.parse import urlsplit

from curation.failures import UsageError

VARIABLE = "PREFECT_API_AUTH_STRING"
FILE = "auth-string"
_RETRY = "delete it, and a new one is made by: python -m flows.service start"


def make_private(home: Path) -> None:
    """Make the folder if need be, and keep other users out of it and of every file that lies in it.

    Raises UsageError if it belongs to somebody else.
    """
    home.mkdir(parents=True, exist_ok=True)
    try:
        home.chmod(0o700)
    except PermissionError:
        raise UsageError(not_yours(home)) from None
    for path in home.iterdir():
        if path.is_file() and not path.is_symlink() and path.stat().st_mode & 0o077:
            path.chmod(path.stat().st_mode & 0o700)


def not_yours(home: Path) -> str:
    """What to do about a PREFECT_HOME that belongs to somebody else."""
    return f"{home} is another user's folder; choose your own with: export PREFECT_HOME=FOLDER"


def write_private(path: Path, text: str) -> None:
    """Write a whole file that nobody else may read, under its name only when it is complete."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)  # mkstemp makes it 0600
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def auth_string(home: Path) -> str | None:
    """The string to use: that of the environment, or that of the file; None if there is neither.

    Raises UsageError for one that cannot be read, or cannot go into an HTTP header as Prefect sends it.
    """
    where, string = VARIABLE, os.environ.get(VARIABLE, "")
    if not string:
        path = home / FILE
        try:
            where, string = f"{path}; {_RETRY}", path.read_text(encoding="utf-8").strip()
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError):  # a folder, or bytes that are no text
            raise UsageError(f"The authentication string cannot be read from {path}; {_RETRY}") from None
    if not (":" in string and string.isascii() and string.isprintable()):
        raise UsageError(f"An authentication string reads USER:PASSWORD, in ASCII. It is not so in {where}")
    return string


def make_auth_string(home: Path) -> str:
    """The string to use; the first call makes it. `home` must be private already."""
    string = auth_string(home)
    if string is None:
        string = f"unish:{secrets.token_urlsafe(32)}"
        write_private(home / FILE, f"{string}\n")
    return string


def fingerprint(string: str | None) -> str:
    """What tells two strings apart and says nothing about them to who may not read them; empty for None."""
    return hashlib.sha256(string.encode()).hexdigest() if string else ""


def server_environment(string: str, api_url: str) -> dict[str, str]:
    """Settings of a server at `api_url` that takes requests with the string alone, and answers no page but its own.

    No cross-site tokens: they protect credentials that a browser sends by itself, and it sends none here. Prefect's own
    pages add the string to each request, and a refusal does not make a browser ask for it and keep it.
    """
    port = f":{number}" if (number := urlsplit(api_url).port) else ""
    return {
        "PREFECT_SERVER_API_AUTH_STRING": string,
        "PREFECT_SERVER_API_CORS_ALLOWED_ORIGINS": f"http://127.0.0.1{port},http://localhost{port}",
    }
