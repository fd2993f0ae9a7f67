"""Manifests: what is read back, what is refused and how the row is named."""

from __future__ import annotations

import itertools
import json
import math
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from curation.failures import UsageError
from curation.manifest import COLUMNS, MAX_SECONDS, ManifestError, read_manifest, write_manifest
from curation.platforms import PLATFORMS, validate_video_id
from curation.records import ClipRef
from tests.support.examples import examples

SUFFIXES = (".csv", ".jsonl", ".parquet")


def problems(path, **options):
    with pytest.raises(ManifestError) as caught:
        read_manifest(path, **options)
    found = caught.value.problems
    assert found
    assert str(found[0].row) in str(caught.value)
    return [(problem.row, problem.field) for problem in found]


def csv_file(folder, text):
    path = folder / "manifest.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


# --- ids

GOOD_IDS = [
    ("youtube", "abcdefghijk"),
    ("youtube", "-abc_DEF-09"),
    ("youtube", "--exec-aaaa"),  # eleven legal characters: only ever used inside a URL
    ("bilibili", "BV1xx411c7mD"),
    ("tiktok", "7123456789012345678"),
    ("vimeo", "76979871"),
    ("http", "https://example.org/a.mp4"),
    ("http", "http://cdn.example.org:8080/a/b%20c/clip-1.mp4"),
    ("http", "https://93.184.215.14/a.mp4"),
    ("local", "a.mp4"),
    ("local", "set 1/dance_01 v2.mp4"),
    ("local", "a-b/c..d.mp4"),
]

BAD_IDS = [
    ("youtube", "abcdefghij"),
    ("youtube", "abcdefghijkl"),
    ("youtube", "abcdefghij\n"),
    ("youtube", "abcdefghijk\n"),
    ("youtube", "abcdefghij "),
    ("youtube", "abcdefghij/"),
    ("youtube", "abcdefg&t=1"),
    ("youtube", "аbcdefghijk"),  # a Cyrillic letter
    ("youtube", "ａbcdefghijk"),  # a full-width one
    ("youtube", "٠٠٠٠٠٠٠٠٠٠٠"),
    ("youtube", "https://www.youtube.com/watch?v=abcdefghijk"),
    ("bilibili", "av170001"),
    ("bilibili", "BV2xx411c7mD"),
    ("bilibili", "BV1xx411c7m"),
    ("bilibili", "BV1xx411c7m_"),
    ("tiktok", "7.12345678901235E+18"),
    ("tiktok", "0123"),
    ("tiktok", "-712345"),
    ("tiktok", "٧١٢٣"),
    ("tiktok", ""),
    ("vimeo", "76979871?h=1"),
    ("vimeo", "76979871/abc"),
    ("http", "example.org/a.mp4"),
    ("http", "ftp://example.org/a.mp4"),
    ("http", "file:///etc/passwd"),
    ("http", "https://user:pass@example.org/a.mp4"),
    ("http", "https://user@example.org/a.mp4"),
    ("http", "https://example.org/a.mp4?token=1"),
    ("http", "https://example.org/a.mp4#t=1"),
    ("http", "https://example.org/"),
    ("http", "https://example.org"),
    ("http", "https://Example.org/a.mp4"),
    ("http", "https://example.org:443/a.mp4"),
    ("http", "https://example.org:99999/a.mp4"),
    ("http", "https://example.org//a.mp4"),
    ("http", "https://example.org/../a.mp4"),
    ("http", "https://example.org/./a.mp4"),
    ("http", "https://example.org/%2e%2e/a.mp4"),
    ("http", "https://example.org/%2E%2E/a.mp4"),
    ("http", "https://example.org/a%2Fb.mp4"),
    ("http", "https://example.org/%61.mp4"),
    ("http", "https://example.org/a%00.mp4"),
    ("http", "https://example.org/a%0A.mp4"),
    ("http", "https://example.org/$(id).mp4"),
    ("http", "https://example.org\\@10.0.0.1/a.mp4"),
    ("http", "https://exаmple.org/a.mp4"),
    ("http", "https://example..org/a.mp4"),
    ("http", "https://-example.org/a.mp4"),
    ("http", "https://intranet/a.mp4"),
    ("http", "https://printer.local/a.mp4"),
    ("http", "http://metadata.google.internal/a.mp4"),
    ("http", "http://169.254.169.254/latest/meta-data"),
    ("http", "http://10.0.0.1/a.mp4"),
    ("http", "http://127.0.0.1/a.mp4"),
    ("http", "http://localhost/a.mp4"),
    ("http", "http://a.localhost/a.mp4"),
    ("http", "http://2130706433/a.mp4"),
    ("http", "http://0x7f.0.0.0x1/a.mp4"),
    ("http", "http://0x7f000001/a.mp4"),
    ("http", "http://127.1/a.mp4"),
    ("http", "http://0177.0.0.1/a.mp4"),
    ("http", "http://[::1]/a.mp4"),
    ("local", "/etc/passwd"),
    ("local", "../a.mp4"),
    ("local", "a/../b.mp4"),
    ("local", "a/./b.mp4"),
    ("local", "./a.mp4"),
    ("local", ".hidden.mp4"),
    ("local", "a//b.mp4"),
    ("local", "a/"),
    ("local", "a\\b.mp4"),
    ("local", "C:/a.mp4"),
    ("local", "-i.mp4"),
    ("local", "--exec"),
    ("local", "a/-b.mp4"),
    ("local", "~/a.mp4"),
    ("local", "a\x00.mp4"),
    ("local", "a\n.mp4"),
    ("local", "a.mp4\n"),
    ("local", "a;rm -rf b.mp4"),
    ("local", "$(id).mp4"),
    ("local", "`id`.mp4"),
    ("local", "a|b.mp4"),
    ("local", "a "),
    ("local", "a./b"),
    ("local", "a" * 300),
    ("local", "/".join(["a"] * 600)),
    ("local", ""),
    ("ftp", "a"),
    ("YouTube", "abcdefghijk"),
]


