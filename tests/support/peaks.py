"""How much memory a piece of work takes at its highest, in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

# Not ru_maxrss: a process inherits that of the one that started it.
_MEASURE = """
import re, sys
from pathlib import Path
def peak():
    return int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024
def start():
    global before
    before = peak()
"""


def peak_mb(script: str, *arguments: str | Path) -> float:
    """By how many MB the peak of a process grows from the script's call of start() to its end; arguments in argv."""
    if not Path("/proc/self/status").exists():
        pytest.skip("only Linux says how much memory a process took")
    command = [sys.executable, "-c", f"{_MEASURE}{script}\nprint(peak() - before)", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return float(done.stdout.split()[-1])
