"""Reading and splitting of training data: JSONL, CSV or parquet in, rows out."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .errors import InputError

MESSAGES = "messages"


@dataclass(frozen=True)
class Row:
    """One example: its text, its label (None for causal LM) and the line (parquet: row) of the file it came from.

    `messages`: the conversation, and `text` is then its JSON form; None for plain text.
    """

    text: str
    label: str | None
    line: int
    messages: list[dict] | None = None


def _jsonl(path: Path) -> Iterator[tuple[int, dict]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise InputError(
                    f"{path} line {number}: not valid JSON ({error.msg} at column {error.colno})"
                ) from None
            if not isinstance(record, dict):
                raise InputError(
                    f"{path} line {number}: got a JSON {type(record).__name__}, wanted an object with columns"
                )
            yield number, record


def _csv(path: Path) -> Iterator[tuple[int, dict]]:
    previous = csv.field_size_limit(2**31 - 1)  # the default of 131072 characters refuses long documents
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            names = reader.fieldnames or []
            doubled = sorted({name for name in names if names.count(name) > 1})
            if doubled:
                raise InputError(f"{path}: column {doubled[0]!r} appears more than once in the header")
            for record in reader:
                if None in record or None in record.values():
                    extra = len(record.get(None) or ())
                    got = len(names) + extra if extra else sum(value is not None for value in record.values())
                    raise InputError(f"{path} line {reader.line_num}: {got} fields, but the header has {len(names)}")
                yield reader.line_num, record
    except csv.Error as error:
        raise InputError(f"{path} line {reader.reader.line_num}: not valid CSV ({error})") from None
    finally:
        csv.field_size_limit(previous)


def _parquet(path: Path) -> Iterator[tuple[int, dict]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise InputError(f"{path}: parquet files need a package that is not installed: pip install pyarrow") from None
    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError) as error:
        raise InputError(f"{path}: not a valid parquet file ({str(error).splitlines()[0]})") from None
    yield from enumerate(rows, 1)


READERS = {".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}


def _records(path: Path) -> list[tuple[int, dict]]:
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise InputError(f"{path}: unknown file ending {path.suffix!r}, wanted one of {', '.join(READERS)}")
    try:
        records = list(reader(path))
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    if not records:
        raise InputError(f"{path}: holds no examples")
    return records


def place(path: Path | str, line: int) -> str:
    """Where in a file a row stands, for messages."""
    return f"{path} {'row' if str(path).lower().endswith('.parquet') else 'line'} {line}"


def _shown(value: object) -> str:
    return json.dumps(value, default=str)


def _label(value: object, where: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise InputError(f"{where} is {_shown(value)}, wanted a non-empty string or an integer")
    return str(value)


def _messages(value: object, where: str) -> list[dict]:
    if not isinstance(value, list) or not value:
        raise InputError(f"{where} is {_shown(value)[:200]}, wanted a list of messages")
    for message in value:
        fields = message if isinstance(message, dict) else {}
        if not all(isinstance(fields.get(key), str) for key in ("role", "content")):
            raise InputError(
                f"{where} holds {_shown(message)[:200]}, wanted an object with the texts 'role' and 'content'"
            )
    # What parquet fills up with nulls is not there.
    return [{key: item for key, item in message.items() if item is not None} for message in value]


def read(path: Path, task: str, text: str, label: str | None) -> list[Row]:
    """The rows of a JSONL, CSV (UTF-8; blank JSONL lines are skipped) or parquet file.

    `task` is "classification", "causal-lm" (labels are not read) or "auto": classification if a label column is named
    or the first row has one called "label". `text` and `label` are column names; None for `label` means "label". For
    causal LM, rows without `text` may have "messages", a list of objects with role and content.

    Raises:
        InputError: unreadable, empty or malformed file, missing column, empty text, or a label that is no string or
            integer; the message names the file and the line.
    """
    records = _records(path)
    first = records[0][1]
    if task == "auto" and label is None and "label" not in first:
        task = "causal-lm"
    chat = task == "causal-lm" and MESSAGES in first and (text not in first or isinstance(first[text], list))
    text = MESSAGES if chat else text
    columns = (text,) if task == "causal-lm" else (text, label or "label")
    rows = []
    for line, record in records:
        where = place(path, line)
        for column in columns:
            if column not in record:
                raise InputError(f"{where}: no column {column!r}, only {', '.join(map(repr, record)) or 'none'}")
        value = record[text]
        name = None if task == "causal-lm" else _label(record[columns[1]], f"{where}: column {columns[1]!r}")
        if chat:
            messages = _messages(value, f"{where}: column {text!r}")
            rows.append(Row(json.dumps(messages, ensure_ascii=False, sort_keys=True), name, line, messages))
            continue
        if not isinstance(value, str) or not value.strip():
            raise InputError(f"{where}: column {text!r} is {_shown(value)}, wanted a non-empty string")
        rows.append(Row(value, name, line))
    return rows


def label_names(rows: list[Row], path: Path) -> list[str]:
    """The labels in order of their ids: numerically if all are integers, else alphabetically."""
    labels = {row.label for row in rows if row.label is not None}
    if len(labels) < 2:
        raise InputError(f"{path}: every row has the label {next(iter(labels))!r}, wanted at least two classes")
    try:
        return sorted(labels, key=lambda label: (int(label), label))
    except ValueError:
        return sorted(labels)


def split(rows: list[Row], fraction: float, seed: int) -> tuple[list[Row], list[Row]]:
    """(training, evaluation): `fraction` of each class to the evaluation part, drawn with `seed`.

    Equal texts stay on one side. A class whose share rounds to nothing goes to the training part whole.
    """
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.text, []).append(row)
    classes: dict[str | None, list[list[Row]]] = {}
    for group in groups.values():
        classes.setdefault(group[0].label, []).append(group)
    generator = random.Random(seed)
    train: list[Row] = []
    held_out: list[Row] = []
    for members in classes.values():
        generator.shuffle(members)
        count = min(round(fraction * len(members)), len(members) - 1)
        held_out.extend(row for group in members[:count] for row in group)
        train.extend(row for group in members[count:] for row in group)
    return train, held_out