@pytest.mark.parametrize(("platform", "video_id"), GOOD_IDS)
def test_good_ids_pass(platform, video_id):
    validate_video_id(platform, video_id)


@pytest.mark.parametrize(("platform", "video_id"), BAD_IDS)
def test_bad_ids_are_refused_with_what_to_write(platform, video_id):
    with pytest.raises(ValueError, match=r"^(write|give|leave)"):
        validate_video_id(platform, video_id)


def test_loopback_links_need_permission_and_private_ones_stay_refused():
    for link in ("http://127.0.0.1:8123/a.mp4", "http://localhost:8123/a.mp4"):
        validate_video_id("http", link, allow_loopback=True)
    with pytest.raises(ValueError, match="public host"):
        validate_video_id("http", "http://10.0.0.1/a.mp4", allow_loopback=True)


@given(st.sampled_from(PLATFORMS), st.text(max_size=30) | st.from_regex(r"[-./\\:a-z0-9%]{0,20}"))
def test_an_accepted_id_holds_nothing_that_a_shell_a_path_or_an_url_could_misread(platform, video_id):
    try:
        validate_video_id(platform, video_id)
    except ValueError:
        return
    assert video_id.isascii()
    assert video_id.isprintable()
    assert not set(video_id) & set("\\\"'`$;&|<>()[]{}*?#!")
    if platform == "local":
        assert not video_id.startswith(("-", "/", "."))
        assert ".." not in Path(video_id).parts


# --- round trips

_IDS = {
    "youtube": st.from_regex(r"[A-Za-z0-9_-]{11}", fullmatch=True),
    "bilibili": st.from_regex(r"BV1[0-9A-Za-z]{9}", fullmatch=True),
    "tiktok": st.integers(1, 10**19).map(str),
    "vimeo": st.integers(1, 10**10).map(str),
    "http": st.from_regex(
        r"https?://[a-z]{1,8}\.example\.org(:8[0-9]{3})?(/[A-Za-z0-9_.~,+=@-]*[a-z]){1,3}", fullmatch=True
    ),
    "local": st.from_regex(r"[A-Za-z0-9_]([A-Za-z0-9_.,+=@ -]{0,8}[a-z])?(/[a-z]{1,4}\.mp4)?", fullmatch=True),
}


