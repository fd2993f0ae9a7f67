"""Small real videos of every kind that matters to fetching, made by ffmpeg."""

from __future__ import annotations

import subprocess
from pathlib import Path

from curation.video.ffmpeg import ffmpeg_exe

# Planted in every clip of _tagged; none may be in a stored file.
SECRETS = ("Planted Title", "Planted Artist", "+48.1371+011.5754", "Planted Chapter", "Planted Comment")


def _ffmpeg(*arguments: str | Path) -> None:
    subprocess.run([ffmpeg_exe(), "-y", "-nostdin", "-loglevel", "error", *map(str, arguments)], check=True)


def make_clips(folder: Path) -> None:
    """Two-second clips, 64x36 at 30 frames a second."""
    made = ["-f", "lavfi", "-i", "testsrc2=s=64x36:r=30:d=2"]
    h264 = ["-c:v", "libx264", "-preset", "veryfast", "-pix_fmt", "yuv420p"]
    base = folder / "base.mp4"
    _ffmpeg(*made, *h264, "-g", "15", "-bf", "2", base)
    # a stream copy that begins between key frames: an edit list hides the pre-roll
    _ffmpeg("-ss", "0.7", "-i", base, "-c", "copy", folder / "edited.mp4")
    _ffmpeg("-display_rotation", "90", "-i", base, "-c", "copy", folder / "rotated.mp4")
    _ffmpeg("-display_rotation", "90", "-i", base, "-c", "copy", folder / "rotated.mkv")
    _ffmpeg(*made, "-vf", "setsar=2/1", *h264, folder / "anamorphic.mp4")
    _ffmpeg(
        *made,
        "-vf",
        "select='not(mod(n,3))+between(n,20,30)',setpts=PTS+0.5/TB",
        "-fps_mode",
        "vfr",
        *h264,
        folder / "variable.mp4",
    )
    _ffmpeg(*made, *h264, "-output_ts_offset", "5", folder / "late.mkv")
    _ffmpeg(*made, *h264, "-movflags", "frag_keyframe+empty_moov", folder / "fragmented.mp4")
    _ffmpeg(*made, *h264, folder / "stream.ts")
    _ffmpeg(*made, "-c:v", "libvpx-vp9", "-deadline", "realtime", "-cpu-used", "8", folder / "vp9.webm")
    _ffmpeg(*made, "-c:v", "prores_ks", folder / "prores.mov")
    _ffmpeg(*made, "-c:v", "mpeg4", "-bf", "2", folder / "old.avi")
    _ffmpeg(*made, *h264, "-movflags", "+faststart", folder / "header-first.mp4")
    # the first video track is a preview, not the picture
    preview = ["-f", "lavfi", "-i", "testsrc2=s=32x18:r=1:d=2"]
    _ffmpeg(*preview, "-i", base, "-map", "0", "-map", "1", *h264, folder / "preview.mp4")
    _tagged(base, folder)


def _tagged(base: Path, folder: Path) -> None:
    """Clips with title, artist, place, chapter, sound and cover art, as a platform or a telephone leaves them."""
    chapters = folder / "chapters.txt"
    chapters.write_text(f";FFMETADATA1\n[CHAPTER]\nTIMEBASE=1/1000\nSTART=0\nEND=1000\ntitle={SECRETS[3]}\n")
    cover = folder / "cover.png"
    _ffmpeg("-f", "lavfi", "-i", "color=red:s=640x640", "-frames:v", "1", cover)
    tags = [
        "-metadata",
        f"title={SECRETS[0]}",
        "-metadata",
        f"artist={SECRETS[1]}",
        "-metadata",
        f"comment={SECRETS[4]}",
    ]
    place = ["-metadata", f"location={SECRETS[2]}/"]
    sound = ["-f", "lavfi", "-i", "sine=d=2"]
    _ffmpeg(
        "-i",
        cover,
        "-i",
        base,
        *sound,
        "-i",
        chapters,
        "-map",
        "0",
        "-map",
        "1",
        "-map",
        "2",
        "-c",
        "copy",
        "-c:a",
        "aac",
        "-disposition:v:0",
        "attached_pic",
        "-map_chapters",
        "3",
        *tags,
        *place,
        "-metadata:s:v:1",
        f"title={SECRETS[0]}",
        folder / "tagged.mp4",
    )
    _ffmpeg(
        "-i",
        base,
        "-i",
        chapters,
        "-c",
        "copy",
        "-map_chapters",
        "1",
        *tags,
        *place,
        "-metadata:s:v:0",
        f"title={SECRETS[0]}",
        folder / "tagged.mkv",
    )
    _ffmpeg(
        "-i",
        base,
        "-c",
        "copy",
        "-movflags",
        "use_metadata_tags",
        *tags,
        "-metadata",
        f"com.apple.quicktime.location.ISO6709={SECRETS[2]}/",
        folder / "tagged.mov",
    )
    _ffmpeg(
        *sound,
        "-i",
        cover,
        "-map",
        "0",
        "-map",
        "1",
        "-c:v",
        "copy",
        "-disposition:v:0",
        "attached_pic",
        *tags,
        folder / "cover-only.mp3",
    )
    _ffmpeg(*sound, *tags, folder / "sound-only.m4a")
