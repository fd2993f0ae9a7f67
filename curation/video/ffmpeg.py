"""Finds the ffmpeg program. Never downloads one."""

from __future__ import annotations

import functools
import shutil

from curation.failures import UsageError


@functools.cache
def ffmpeg_exe() -> str:
    """Path of the system's ffmpeg, or of the one that imageio-ffmpeg carries; UsageError if there is neither."""
    if system := shutil.which("ffmpeg"):
        return system
    try:
        import imageio_ffmpeg

        return imageio_ffmpeg.get_ffmpeg_exe()
    except (ImportError, RuntimeError) as error:
        raise UsageError("No ffmpeg found: install ffmpeg, or `pip install imageio-ffmpeg`.") from error