@st.composite
def clips(draw):
    """A list of valid clips: spans of one video never overlap."""
    videos = draw(
        st.lists(st.sampled_from(PLATFORMS).flatmap(lambda p: st.tuples(st.just(p), _IDS[p])), unique=True, max_size=6)
    )
    refs = []
    for platform, video_id in videos:
        cuts = sorted(draw(st.sets(st.integers(0, MAX_SECONDS * 10**6), max_size=5)))
        spans = list(itertools.pairwise(cuts)) or [(None, None)]
        if draw(st.booleans()) and spans[0][0]:
            spans[0] = (None, spans[0][1])
        if draw(st.booleans()):
            spans[-1] = (spans[-1][0], None)
        for start, end in spans:
            refs.append(ClipRef(platform, video_id, start, end, draw(st.sampled_from([None, "train", "val-2"]))))
    rounded = {int(video_id) % 1000 * (int(video_id) % 512) for platform, video_id in videos if platform == "tiktok"}
    assume(rounded != {0})  # these are refused together
    return draw(st.permutations(refs))


@settings(max_examples=examples(60), deadline=None)
@given(clips(), st.sampled_from(SUFFIXES))
def test_a_round_trip_keeps_every_clip_and_the_same_clips_give_the_same_bytes(refs, suffix):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"manifest{suffix}"
        write_manifest(refs, path)
        back = read_manifest(path, http_hosts=None)
        assert back == refs
        assert [ref.clip_id for ref in back] == [ref.clip_id for ref in refs]
        first = path.read_bytes()
        write_manifest(back, path)
        assert path.read_bytes() == first


def test_the_clip_id_is_the_same_on_every_machine():
    assert ClipRef("youtube", "abcdefghijk", 0, 10_000_000).clip_id == "df9c5eaa3016361f"
    assert ClipRef("youtube", "abcdefghijk").clip_id == "de11e6562db64285"
    assert ClipRef("youtube", "abcdefghijk", 1).video_key == ClipRef("youtube", "abcdefghijk").video_key


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_long_numeric_ids_survive_as_text(tmp_path, suffix):
    refs = [ClipRef("tiktok", "7123456789012345678"), ClipRef("vimeo", "76979871")]
    path = tmp_path / f"m{suffix}"
    write_manifest(refs, path)
    assert read_manifest(path) == refs
    if suffix == ".parquet":
        assert pq.read_schema(path).field("video_id").type == pa.string()


def test_integer_ids_of_jsonl_and_parquet_are_exact_and_floats_are_refused(tmp_path):
    jsonl = tmp_path / "m.jsonl"
    jsonl.write_text('{"platform": "tiktok", "video_id": 7123456789012345679}\n')
    assert read_manifest(jsonl)[0].video_id == "7123456789012345679"
    frame = pd.DataFrame({"platform": ["tiktok", "vimeo"], "video_id": [7123456789012345679, 5], "end_s": [None, 4]})
    frame.to_parquet(tmp_path / "m.parquet")
    assert [(r.video_id, r.end_us) for r in read_manifest(tmp_path / "m.parquet")] == [
        ("7123456789012345679", None),
        ("5", 4_000_000),
    ]
    frame.astype({"video_id": float}).to_parquet(tmp_path / "f.parquet")
    assert problems(tmp_path / "f.parquet") == [(1, "video_id"), (2, "video_id")]
    jsonl.write_text('{"platform": "tiktok", "video_id": 7.0}\n{"platform": "youtube", "video_id": 12345678901}\n')
    assert problems(jsonl) == [(1, "video_id"), (2, "video_id")]


# --- reading CSV as people write it

HEADER = "platform,video_id,start_s,end_s,split\n"


def test_byte_order_mark_crlf_blank_lines_spaces_and_column_order(tmp_path):
    text = "\ufeff end_s , video_id,platform\r\n\r\n 12.5, abcdefghijk , youtube\r\n,,\r\n,bbbbbbbbbbb,youtube\r\n\r\n"
    assert read_manifest(csv_file(tmp_path, text)) == [
        ClipRef("youtube", "abcdefghijk", None, 12_500_000),
        ClipRef("youtube", "bbbbbbbbbbb"),
    ]


