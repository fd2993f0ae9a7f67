"""The authentication string of the Prefect server that this checkout starts.

A run's parameters name weights, which are unpickled, so anyone who can create a run can run code as the owner. The
server therefore requires an authentication string ("user:password") with every request. The first start creates it in
PREFECT_HOME, which only the owner can read; Prefect's own environment variable PREFECT_API_AUTH_STRING overrides it.
This module writes the string only to that file and to environments, never to a command line or a log.
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
_RETRY = "delete it, then create a new one with: python -m flows.service start"


def make_private(home: Path) -> None:
    """Create the folder if it does not exist, and deny other users access to it and to every file in it.

    Raises UsageError if it belongs to another user.
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
    """The error message for a PREFECT_HOME that belongs to another user."""
    return f"{home} belongs to another user; choose your own folder with: export PREFECT_HOME=FOLDER"


def write_private(path: Path, text: str) -> None:
    """Write a file that no other user can read, atomically."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)  # mkstemp makes it 0600
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def auth_string(home: Path) -> str | None:
    """The string from the environment, or else from the file; None if there is neither.

    Raises UsageError if it cannot be read, or is not valid in the HTTP header that Prefect sends.
    """
    where, string = VARIABLE, os.environ.get(VARIABLE, "")
    if not string:
        path = home / FILE
        try:
            where, string = f"{path}; {_RETRY}", path.read_text(encoding="utf-8").strip()
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError):  # a folder, or bytes that are not text
            raise UsageError(f"The authentication string cannot be read from {path}; {_RETRY}") from None
    if not (":" in string and string.isascii() and string.isprintable()):
        raise UsageError(f"The authentication string must be USER:PASSWORD in ASCII; check {where}")
    return string


def make_auth_string(home: Path) -> str:
    """The string to use; the first call creates it. `home` must already be private."""
    string = auth_string(home)
    if string is None:
        string = f"unish:{secrets.token_urlsafe(32)}"
        write_private(home / FILE, f"{string}\n")
    return string


def fingerprint(string: str | None) -> str:
    """A hash of the string, to compare two strings without storing them; empty for None."""
    return hashlib.sha256(string.encode()).hexdigest() if string else ""


def server_environment(string: str, api_url: str) -> dict[str, str]:
    """Settings for a server at `api_url` that requires the string and accepts only its own web pages.

    Cross-site tokens stay off: they protect credentials that a browser sends automatically, and it sends none here.
    Prefect's own pages add the string to each request, and a refusal does not make a browser ask for it and keep it.
    """
    port = f":{number}" if (number := urlsplit(api_url).port) else ""
    return {
        "PREFECT_SERVER_API_AUTH_STRING": string,
        "PREFECT_SERVER_API_CORS_ALLOWED_ORIGINS": f"http://127.0.0.1{port},http://localhost{port}",
    }
