"""Files that are no whole video are called what they are, not taken for short clips."""

from __future__ import annotations

from pathlib import Path

import av
import pytest

from curation.failures import ClipFailure, FailureCode
from curation.video.decode import decode, frames_at
from curation.video.index import index_video
from curation.video.intake import verify
from tests.support.numbered import ffmpeg


def code_of(act) -> FailureCode:
    with pytest.raises(ClipFailure) as caught:
        act()
    assert "/" not in caught.value.message  # a message is for people, and names no path
    return caught.value.code


def decode_all(path):
    index = index_video(path)
    return [number for number, _ in decode(index, 0, len(index.times_s))]


def cut(source: Path, target: Path, share: float) -> Path:
    data = source.read_bytes()
    target.write_bytes(data[: int(share * len(data))])
    return target


@pytest.mark.parametrize("share", [0.1, 0.6, 0.97])
def test_a_download_that_broke_off_is_corrupt(video, tmp_path, share):
    early = tmp_path / "early.mp4"
    ffmpeg("-i", video("many-groups.mp4").path, "-c", "copy", "-movflags", "+faststart", early)
    assert len(decode_all(early)) == 300
    assert code_of(lambda: index_video(cut(early, tmp_path / "cut.mp4", share))) is FailureCode.CORRUPT
    assert code_of(lambda: verify(tmp_path / "cut.mp4")) is FailureCode.CORRUPT


@pytest.mark.parametrize("name", ["vp9.webm", "plain.mkv", "late.mkv"])
def test_a_cut_matroska_file_is_corrupt(video, tmp_path, name):
    path = video(name).path
    assert len(decode_all(path)) == 60
    assert code_of(lambda: index_video(cut(path, tmp_path / name, 0.6))) is FailureCode.CORRUPT


def test_a_file_without_its_index_is_corrupt(video, tmp_path):
    path = cut(video("plain.mp4").path, tmp_path / "cut.mp4", 0.6)
    assert code_of(lambda: index_video(path)) is FailureCode.CORRUPT


@pytest.mark.parametrize("name", ["many-groups.mp4", "hevc.mp4", "vp9.webm", "av1.mp4"])
def test_a_hole_in_the_data_is_found_when_its_frames_are_decoded(video, tmp_path, name):
    data = bytearray(video(name).path.read_bytes())
    middle, hole = len(data) // 2, len(data) // 10
    data[middle : middle + hole] = bytes(hole)
    path = tmp_path / name
    path.write_bytes(data)
    assert code_of(lambda: decode_all(path)) is FailureCode.CORRUPT


def test_the_part_before_a_hole_is_still_good(video, tmp_path):
    data = bytearray(video("many-groups.mp4").path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 5000] = bytes(5000)
    path = tmp_path / "hole.mp4"
    path.write_bytes(data)
    index = index_video(path)
    assert [number for number, _ in decode(index, 0, 48)] == list(range(48))
    assert code_of(lambda: frames_at(index, index.times_s.tolist(), 70, 42)) is FailureCode.CORRUPT


def test_a_frame_that_the_decoder_calls_damaged_is_none(video, tmp_path):
    """A transport stream declares no count; a lost packet of it leaves frames that are marked."""
    data = video("stream.ts").path.read_bytes()
    packets = [data[start : start + 188] for start in range(0, len(data), 188)]
    codes = []
    for lost in range(len(packets) // 3, len(packets) - 5, 9):
        path = tmp_path / f"{lost}.ts"
        path.write_bytes(b"".join(packets[:lost] + packets[lost + 1 :]))
        try:
            decode_all(path)
        except ClipFailure as error:
            codes.append(error.code)
    assert codes and set(codes) == {FailureCode.CORRUPT}


def test_a_picture_that_nothing_decodes_is_no_video(video, tmp_path):
    path = tmp_path / "unknown.mkv"
    path.write_bytes(video("plain.mkv").path.read_bytes().replace(b"V_MPEG4/ISO/AVC", b"V_MPEG4/ISO/ZZZ"))
    assert code_of(lambda: index_video(path)) is FailureCode.NO_VIDEO


def test_cover_art_and_sound_are_no_video(tmp_path):
    cover, song, plain = tmp_path / "cover.png", tmp_path / "song.mp3", tmp_path / "sound.m4a"
    sound = ["-f", "lavfi", "-i", "sine=d=1"]
    ffmpeg("-f", "lavfi", "-i", "color=red:s=64x64", "-frames:v", "1", cover)
    ffmpeg(*sound, "-i", cover, "-map", "0", "-map", "1", "-c:v", "copy", "-disposition:v:0", "attached_pic", song)
    ffmpeg(*sound, plain)
    with av.open(str(song)) as container:
        assert len(container.streams.video) == 1
    assert code_of(lambda: index_video(song)) is FailureCode.NO_VIDEO
    assert code_of(lambda: index_video(plain)) is FailureCode.NO_VIDEO


def test_sound_that_lasts_longer_than_the_picture_is_no_damage(video, tmp_path):
    path = tmp_path / "long-sound.mkv"
    ffmpeg("-i", video("plain.mkv").path, "-f", "lavfi", "-i", "sine=d=4", "-c:v", "copy", path)
    assert len(decode_all(path)) == 60


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"<!doctype html><html><title>Video unavailable</title></html>" * 40,
        b"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n{clip}\n#EXT-X-ENDLIST\n",
        b"ffconcat version 1.0\nfile {clip}\n",
    ],
)
def test_what_is_no_video_container_is_corrupt(video, tmp_path, content):
    """A playlist above all: read as one, it would open whatever file or address it names."""
    for name in ("video.mp4", "video.m3u8"):
        path = tmp_path / name
        path.write_bytes(content.replace(b"{clip}", str(video("stream.ts").path).encode()))
        assert code_of(lambda path=path: index_video(path)) is FailureCode.CORRUPT


def test_the_index_is_made_anew_when_the_file_changes(video, tmp_path):
    path = tmp_path / "video.mp4"
    path.write_bytes(video("plain.mp4").path.read_bytes())
    assert len(index_video(path).times_s) == 90
    path.write_bytes(video("many-groups.mp4").path.read_bytes())
    assert len(index_video(path).times_s) == 300