def test_times_are_rounded_to_microseconds(tmp_path):
    path = csv_file(tmp_path, HEADER + "vimeo,1,0.1234564,0.1234566,\nvimeo,2,1e-3,1E1,\nvimeo,3,.5,+7.,\n")
    assert [(r.start_us, r.end_us) for r in read_manifest(path)] == [
        (123456, 123457),
        (1000, 10_000_000),
        (500000, 7_000_000),
    ]


def test_every_bad_row_is_named_as_a_person_counts_it(tmp_path):
    rows = [
        "youtube,abcdefghijk,0,10,train",  # 2
        "",
        "youtube,too-short,0,10,",  # 4
        "youtube,bbbbbbbbbbb,nan,inf,",  # 5
        "youtube,ccccccccccc,-1,5,",
        "youtube,ddddddddddd,5,5,",
        "youtube,eeeeeeeeeee,9,5,",
        "youtube,fffffffffff,1:30,,",
        "youtube,ggggggggggg,1_0,,",
        "youtube,hhhhhhhhhhh,٣,,",
        "youtube,iiiiiiiiiii,1e99,,",
        "youtube,jjjjjjjjjjj,0.0000001,0.0000002,",
        "youtube,kkkkkkkkkkk,1",
        "youtube,lllllllllll,1,2,train,more",
        "youtube,mmmmmmmmmmm,,,a title of a video",
        ",nnnnnnnnnnn,,,",
        "youtube,,,,",
        "youtube,ooooooooooo,,0,",
    ]
    assert problems(csv_file(tmp_path, HEADER + "\n".join(rows))) == [
        (4, "video_id"),
        (5, "end_s"),
        (5, "start_s"),
        (6, "start_s"),
        (7, "end_s"),
        (8, "end_s"),
        (9, "start_s"),
        (10, "start_s"),
        (11, "start_s"),
        (12, "start_s"),
        (13, "end_s"),
        (14, "row"),
        (15, "row"),
        (16, "split"),
        (17, "platform"),
        (18, "video_id"),
        (19, "end_s"),
    ]


def test_row_numbers_are_lines_even_after_a_field_with_a_line_break(tmp_path):
    assert problems(csv_file(tmp_path, HEADER + 'youtube,"a\nb",,,\nvimeo,x,,,\n')) == [
        (2, "video_id"),
        (4, "video_id"),
    ]


def test_a_long_list_of_problems_is_cut_in_the_text_but_not_in_the_data(tmp_path):
    path = csv_file(tmp_path, HEADER + "youtube,bad,,,\n" * 50)
    with pytest.raises(ManifestError, match=r"\.\.\. and 30 more") as caught:
        read_manifest(path)
    assert len(caught.value.problems) == 50
    assert isinstance(caught.value, UsageError)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", [(1, "platform")]),
        ("\n\n", [(1, "platform")]),
        ("platform,start_s\n", [(1, "video_id")]),
        ("youtube,abcdefghijk\n", [(1, "'abcdefghijk'"), (1, "'youtube'"), (1, "platform"), (1, "video_id")]),
        ("platform,video_id,title\nyoutube,abcdefghijk,My dance\n", [(1, "'title'")]),
        ("platform,video_id,video_id\n", [(1, "video_id")]),
        ("platform;video_id\nyoutube;abcdefghijk\n", [(1, "row")]),
        ("platform\tvideo_id\nyoutube\tabcdefghijk\n", [(1, "row")]),
        (HEADER + 'youtube,"abcdefghijk,,,\n', [(2, "row")]),
        (HEADER + 'youtube,"abc"defghijk,,,\n', [(2, "row")]),
        (HEADER + "youtube," + "a" * 200_000 + ",,,\n", [(2, "row")]),
        (HEADER.encode() + b"youtube,abcdefghij\xff,,,\n", [(2, "file")]),
        ("platform,video_id\nvimeo,1\n".encode("utf-16"), [(1, "file")]),
        (HEADER + "youtube,abcdefghij\x00,,,\n", [(2, "video_id")]),
    ],
)
def test_files_that_are_wrong_as_a_whole(tmp_path, text, expected):
    assert problems(csv_file(tmp_path, text)) == expected


