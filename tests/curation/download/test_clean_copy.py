"""What is taken for a video, and what a clean copy keeps and loses."""

from __future__ import annotations

import itertools
import re
import struct
import sys
from pathlib import Path

import av
import pytest

from curation.failures import ClipFailure, FailureCode, UsageError
from curation.video.container import container_format
from curation.video.ffmpeg import ffmpeg_exe
from curation.video.index import index_video
from curation.video.intake import strip
from curation.video.scrub import scrub
from tests.support.made_clips import SECRETS

KINDS = [
    ("base.mp4", ".mp4"),
    ("edited.mp4", ".mp4"),
    ("rotated.mp4", ".mp4"),
    ("rotated.mkv", ".mp4"),
    ("anamorphic.mp4", ".mp4"),
    ("variable.mp4", ".mp4"),
    ("late.mkv", ".mp4"),
    ("fragmented.mp4", ".mp4"),
    ("stream.ts", ".mp4"),
    ("old.avi", ".mp4"),
    ("vp9.webm", ".webm"),
    ("prores.mov", ".mov"),
    ("tagged.mp4", ".mp4"),
    ("tagged.mkv", ".mp4"),
    ("tagged.mov", ".mp4"),
]


def stripped(source: Path, folder: Path) -> Path:
    return strip(index_video(source), container_format(source), folder / "video")


@pytest.mark.parametrize(("name", "suffix"), KINDS)
def test_a_clean_copy_shows_the_same_frames_at_the_same_times(clips, frames_of, tmp_path, name, suffix):
    source = clips / name
    clean = stripped(source, tmp_path)
    assert clean.name == "video" + suffix
    before, after = frames_of(source), frames_of(clean)
    assert len(before) >= 19
    assert [frame[1:] for frame in after] == [frame[1:] for frame in before]
    assert [frame[0] for frame in after] == pytest.approx([frame[0] for frame in before], abs=1e-4)
    old, new = index_video(source), index_video(clean)
    assert (old.width, old.height, old.rotation, old.codec) == (new.width, new.height, new.rotation, new.codec)


def test_the_kinds_are_what_their_names_say(clips, frames_of):
    assert {rotation for _, _, rotation in frames_of(clips / "rotated.mp4")} == {90}
    assert index_video(clips / "anamorphic.mp4").width == 128
    times = [frame[0] for frame in frames_of(clips / "variable.mp4")]
    steps = {round(b - a, 3) for a, b in itertools.pairwise(times)}
    assert len(steps) > 1
    assert index_video(clips / "edited.mp4").edited
    with av.open(str(clips / "tagged.mp4")) as container:
        assert len(container.streams.video) == 2
        assert len(container.streams.audio) == 1
        assert len(container.chapters()) == 1


@pytest.mark.parametrize("name", ["tagged.mp4", "tagged.mkv", "tagged.mov"])
def test_no_title_artist_place_chapter_cover_or_sound_is_left(clips, tmp_path, name):
    planted = (clips / name).read_bytes()
    assert sum(secret.encode() in planted for secret in SECRETS) >= 4
    clean = stripped(clips / name, tmp_path)
    data = clean.read_bytes()
    assert [secret for secret in SECRETS if secret.encode() in data] == []
    assert b"48.1" not in data
    with av.open(str(clean)) as container:
        assert [stream.type for stream in container.streams] == ["video"]
        assert container.streams.video[0].width == 64
        assert not container.chapters()
        assert set(container.metadata) <= {"major_brand", "minor_version", "compatible_brands", "encoder"}
        assert set(container.streams.video[0].metadata) <= {"language", "handler_name", "DURATION", "vendor_id"}


