"""Reading, splitting and batching of the training texts."""

import json
import sys

import pyarrow
import pyarrow.parquet
import pytest
from peftops.cli import data
from peftops.cli.errors import InputError


def write(tmp_path, name, text):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_jsonl_and_csv_give_the_same_rows(tmp_path):
    rows = [("a, b", "x"), ('say "hi"\nagain', "y"), ("päper", "x")]
    jsonl = write(tmp_path, "d.jsonl", "\n\n".join(json.dumps({"text": t, "label": c}) for t, c in rows))
    quoted = "".join('"{}",{}\n'.format(t.replace('"', '""'), c) for t, c in rows)
    csv = write(tmp_path, "d.CSV", "\ufefftext,label\n" + quoted)
    for path in (jsonl, csv):
        got = data.read(path, "auto", "text", None)
        assert [(row.text, row.label) for row in got] == rows
    assert [row.line for row in data.read(jsonl, "auto", "text", None)] == [1, 3, 5]


def test_parquet_gives_the_same_rows(tmp_path):
    rows = [{"text": "a, b", "label": "x"}, {"text": "p\u00e4per", "label": "y"}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "d.parquet")
    got = data.read(tmp_path / "d.parquet", "auto", "text", None)
    assert [(row.text, row.label, row.line) for row in got] == [("a, b", "x", 1), ("p\u00e4per", "y", 2)]
    talk = [{"role": "user", "content": "a", "name": "b"}, {"role": "assistant", "content": "c"}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"messages": talk}]), tmp_path / "t.parquet")
    assert data.read(tmp_path / "t.parquet", "auto", "text", None)[0].messages == talk  # no null for the second name


def test_a_bad_parquet_file_is_named_with_its_row(tmp_path, monkeypatch):
    path = tmp_path / "d.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"text": "a"}, {"text": None}]), path)
    with pytest.raises(InputError, match=r"d.parquet row 2: column 'text' is null, wanted a non-empty string"):
        data.read(path, "causal-lm", "text", None)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"text": "a", "label": 0.5}]), path)
    with pytest.raises(InputError, match=r"d.parquet row 1: column 'label' is 0.5"):
        data.read(path, "auto", "text", None)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(InputError, match=r"d.parquet: not a valid parquet file") as raised:
        data.read(path, "auto", "text", None)
    assert "\n" not in str(raised.value)
    with pytest.raises(InputError, match=r"none.parquet: cannot be read"):
        data.read(tmp_path / "none.parquet", "auto", "text", None)
    for name in [name for name in sys.modules if name.partition(".")[0] == "pyarrow"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match="a package that is not installed: pip install pyarrow"):
        data.read(path, "auto", "text", None)


def test_task_follows_the_columns(tmp_path):
    path = write(tmp_path, "d.jsonl", '{"body": "a", "kind": 1, "label": "x"}\n')
    assert data.read(path, "auto", "body", None)[0].label == "x"
    assert data.read(path, "auto", "body", "kind")[0].label == "1"
    assert data.read(path, "causal-lm", "body", None)[0].label is None
    only_text = write(tmp_path, "t.jsonl", '{"text": "a"}\n')
    assert data.read(only_text, "auto", "text", None)[0].label is None
    with pytest.raises(InputError, match=r"t\.jsonl line 1: no column 'label', only 'text'"):
        data.read(only_text, "classification", "text", None)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.jsonl", "", "holds no examples"),
        ("d.jsonl", "\n \n", "holds no examples"),
        ("d.csv", "", "holds no examples"),
        ("d.csv", "text,label\n", "holds no examples"),
        ("d.jsonl", '{"text": "a", "label": "x"}\n{"text": \n', r"line 2: not valid JSON \(.* at column \d+\)"),
        ("d.jsonl", "[1]\n", "line 1: got a JSON list, wanted an object"),
        ("d.jsonl", '{"text": "a", "label": "x"}\n{"text": "b"}\n', "line 2: no column 'label', only 'text'"),
        ("d.jsonl", '{"words": "a", "label": "x"}\n', "line 1: no column 'text', only 'words', 'label'"),
        ("d.jsonl", '{"text": " ", "label": "x"}\n', "line 1: column 'text' is \" \", wanted a non-empty string"),
        ("d.jsonl", '{"text": null, "label": "x"}\n', "line 1: column 'text' is null"),
        ("d.jsonl", '{"text": "a", "label": 0.5}\n', "line 1: column 'label' is 0.5, wanted a non-empty string or an"),
        ("d.jsonl", '{"text": "a", "label": null}\n', "line 1: column 'label' is null"),
        ("d.jsonl", '{"text": "a", "label": true}\n', "line 1: column 'label' is true"),
        ("d.csv", "text,label\na,x\nb,y,z\n", "line 3: 3 fields, but the header has 2"),
        ("d.csv", "text,label\na\n", "line 2: 1 fields, but the header has 2"),
        ("d.csv", "text,text\na,b\n", "column 'text' appears more than once"),
        ("d.csv", 'text,label\n"a"b,x\n', r"line 2: not valid CSV"),
        ("d.csv", 'text,label\n"a,x\n', r"line \d: not valid CSV"),
        ("d.csv", "text,label\na,\n", "line 2: column 'label' is \"\""),
        ("d.jsonl", b'{"text": "\xff", "label": "x"}\n', "not UTF-8 text"),
        ("d.txt", "a", r"unknown file ending '.txt', wanted one of .jsonl, .csv, .parquet"),
        ("data", "a", "unknown file ending ''"),
    ],
)
def test_a_bad_file_is_named_with_its_line(tmp_path, name, content, message):
    path = write(tmp_path, name, content)
    with pytest.raises(InputError, match=message) as raised:
        data.read(path, "auto", "text", "label")
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_missing_file(tmp_path):
    with pytest.raises(InputError, match=r"nothing\.csv: cannot be read \(No such file"):
        data.read(tmp_path / "nothing.csv", "auto", "text", None)


def test_labels_sort_as_numbers_if_they_are(tmp_path):
    rows = [data.Row("t", label, 1) for label in ("10", "9", "9", "-1")]
    assert data.label_names(rows, tmp_path) == ["-1", "9", "10"]
    assert data.label_names([data.Row("t", label, 1) for label in ("1", "01", "0")], tmp_path) == ["0", "01", "1"]
    assert data.label_names([*rows, data.Row("t", "b", 1)], tmp_path) == ["-1", "10", "9", "b"]
    with pytest.raises(InputError, match="every row has the label '9', wanted at least two classes"):
        data.label_names(rows[1:3], tmp_path)


def test_split_is_stratified_seeded_and_keeps_equal_texts_together():
    rows = [data.Row(f"{label}{i % 40}", label, i) for label, n in (("a", 50), ("b", 10), ("c", 1)) for i in range(n)]
    train, held_out = data.split(rows, 0.2, seed=3)
    assert sorted(train + held_out, key=repr) == sorted(rows, key=repr)
    assert not {row.text for row in train} & {row.text for row in held_out}
    texts = {label: {row.text for row in held_out if row.label == label} for label in "abc"}
    assert (len(texts["a"]), len(texts["b"]), len(texts["c"])) == (8, 2, 0)
    assert data.split(rows, 0.2, seed=3) == (train, held_out)
    assert data.split(rows, 0.2, seed=4) != (train, held_out)