def test_a_title_column_is_refused_and_not_quoted(tmp_path):
    with pytest.raises(ManifestError) as caught:
        read_manifest(csv_file(tmp_path, "platform,video_id,title\nyoutube,abcdefghijk,My secret dance\n"))
    assert "remove this column" in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "line",
    [
        "nonsense",
        "[]",
        "null",
        "[[]]",
        '{"platform": "vimeo"',
        "[" * 100_000,
        "1" * 5000,
        '{"platform": "vimeo", "video_id": ' + "1" * 5000 + "}",
    ],
)
def test_lines_that_are_no_json_object(tmp_path, line):
    path = tmp_path / "m.jsonl"
    path.write_text('{"platform": "vimeo", "video_id": "1"}\n\n' + line + "\n")
    assert problems(path) == [(3, "row")]


@pytest.mark.parametrize(
    ("record", "field"),
    [
        ('{"platform": "vimeo"}', "video_id"),
        ('{"video_id": "1"}', "platform"),
        ('{"platform": ["vimeo"], "video_id": "1"}', "platform"),
        ('{"platform": "vimeo", "video_id": {"a": 1}}', "video_id"),
        ('{"platform": "vimeo", "video_id": true}', "video_id"),
        ('{"platform": "vimeo", "video_id": -5}', "video_id"),
        ('{"platform": "vimeo", "video_id": "1", "video_id": "2"}', "video_id"),
        ('{"platform": "vimeo", "video_id": "1", "title": "x"}', "'title'"),
        ('{"platform": "vimeo", "video_id": "1", "start_s": NaN}', "start_s"),
        ('{"platform": "vimeo", "video_id": "1", "start_s": Infinity}', "start_s"),
        ('{"platform": "vimeo", "video_id": "1", "start_s": true}', "start_s"),
        ('{"platform": "vimeo", "video_id": "1", "start_s": []}', "start_s"),
        ('{"platform": "vimeo", "video_id": "1", "start_s": 1' + "0" * 400 + "}", "start_s"),
        ('{"platform": "vimeo", "video_id": "1", "split": 3}', "split"),
        ('{"platform": "vimeo", "video_id": "1", "split": "\\ud800"}', "split"),
    ],
)
def test_bad_fields_of_a_json_line(tmp_path, record, field):
    path = tmp_path / "m.jsonl"
    path.write_text(record)
    assert problems(path) == [(1, field)]


def test_nan_is_refused_and_null_is_empty(tmp_path):
    for kind in (pa.float64(), pa.float32(), pa.float16()):
        times = pa.array(np.array([1.0, math.nan, 0.0], kind.to_pandas_dtype()), kind, mask=np.array([0, 0, 1], bool))
        table = pa.table({"platform": ["vimeo"] * 3, "video_id": ["1", "2", "3"], "end_s": times})
        pq.write_table(table, tmp_path / "m.parquet")
        with pytest.raises(ManifestError, match=r"row 2, end_s: this is NaN; leave it empty \(null\)\."):
            read_manifest(tmp_path / "m.parquet")
    (tmp_path / "m.jsonl").write_text('{"platform": "vimeo", "video_id": "1", "end_s": NaN}\n')
    with pytest.raises(ManifestError, match="NaN; leave it empty"):
        read_manifest(tmp_path / "m.jsonl")


@pytest.mark.parametrize("dictionary", [False, True])
@given(data=st.data())
def test_a_time_is_the_same_in_text_and_in_any_precision(dictionary, data):
    """A decimal that a type can tell from its neighbours gives one clip, however the table keeps it."""
    name, digits = data.draw(st.sampled_from([("float16", 3), ("float32", 6), ("float64", 13)]))
    text = f"{data.draw(st.integers(1, 10**digits - 1))}e{data.draw(st.integers(-3, 0))}"
    with np.errstate(over="ignore"):
        value = np.array([float(text)]).astype(name)
    times = pa.array(value)
    table = {"platform": ["vimeo"], "video_id": ["1"], "end_s": times.dictionary_encode() if dictionary else times}
    with tempfile.TemporaryDirectory() as folder:
        pq.write_table(pa.table(table), Path(folder) / "m.parquet")
        (Path(folder) / "m.csv").write_text(f"platform,video_id,end_s\nvimeo,1,{text}\n")
        if math.isfinite(value[0]) and float(text) <= MAX_SECONDS:
            assert read_manifest(Path(folder) / "m.parquet") == read_manifest(Path(folder) / "m.csv")


