"""After a run, no byte on the disk or the screen tells what the served files and the server said of themselves.

Titles, names, descriptions, places, subtitles, chapters, covers and attachments are planted in real containers, and
more words in headers, redirects and error pages. The whole pipeline runs in a process with a home of its own; then
every file below that home is searched, inside and out. The same search must find every word in what was served.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import socket
import sqlite3
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import av
import pyarrow.parquet as pq
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from curation.catalog import Catalog
from curation.judge.policy import load_policy
from curation.video.ffmpeg import ffmpeg_exe
from tests.support.servers import Fault, FileServer, redirect

ROOT = Path(__file__).parents[2]
TAGS = {
    name: f"Zq{name.title().replace('_', '')}Vx"
    for name in (
        "title", "artist", "author", "album_artist", "album", "composer", "comment", "description", "synopsis", "show",
        "copyright", "keywords", "performer", "director",
    )
}  # fmt: skip
IN_STREAMS = {
    name: f"Zq{name.title()}Vx" for name in ("handler", "track", "chapter", "subtitle", "attachment", "cover")
}
ENCODER = "ZqEncoder"
PLACE = ("+48.13719", "011.57549")  # ISO 6709
IN_FILES = {*TAGS.values(), *IN_STREAMS.values(), ENCODER, "48.13719", "11.57549"}
SAID = {
    name: f"Zq{name}Vx"
    for name in (
        "Server",
        "Cookie",
        "Filename",
        "Reason",
        "Tag",
        "Uploader",
        "Missing",
        "Busy",
        "Page",
        "Moved",
        "Junk",
        "Forbidden",
        "Slower",
        "Host",
        "Scheme",
        "Chunk",
        "Gzip",
        "Length",
        "Range",
        "Modified",
        "Type",
        "Hls",
        "Json",
        "Header",
        "Redirected",
    )
}
WHOLE = 10**9  # of a body; and then the connection ends
CHUNKED = Fault(headers={"Transfer-Encoding": "chunked"}, body=f"{SAID['Chunk']}\r\nno chunk".encode(), cut=WHOLE)
GZIP = Fault(headers={"Content-Encoding": "gzip"}, body=f"{SAID['Gzip']} is no gzip".encode() * 9, cut=WHOLE)
ODD = Fault(
    headers={
        "Content-Length": SAID["Length"],
        "Content-Range": f"bytes {SAID['Range']}",
        "Last-Modified": f"Mon, 01 Jan 99999 {SAID['Modified']}",
        "Content-Type": SAID["Type"],
        f"X-{SAID['Header']}": "é",
    },
    body=b"odd" * 99,
    cut=WHOLE,
)
FILES = ("phone.mp4", "camera.mov", "film.mkv", "web.webm")
FAULTY = tuple(
    f"{name}.mp4"
    for name in (
        "missing", "busy", "page", "moved", "junk", "forbidden", "away", "nowhere", "odd", "list", "json",
    )
)  # fmt: skip


# --- what is served


def ffmpeg(*arguments: str | Path) -> None:
    subprocess.run([ffmpeg_exe(), "-y", "-nostdin", "-loglevel", "error", *map(str, arguments)], check=True, timeout=60)


def make_site(clips: Path, site: Path, work: Path) -> None:
    """Four containers with every word of IN_FILES that they can hold, and a file that is no video."""
    subtitles, chapters, notes, cover = (work / name for name in ("s.srt", "c.txt", "notes.txt", "cover.png"))
    subtitles.write_text(f"1\n00:00:00,000 --> 00:00:01,500\nthe words {IN_STREAMS['subtitle']}\n")
    chapters.write_text(f";FFMETADATA1\n[CHAPTER]\nTIMEBASE=1/1000\nSTART=0\nEND=1000\ntitle={IN_STREAMS['chapter']}\n")
    notes.write_text(f"notes by {IN_STREAMS['attachment']}\n")
    text = PngInfo()
    text.add_text("Author", IN_STREAMS["cover"])
    Image.new("RGB", (64, 64), "red").save(cover, pnginfo=text)
    place = "".join(PLACE) + "/"
    tags = [word for name, value in TAGS.items() for word in ("-metadata", f"{name}={value}")]
    tags += ["-metadata", f"location={place}", "-metadata", f"com.apple.quicktime.location.ISO6709={place}"]
    tags += [
        "-metadata:s:v:0",
        f"handler_name={IN_STREAMS['handler']}",
        "-metadata:s:v:0",
        f"title={IN_STREAMS['track']}",
    ]
    tags += ["-metadata:s:a:0", f"title={IN_STREAMS['track']}"]
    sources = ["-i", clips / "bars.mp4", "-f", "lavfi", "-i", "sine=d=2", "-i", subtitles, "-i", chapters]
    maps = ["-map", "0:v", "-map", "1:a", "-map", "2:s", "-map_chapters", "3"]
    copy = ["-c:v", "copy", "-c:a", "aac"]
    with_cover = ["-i", cover, "-map", "4:v", "-c:v:1", "copy", "-disposition:v:1", "attached_pic"]
    ffmpeg(*sources, *with_cover[:2], *maps, *copy, *with_cover[2:], "-c:s", "mov_text", *tags, site / "phone.mp4")
    # A QuickTime film has a data track beside: its time code.
    everything = ["-movflags", "use_metadata_tags", "-timecode", "01:02:03:04"]
    ffmpeg(*sources, *maps, *copy, "-c:s", "mov_text", *everything, *tags, site / "camera.mov")
    attached = ["-attach", notes, "-metadata:s:t", "mimetype=text/plain"]
    ffmpeg(*sources, *maps, *copy, "-c:s", "srt", *attached, *tags, site / "film.mkv")
    vp9 = [
        "-c:v",
        "libvpx-vp9",
        "-deadline",
        "realtime",
        "-cpu-used",
        "8",
        "-c:a",
        "libopus",
        "-c:s",
        "webvtt",
    ]
    ffmpeg(*sources, *maps, *vp9, *tags, site / "web.webm")
    for name in FILES:  # the muxer signs with its own name, whatever it is told
        data = (site / name).read_bytes()
        (site / name).write_bytes(re.sub(rb"Lavf[0-9.]+", lambda it: ENCODER.encode().ljust(len(it[0]), b"x"), data))
    (site / "junk.mp4").write_bytes(f"no video, but {SAID['Junk']} ".encode() * 99)


class Talkative(FileServer):
    """A server that says more than is asked, in every answer."""

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        end, begin = request.end_headers, request.send_response_only

        def end_headers() -> None:
            request.send_header("Server", SAID["Server"])
            request.send_header("Set-Cookie", f"{SAID['Cookie']}={SAID['Cookie']}; Path=/; Max-Age=999999")
            request.send_header("Content-Disposition", f'attachment; filename="{SAID["Filename"]}.mp4"')
            request.send_header("ETag", f'"{SAID["Tag"]}"')
            request.send_header("X-Uploader", SAID["Uploader"])
            end()

        request.end_headers = end_headers  # type: ignore[method-assign]
        request.send_response_only = lambda code, message=None: begin(code, SAID["Reason"])  # type: ignore[method-assign]
        super()._answer(request)


@pytest.fixture(scope="module")
def server(clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Talkative]:
    site = tmp_path_factory.mktemp("site")
    make_site(clips, site, tmp_path_factory.mktemp("parts"))
    page = f"<html><title>{SAID['Page']}</title></html>".encode()
    faults: dict[str, Fault | list[Fault]] = {
        "/missing.mp4": Fault(status=404, body=f"{SAID['Missing']} was removed".encode()),
        "/busy.mp4": Fault(503, {"Retry-After": "300"}, f"{SAID['Busy']} is busy".encode()),
        "/forbidden.mp4": Fault(403, {"WWW-Authenticate": SAID["Forbidden"]}, SAID["Forbidden"].encode()),
        "/slower.mp4": Fault(429, {"Retry-After": "300"}, f"{SAID['Slower']}, please".encode()),
        "/away.mp4": redirect(f"http://{SAID['Host']}.invalid/{SAID['Redirected']}.mp4"),
        "/nowhere.mp4": redirect(f"{SAID['Scheme']}://[{SAID['Redirected']}"),
        "/chunked.mp4": CHUNKED,
        "/gzip.mp4": GZIP,
        "/odd.mp4": ODD,
        "/list.mp4": Fault(body=f"#EXTM3U\n#EXTINF:1,{SAID['Hls']}\n{SAID['Hls']}.ts\n".encode()),
        "/json.mp4": Fault(
            headers={"Content-Type": "application/json"}, body=b'{"error": "%s"}' % SAID["Json"].encode()
        ),
        "/page.mp4": Fault(status=200, headers={"Content-Type": "text/html"}, body=page),
        "/moved.mp4": redirect(f"/{SAID['Moved']}/bars.mp4"),
    }
    running = Talkative(site, faults)
    thread = threading.Thread(target=running._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield running
    running.closing.set()
    running._http.shutdown()
    running._http.server_close()
    thread.join()


# --- the search


def inside(path: Path) -> Iterator[bytes]:
    """The bytes of a file, and what is packed in it: rows of a database, columns of a table, packets of a video."""
    yield path.read_bytes()
    if path.suffix == ".sqlite":
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
            yield "\n".join(database.iterdump()).encode()
    elif path.suffix == ".parquet":
        table = pq.read_table(path, partitioning=None)
        yield repr(table.schema.metadata).encode() + repr(pq.read_metadata(path).metadata).encode()
        for column in table.columns:
            for value in column.to_pylist():
                yield value if isinstance(value, bytes) else repr(value).encode()
    elif path.suffix in (".mp4", ".mov", ".mkv", ".webm"):
        try:
            with av.open(str(path)) as container:
                streams = [(stream.type, dict(stream.metadata)) for stream in container.streams]
                yield repr((dict(container.metadata), streams, container.chapters())).encode()
                for packet in container.demux():
                    yield bytes(packet)
        except av.error.FFmpegError:
            return  # no video; its bytes were searched


def found(words: set[str], contents: Iterator[bytes]) -> set[str]:
    """Which words are in there, in UTF-8 or UTF-16, in capitals or not."""
    needles = [(w, w.lower().encode(code)) for w in words for code in ("utf-8", "utf-16-le", "utf-16-be")]
    seen: set[str] = set()
    for content in contents:
        small = content.lower()
        seen |= {word for word, needle in needles if word not in seen and needle in small}
    return seen


def below(*folders: Path) -> list[Path]:
    return [path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()]


def answer_of(server: FileServer, path: str) -> bytes:
    """All that the server sends for a path, from the first byte."""
    with socket.create_connection(("127.0.0.1", int(server.host.rpartition(":")[2])), timeout=10) as connection:
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: {server.host}\r\nConnection: close\r\n\r\n".encode())
        return b"".join(iter(lambda: connection.recv(65536), b""))


def test_the_search_finds_every_word_in_what_is_served(server: Talkative):
    everywhere = {path.name: found(IN_FILES, inside(path)) for path in below(server.folder)}
    assert set().union(*everywhere.values()) == IN_FILES
    for name in FILES:  # none is clean by itself
        assert len(everywhere[name]) >= 10, (name, IN_FILES - everywhere[name])
    paths = [f"/{name}" for name in (*FAULTY, "chunked.mp4", "gzip.mp4", "slower.mp4", "phone.mp4")]
    assert found({*SAID.values()}, (answer_of(server, path) for path in paths)) == {*SAID.values()}


def test_the_search_looks_into_databases_tables_and_other_alphabets(tmp_path: Path):
    import pyarrow as pa

    with closing(sqlite3.connect(tmp_path / "a.sqlite")) as database, database:
        database.execute("create table a (b)")
        database.execute("insert into a values (?)", ("x" * 4000 + "Zq" + "TitleVx" + "x" * 9000,))
    table = pa.table({"a": ["ZqArtistVx"] * 99, "b": [b"\0ZqJpegVx"] * 99})
    pq.write_table(table.replace_schema_metadata({"k": "ZqKeyVx"}), tmp_path / "a.parquet", compression="zstd")
    (tmp_path / "a.bin").write_bytes("é ZQWIDEVX".encode("utf-16-le") + b"!" + "ZqBigVx".encode("utf-16-be"))
    words = {"ZqTitleVx", "ZqArtistVx", "ZqJpegVx", "ZqKeyVx", "ZqWideVx", "ZqBigVx"}
    assert found({*words, "ZqNeverVx"}, itertools.chain.from_iterable(map(inside, below(tmp_path)))) == words


# --- the run

COMMANDS = """
import json, sys
from curation.cli import main
if __name__ == "__main__":
    for words in json.loads(sys.argv[1]):
        sys.argv = ["curation", *words]
        try:
            main()
        except SystemExit as ended:
            assert not ended.code, words