def test_a_file_that_no_muxer_writes_again_is_blanked_in_place(clips, tmp_path):
    """Two edits: the second half of the film, then the first."""
    data = bytearray((clips / "tagged.mp4").read_bytes())
    assert sum(secret.encode() in data for secret in SECRETS) >= 4
    tracks = [found.start() for found in re.finditer(b"trak", data)]
    film = next(t for t in tracks if b"avc1" in data[t : t + int.from_bytes(data[t - 4 : t], "big")])
    place = data.index(b"edts", film)  # its one edit, in a box of its own, gives way to two that fill it and a bit more
    old = int.from_bytes(data[place - 4 : place], "big")
    scale = int.from_bytes(data[data.index(b"mvhd") + 16 :][:4], "big")
    media = int.from_bytes(data[data.index(b"mdhd", film) + 16 :][:4], "big")
    edits = b"".join(struct.pack(">IiI", scale // 2, media * start // 30, 1 << 16) for start in (30, 2))
    listed = struct.pack(">I4sII", 16 + len(edits), b"elst", 0, 2) + edits
    grown = 8 + len(listed) - old
    new = data[: place - 4] + struct.pack(">I4s", 8 + len(listed), b"edts") + listed + data[place - 4 + old :]
    for holder in (film - 4, data.index(b"moov") - 4):
        new[holder : holder + 4] = struct.pack(">I", int.from_bytes(new[holder : holder + 4], "big") + grown)
    assert data.index(b"mdat") < data.index(b"moov")  # so no sample moves
    source = tmp_path / "edits.mp4"
    source.write_bytes(new)
    index = index_video(source)
    clean = stripped(source, tmp_path)
    assert len(index.times_s) == 30
    copy = index_video(clean)
    assert copy.times_s == pytest.approx(index.times_s)
    bytes_left = clean.read_bytes()
    assert [secret for secret in SECRETS if secret.encode() in bytes_left] == []
    grown = b"".join([new, b"\x00\x00\x00\x10skip12345678", b"tail"])  # a box of nobody's, and no box
    source.write_bytes(grown)
    assert b"12345678" not in (again := stripped(source, tmp_path).read_bytes()) and b"tail" not in again
    with av.open(str(clean)) as container:
        assert [stream.type for stream in container.streams] == ["video"]
        assert not container.chapters()


@pytest.mark.parametrize("box", [b"mvhd", b"tkhd", b"hdlr", b"stsd"])
def test_a_box_that_is_too_short_is_no_reason_to_write_over_its_neighbours(clips, tmp_path, box):
    data = bytearray((clips / "base.mp4").read_bytes())
    place = data.index(box)
    data[place - 4 : place] = (8).to_bytes(4, "big")
    (tmp_path / "short.mp4").write_bytes(data)
    with pytest.raises(ValueError, match="ends at"):
        scrub(tmp_path / "short.mp4", 1, [], tmp_path / "written.mp4")


def test_the_picture_is_copied_and_not_a_preview_before_it(clips, tmp_path):
    with av.open(str(clips / "preview.mp4")) as container:
        assert [stream.width for stream in container.streams.video] == [32, 64]
    with av.open(str(stripped(clips / "preview.mp4", tmp_path))) as container:
        assert [stream.width for stream in container.streams.video] == [64]


def test_the_same_file_gives_the_same_bytes(clips, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    for name in ("base.mp4", "vp9.webm"):
        first, second = stripped(clips / name, tmp_path / "a"), stripped(clips / name, tmp_path / "b")
        assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"<!doctype html><html><title>Video unavailable</title></html>" * 40,
        b"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\nfile://{clip}\n#EXT-X-ENDLIST\n",
        b"ffconcat version 1.0\nfile {clip}\n",
        b'<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011"></MPD>',
        b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\n",
    ],
)
def test_pages_playlists_and_lists_of_files_are_no_video(clips, tmp_path, content):
    path = tmp_path / "video.mp4"
    path.write_bytes(content.replace(b"{clip}", str(clips / "stream.ts").encode()))
    with pytest.raises(ClipFailure) as caught:
        container_format(path)
    assert caught.value.code is FailureCode.CORRUPT
    assert str(tmp_path) not in caught.value.message
    assert caught.value.__context__ is None


def test_a_playlist_would_be_followed_without_the_list_of_formats(clips, tmp_path):
    path = tmp_path / "video.m3u8"
    path.write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n{clips / 'stream.ts'}\n#EXT-X-ENDLIST\n")
    with av.open(str(path)) as container:
        assert container.format.name == "hls"
    with pytest.raises(ClipFailure):
        container_format(path)


def test_without_any_ffmpeg_the_user_is_told_what_to_install(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    ffmpeg_exe.cache_clear()
    try:
        with pytest.raises(UsageError, match="install ffmpeg"):
            ffmpeg_exe()
    finally:
        ffmpeg_exe.cache_clear()