def test_single_precision_gives_the_ids_of_text(tmp_path):
    table = {"platform": ["vimeo"] * 2, "video_id": ["1", "1"], "start_s": [83.7, 3600.1], "end_s": [90.3, None]}
    for kind in (pa.float32(), pa.float64()):
        times = {name: pa.array(table[name], kind) for name in ("start_s", "end_s")}
        pq.write_table(pa.table({**table, **times}), tmp_path / f"{kind}.parquet")
    single, double = read_manifest(tmp_path / "float.parquet"), read_manifest(tmp_path / "double.parquet")
    assert [ref.clip_id for ref in single] == [ref.clip_id for ref in double]
    assert single[0].start_us == 83_700_000 and single[1].start_us == 3_600_100_000


# --- ids that a program rounded, which only the rows together show

_LONG = st.integers(6 * 10**18, 9 * 10**18)
_ROUNDINGS = {
    "spreadsheet": lambda number: number // 10_000 * 10_000,
    "javascript": lambda number: round(int(float(number)), -3),
    "float column": lambda number: int(float(number)),
}


def tiktok(folder, ids, suffix=".csv", more=""):
    path = Path(folder) / f"m{suffix}"
    if suffix == ".csv":
        path.write_text("platform,video_id\n" + "".join(f"tiktok,{number}\n" for number in ids) + more)
    else:
        pq.write_table(pa.table({"platform": ["tiktok"] * len(ids), "video_id": ids}), path)
    return path


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
@given(ids=st.lists(_LONG, min_size=6, max_size=30), rounding=st.sampled_from(sorted(_ROUNDINGS)))
def test_ids_that_were_all_rounded_are_refused(suffix, ids, rounding):
    rounded = sorted({_ROUNDINGS[rounding](number) for number in ids})
    assume(len(rounded) >= 3)
    with tempfile.TemporaryDirectory() as folder:
        with pytest.raises(ManifestError, match=r"rounded them; export this column as text") as caught:
            read_manifest(tiktok(folder, rounded, suffix))
        assert [problem.field for problem in caught.value.problems] == ["video_id"]
        with pytest.raises(ManifestError, match="rounded them"):
            write_manifest([ClipRef("tiktok", str(number)) for number in rounded], Path(folder) / "out.csv")


@given(ids=st.lists(_LONG, min_size=1, max_size=30, unique=True), rounding=st.sampled_from(sorted(_ROUNDINGS)))
def test_one_id_that_was_not_rounded_vouches_for_the_others(ids, rounding):
    rounded = [_ROUNDINGS[rounding](number) for number in ids]
    with tempfile.TemporaryDirectory() as folder:
        assert read_manifest(tiktok(folder, [*rounded, 7123456789012345679]))


def test_chance_short_ids_and_other_platforms_are_no_rounding(tmp_path):
    zeros = [7_300_000_000_000_000_000 + n * 10**6 + 123_000 for n in range(2)]
    binary = [2**62 + n * 512 * 7 for n in range(1, 4)]
    for good in (
        zeros[:1],
        zeros[:1] * 5,
        binary[:2],
        [n * 1000 for n in range(1, 9)],
        [2**53 - 2**13 * n for n in range(9)],
    ):
        assert read_manifest(tiktok(tmp_path, good))
    for rounded, row in ((zeros, 2), (binary, 2), ([5, *zeros], 3)):
        assert problems(tiktok(tmp_path, rounded)) == [(row, "video_id")]
    vimeo = "".join(f"vimeo,{number}\n" for number in zeros)
    assert read_manifest(tiktok(tmp_path, [], more=vimeo))
    assert problems(tiktok(tmp_path, zeros, more=vimeo)) == [(2, "video_id")]