"""


def test_a_run_leaves_no_trace_of_what_files_and_servers_say(
    server: Talkative, seer: Path, tolerant: Path, tmp_path: Path
):
    home = tmp_path / "home"
    places = {"HOME": home, "TMPDIR": home / "tmp", "UNISH_CACHE": Path(os.environ["UNISH_CACHE"])}
    places |= {f"XDG_{name}_HOME": home / name.lower() for name in ("CACHE", "CONFIG", "DATA", "STATE")}
    for place in (*places.values(), home / "place"):
        place.mkdir(parents=True, exist_ok=True)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("UNISH_", "XDG_"))}
    environment = kept | {name: str(place) for name, place in places.items()} | {"PYTHONPATH": str(ROOT)}
    names = [*FILES, *FAULTY, "mixed.mp4", "slower.mp4"]  # the last one has the server left alone
    gone = Fault(404, body=f"{SAID['Missing']} was removed".encode())
    server.script("/mixed.mp4", [CHUNKED, GZIP, gone])  # the first two are tried again
    manifest = home / "place" / "m.csv"
    manifest.write_text("platform,video_id\n" + "".join(f"http,{server.url('/' + name)}\n" for name in names))
    printed: list[bytes] = []

    def curation(*commands: Sequence[str | Path]) -> subprocess.CompletedProcess[bytes]:
        command = [sys.executable, "-c", COMMANDS, json.dumps(commands, default=str)]
        done = subprocess.run(
            command, env=environment, cwd=home / "place", capture_output=True, timeout=240, check=False
        )
        printed.extend((done.stdout, done.stderr))
        assert done.returncode == 0, done.stderr.decode()[-2000:]
        return done

    polite = [
        "--pause",
        "0",
        "0",
        "--videos-per-hour",
        "0",
        "--workers",
        "1",
        "--batch-clips",
        "3",
        "--min-free-mb",
        "0",
    ]
    with_parts = ["--policy", tolerant, "--detector", seer, "--teacher", "none"]
    curation(["run", manifest, "--out", "out", *with_parts, "--http-host", server.host, "--allow-loopback", *polite])
    catalog = Catalog(f"sqlite:///{home}/place/out/catalog.sqlite")
    counts = catalog.funnel(None, load_policy(tolerant).hash)
    assert (counts.clips, counts.downloaded, counts.sharded) == (len(names), len(FILES), len(FILES)), counts
    assert sum(counts.failed.values()) == len(names) - len(FILES)
    codes = Counter(attempt.code.value for attempt in catalog.failures() if attempt.code)
    assert codes == {
        "removed": 3, "http_5xx": 1, "private": 1, "refused": 2, "corrupt": 5, "rate_limited": 1,
    }  # fmt: skip
    failed = {attempt.code: attempt.clip_id for attempt in catalog.failures()}
    curation(
        ["judge", "--out", "out", "--policy", "paper"],
        ["status", "--out", "out", "--policy", tolerant],
        ["failures", "--out", "out"],
        *(["inspect", clip_id, "--out", "out"] for clip_id in failed.values()),
    )

    words = IN_FILES | {*SAID.values()}
    files = below(home, places["UNISH_CACHE"])
    assert {".sqlite", ".parquet", ".mp4"} <= {path.suffix for path in files}
    traces = {str(path): hit for path in files if (hit := found(words, inside(path)))}
    assert not traces
    assert not found(words, iter(printed))
    assert not found(words, iter([str(path).encode() for path in files])), "nor in a name"
