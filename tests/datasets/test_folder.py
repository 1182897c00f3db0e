import csv
import json
import tempfile
import unicodedata
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from forgetrace.artifacts import UserError
from forgetrace.datasets.contract import captions_of
from forgetrace.datasets.folder import listing

# What a file may be called on any file system, and what a caption may hold.
NAMES = st.lists(st.text("abcäß漢 -_#%", min_size=1, max_size=6).map("x{}x".format), min_size=1, max_size=3).map(
    "/".join
)
CAPTIONS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30).filter(str.strip)
FEW = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])


def folder_of(names: list[str]) -> Path:
    """A new folder with such files, which no listing opens."""
    folder = Path(tempfile.mkdtemp())
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def found(folder: Path) -> list[tuple[str, list[str]]]:
    read = listing(str(folder))
    assert not read.problems
    return [(each.id, captions_of(each.caption)) for each in read.references]


@FEW
@given(st.dictionaries(NAMES.map(lambda name: f"{name}.png"), st.lists(CAPTIONS, min_size=1, max_size=3), max_size=5))
@example({"a.png": ["\u2028 one\x85", "\ufeff"], "b/ü.png": ['a "quoted", caption']})
def test_json_lines_keep_their_order_and_captions(rows):
    folder = folder_of(list(rows))
    lines = [json.dumps({"file_name": name, "text": texts, "more": 1}) for name, texts in rows.items()]
    (folder / "metadata.jsonl").write_text("\n\n".join(lines), encoding="utf-8")
    assert found(folder) == [(name, [text.strip() for text in texts]) for name, texts in rows.items()]


@FEW
@given(st.dictionaries(NAMES.map(lambda name: f"{name}.png"), CAPTIONS, max_size=5), st.booleans())
@example({"a.png": "two\nlines", "b.png": 'a "quoted", caption'}, True)
def test_so_does_a_table(rows, marked):
    folder = folder_of(list(rows))
    with open(folder / "metadata.csv", "w", encoding="utf-8-sig" if marked else "utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(["text", "more", "file_name"])
        table.writerows([text, 1, name] for name, text in rows.items())
    assert found(folder) == [(name, [text.strip()]) for name, text in rows.items()]


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), lambda inner: st.lists(inner))
ROWS = st.fixed_dictionaries({}, optional={"file_name": JSON | st.just("a.png"), "text": JSON, "other": JSON})


@FEW
@given(st.lists(st.binary(max_size=40) | ROWS.map(lambda row: json.dumps(row).encode()), max_size=6), st.booleans())
@example(
    [b"[" * 100_000, b'{"file_name": "a\\u0000.png", "text": "b"}', b'{"file_name": "a.png", "text": "\\ud800"}'], 0
)
@example([b"file_name,text", b'a.png,"' + b"x" * 200_000, b"a.png,ok"], True)
@example([b'{"file_name": "' + b"x/" * 5000 + b'", "text": "b"}', b'{"file_name": ".", "text": "b"}', b"9" * 5000], 0)
def test_whatever_is_in_the_list_is_used_or_told(lines, table):
    folder = folder_of(["a.png", "b.png"])
    content = b"\n".join([b"file_name,text", *lines] if table else lines)
    (folder / ("metadata.csv" if table else "metadata.jsonl")).write_bytes(content)
    read = listing(str(folder))
    assert all(each.id in ("a.png", "b.png") and all(captions_of(each.caption)) for each in read.references)
    assert all(1 <= problem.order <= content.count(b"\n") + content.count(b"\r") + 1 for problem in read.problems)
    "".join(each.id + str(each.caption) for each in read.references).encode()


BROKEN = [
    ('{"file_name": "a.png", "text": "fine"}', None),
    ('{"file_name": "none.png", "text": "b"}', "line 2: the file none.png is missing"),
    ("{", "line 3: is no record with file_name and text"),
    ('["a.png", "b"]', "line 4: is no record with file_name and text"),
    ('{"text": "b"}', "line 5: file_name is missing"),
    ('{"file_name": "b.png", "text": " "}', "line 6: the caption of b.png is empty or no text"),
    ('{"file_name": "b.png", "text": ["fine", ""]}', "line 7: the caption of b.png is empty or no text"),
    ('{"file_name": "b.png", "text": []}', "line 8: the caption of b.png is empty or no text"),
    ('{"file_name": "b.png", "text": 3}', "line 9: the caption of b.png is empty or no text"),
    ('{"file_name": "./a.png", "text": "again"}', "line 10: a.png is in line 1 already; give several captions as a li"),
    ('{"file_name": "../a.png", "text": "b"}', "line 11: file_name ../a.png does not lie below the folder"),
    ('{"file_name": "/etc/a.png", "text": "b"}', "line 12: file_name /etc/a.png does not lie below the folder"),
    ("", None),
    ('{"file_name": "b.png", "text": "also fine"}', None),
]


def test_broken_rows_are_told_all_at_once_with_their_lines():
    folder = folder_of(["a.png", "b.png"])
    (folder / "metadata.jsonl").write_text("\n".join(line for line, _ in BROKEN))
    read = listing(str(folder))
    expected = [problem for _, problem in BROKEN if problem]
    assert len(read.problems) == len(expected)
    assert all(problem.text.startswith(start) for problem, start in zip(read.problems, expected, strict=True))
    assert [each.id for each in read.references] == ["a.png", "b.png"]


def test_rows_of_a_table_are_numbered_by_their_first_line():
    folder = folder_of(["a.png"])
    (folder / "metadata.csv").write_bytes(b'file_name,text\n\na.png,"one\ntwo"\nb.png,x\nc.png\nd.png,\xff\n')
    read = listing(str(folder))
    assert [each.caption for each in read.references] == ["one\ntwo"]
    assert [(problem.order, problem.text) for problem in read.problems] == [
        (5, "line 5: the file b.png is missing"),
        (6, "line 6: is no record with file_name and text"),
        (7, "line 7: is not valid UTF-8"),
    ]


@pytest.mark.parametrize(("on_disk", "listed"), [("NFD", "NFC"), ("NFC", "NFD")])
def test_a_name_in_another_spelling_of_unicode_is_found(on_disk, listed):
    folder = folder_of([unicodedata.normalize(on_disk, "süß/ñ.png")])
    name = unicodedata.normalize(listed, "süß/ñ.png")
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": name, "text": "a"}))
    [reference] = listing(str(folder)).references
    assert reference.id == name
    assert (folder / reference.file_name).is_file()


def test_one_caption_is_no_list():
    folder = folder_of(["a.png", "b.png"])
    rows = [{"file_name": "a.png", "text": [" one "]}, {"file_name": "b.png", "text": ["one", "two"]}]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert [each.caption for each in listing(str(folder)).references] == ["one", ["one", "two"]]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "has neither metadata.jsonl and metadata.csv: write one, with file_name and text"),
        ({"metadata.jsonl": "", "metadata.csv": ""}, "has both metadata.jsonl and metadata.csv: keep one of them"),
        ({"metadata.csv": "name,caption\n"}, "has no column file_name and no column text: its first line must"),
        ({"metadata.csv": ""}, "has no column file_name and no column text"),
    ],
)
def test_a_folder_without_a_usable_list_says_so(tmp_path, files, message):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        listing(str(tmp_path))


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(UserError, match=r"^prepare.path: there is no folder \S+/none\.$"):
        listing(str(tmp_path / "none"))