def test_the_name_of_a_folder_adds_no_column(tmp_path):
    folder = tmp_path / "title=dance"
    folder.mkdir()
    write_manifest([ClipRef("vimeo", "1")], folder / "m.parquet")
    assert read_manifest(folder / "m.parquet") == [ClipRef("vimeo", "1")]


def test_a_missing_file_and_another_suffix_say_what_to_do(tmp_path):
    with pytest.raises(UsageError, match="give the path"):
        read_manifest(tmp_path / "none.csv")
    with pytest.raises(UsageError, match=r"\.csv, \.jsonl or \.parquet"):
        read_manifest(tmp_path / "m.xlsx")
    with pytest.raises(UsageError, match=r"\.csv, \.jsonl or \.parquet"):
        write_manifest([], tmp_path / "m.txt")


# --- duplicates and overlaps


def test_exact_duplicates_are_merged_in_file_order(tmp_path):
    text = HEADER + "vimeo,2,0,5,\nvimeo,1,0,5,train\nvimeo,2,0.0,5.0000001,\nvimeo,1,0,5,train\n"
    assert [r.video_id for r in read_manifest(csv_file(tmp_path, text))] == ["2", "1"]


def test_touching_spans_are_fine(tmp_path):
    assert (
        len(read_manifest(csv_file(tmp_path, HEADER + "vimeo,1,5,10,\nvimeo,1,,5,\nvimeo,1,10,,\nvimeo,2,0,9,\n"))) == 4
    )


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ("vimeo,1,0,10,\nvimeo,1,5,15,\n", [(3, 2)]),
        ("vimeo,1,5,15,\nvimeo,1,0,10,\n", [(3, 2)]),
        ("vimeo,1,,,\nvimeo,1,5,6,\n", [(3, 2)]),
        ("vimeo,1,5,,\nvimeo,1,,6,\n", [(3, 2)]),
        ("vimeo,1,0,10,\nvimeo,1,,10,\n", [(3, 2)]),
        ("vimeo,1,0,100,\nvimeo,1,1,2,\nvimeo,1,50,60,\nvimeo,1,100,110,\n", [(3, 2), (4, 2)]),
    ],
)
def test_overlaps_are_refused_with_both_rows_named(tmp_path, rows, expected):
    with pytest.raises(ManifestError) as caught:
        read_manifest(csv_file(tmp_path, HEADER + rows))
    assert [
        (p.row, f"row {other} " in p.message) for p, (_, other) in zip(caught.value.problems, expected, strict=True)
    ] == [(row, True) for row, _ in expected]


def test_a_clip_in_two_splits_is_refused(tmp_path):
    text = HEADER + "vimeo,1,0,5,train\nvimeo,1,0,5,test\n"
    assert problems(csv_file(tmp_path, text)) == [(3, "split")]


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 30)), min_size=2, max_size=6))
def test_a_manifest_is_accepted_exactly_if_no_two_different_spans_share_a_moment(pairs):
    spans = {(start * 10**6, (start + length) * 10**6) for start, length in pairs}
    refs = [ClipRef("vimeo", "1", start * 10**6, (start + length) * 10**6) for start, length in pairs]
    clash = any(a < d and c < b for a, b in spans for c, d in spans if (a, b) != (c, d))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.csv"
        path.write_text(HEADER + "".join(f"vimeo,1,{r.start_s},{r.end_s},\n" for r in refs))
        try:
            back = read_manifest(path)
        except ManifestError:
            assert clash
        else:
            assert not clash
            assert {(r.start_us, r.end_us) for r in back} == spans
            assert len(back) == len(spans)


# --- hosts


def test_links_need_a_listed_host_unless_the_caller_leaves_it_to_the_download(tmp_path):
    path = csv_file(tmp_path, "platform,video_id\nhttp,https://example.org/a.mp4\nhttp,http://example.org:81/b.mp4\n")
    assert problems(path) == [(2, "video_id"), (3, "video_id")]
    assert problems(path, http_hosts=("example.org:443",)) == [(3, "video_id")]
    assert len(read_manifest(path, http_hosts=("example.org",))) == 2
    assert len(read_manifest(path, http_hosts=None)) == 2


# --- writing


@pytest.mark.parametrize(
    "ref",
    [
        ClipRef("youtube", "not an id"),
        ClipRef("vimeo", "1", -1, 5),
        ClipRef("vimeo", "1", 5, 5),
        ClipRef("vimeo", "1", 0, (MAX_SECONDS + 1) * 10**6),
        ClipRef("vimeo", "1", split="My video's title"),
    ],
)
def test_nothing_is_written_that_could_not_be_read(tmp_path, ref):
    with pytest.raises(ManifestError):
        write_manifest([ClipRef("vimeo", "2"), ref], tmp_path / "m.csv")
    assert list(tmp_path.iterdir()) == []


def test_the_example_in_the_repository_is_a_good_one():
    example = Path(__file__).parents[2] / "manifests" / "example.csv"
    assert [(ref.platform, ref.split) for ref in read_manifest(example)] == [
        ("local", "train"),
        ("local", "train"),
        ("local", "val"),
    ]


# --- junk

_VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=12),
    st.sampled_from(["youtube", "vimeo", "local", "http", "abcdefghijk", "a.mp4", "1", "https://example.org/a.mp4"]),
)
_JSON = st.recursive(
    _VALUES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
)
_RECORDS = st.dictionaries(st.sampled_from([*COLUMNS, "title"]), _JSON, max_size=6)


def only_a_manifest_error_may_leave(path):
    try:
        refs = read_manifest(path, http_hosts=None)
    except ManifestError as error:
        assert error.problems
        for problem in error.problems:
            assert problem.row >= 1
            assert problem.field
            assert problem.message
    else:
        for ref in refs:
            validate_video_id(ref.platform, ref.video_id)
            assert ref.end_us is None or ref.end_us > (ref.start_us or 0) >= 0


@settings(deadline=None)
@given(st.sampled_from(SUFFIXES), st.binary(max_size=200))
@example(".parquet", b"PAR1PAR1PAR1")
@example(".parquet", b"PAR1" + b"\x00" * 100 + b"\x10\x00\x00\x00PAR1")
def test_junk_bytes_never_raise_anything_else(suffix, data):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"m{suffix}"
        path.write_bytes(data)
        only_a_manifest_error_may_leave(path)


@settings(deadline=None)
@given(st.lists(st.text(st.sampled_from('a1,"\n\r\t;-./:\x00é '), max_size=40), max_size=5), st.booleans())
def test_junk_csv_never_raises_anything_else(rows, with_header):
    with tempfile.TemporaryDirectory() as folder:
        path = csv_file(Path(folder), (HEADER if with_header else "") + "\n".join(rows))
        only_a_manifest_error_may_leave(path)


@settings(deadline=None)
@given(st.lists(_RECORDS | _JSON, max_size=4))
def test_junk_json_never_raises_anything_else(records):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.jsonl"
        path.write_text("\n".join(map(json.dumps, records)))
        only_a_manifest_error_may_leave(path)


_COLUMNS_OF_JUNK = st.one_of(
    st.lists(st.none() | st.text(max_size=12), min_size=3, max_size=3),
    st.lists(st.none() | st.integers(-(2**63), 2**63 - 1), min_size=3, max_size=3),
    st.lists(st.none() | st.floats(), min_size=3, max_size=3),
    st.lists(st.none() | st.binary(max_size=4), min_size=3, max_size=3),
    st.lists(st.none() | st.datetimes(), min_size=3, max_size=3),
    st.lists(st.lists(st.integers(0, 5), max_size=2), min_size=3, max_size=3),
    st.just(["youtube", "vimeo", "tiktok"]),
)


@settings(deadline=None, max_examples=examples(60))
@given(st.dictionaries(st.sampled_from([*COLUMNS, "title"]), _COLUMNS_OF_JUNK, max_size=6))
def test_junk_tables_never_raise_anything_else(columns):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.parquet"
        pq.write_table(pa.table(columns), path)
        only_a_manifest_error_may_leave(path)
