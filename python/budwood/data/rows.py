"""Reads rows of text: plain text files and JSON lines. Every error names the file and the line."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ..errors import Error

FORMATS = ("auto", "text", "jsonl")
TEXT_SUFFIXES = (".txt", ".md", ".text")
JSON_SUFFIXES = (".jsonl", ".ndjson")
ROLES = ("system", "user", "assistant", "tool")
FORMS = {
    frozenset({"text"}): "text",
    frozenset({"prompt", "completion"}): "completion",
    frozenset({"messages"}): "messages",
}
KEYS = sorted(set().union(*FORMS))


@dataclass(frozen=True)
class Row:
    """One document or one conversation, and where it stands.

    `kind` says which of the others are set: "text", "completion" (prompt and completion) or
    "messages" (role and content of each).
    """

    place: str
    kind: str
    text: str = ""
    prompt: str = ""
    completion: str = ""
    messages: tuple[dict[str, str], ...] = ()


def read_rows(path: str | os.PathLike[str], form: str = "auto") -> Iterator[Row]:
    """Rows of a file or of all files of a folder, in the order of their names.

    form: "text" (each file is one row), "jsonl" (each line is one row), or "auto", which goes by
    the file's suffix.
    """
    if form not in FORMATS:
        raise Error(f"[read_rows] format is one of {', '.join(FORMATS)}, found {form!r}")
    found = False
    for file in _files(Path(path), form):
        kind = form if form != "auto" else _kind_of(file)
        for row in _text_row(file) if kind == "text" else _json_rows(file):
            found = True
            yield row
    if not found:
        raise Error(f"[read_rows] {path} holds no rows")


def parse_row(value: Any, place: str) -> Row:
    """A row from a JSON object: {text}, {prompt, completion} or {messages}."""
    if not isinstance(value, dict):
        raise _error(place, f"a row is a JSON object, found {_kind(value)}")
    unknown = [key for key in value if key not in KEYS]
    if unknown:
        raise _error(place, f"unknown key {unknown[0]!r}{_nearest(unknown[0], KEYS)}")
    kind = FORMS.get(frozenset(value))
    if kind is None:
        found = ", ".join(sorted(value)) or "nothing"
        raise _error(
            place, f"a row has the keys text, or prompt and completion, or messages; found {found}"
        )
    if kind == "text":
        return Row(place, kind, text=_text(value["text"], "text", place))
    if kind == "completion":
        return Row(
            place,
            kind,
            prompt=_text(value["prompt"], "prompt", place),
            completion=_text(value["completion"], "completion", place),
        )
    return Row(place, kind, messages=_messages(value["messages"], place))


def _files(path: Path, form: str) -> list[Path]:
    if path.is_dir():
        wanted = {"text": TEXT_SUFFIXES, "jsonl": JSON_SUFFIXES}.get(
            form, TEXT_SUFFIXES + JSON_SUFFIXES
        )
        files = sorted(f for f in path.rglob("*") if f.is_file() and f.suffix.lower() in wanted)
        if not files:
            raise Error(f"[read_rows] the folder {path} holds no file ending in {' '.join(wanted)}")
        return files
    if not path.exists():
        raise Error(f"[read_rows] {path} does not exist")
    return [path]


def _kind_of(file: Path) -> str:
    suffix = file.suffix.lower()
    if suffix in JSON_SUFFIXES:
        return "jsonl"
    if suffix in TEXT_SUFFIXES:
        return "text"
    raise Error(
        f"[read_rows] {file}: a name ending in {suffix or 'no suffix'} does not say what the file "
        "is; say format text or jsonl"
    )


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise Error(f"[read_rows] {file}: {error.strerror}") from None


def _decode(data: bytes, place: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _error(
            place,
            f"byte {error.start} ({data[error.start]:#04x}) is not UTF-8; convert the file first "
            "(iconv -f latin1 -t utf-8)",
        ) from None


def _text_row(file: Path) -> Iterator[Row]:
    text = _decode(_read(file), str(file)).removeprefix("\ufeff").replace("\r\n", "\n")
    if not text.strip():
        raise _error(str(file), "the file holds no text")
    yield Row(str(file), "text", text=text)


def _json_rows(file: Path) -> Iterator[Row]:
    for number, line in enumerate(_read(file).split(b"\n"), start=1):
        place = f"{file}:{number}"
        text = _decode(line, place)
        if number == 1:
            text = text.removeprefix("\ufeff")
        if not text.strip():
            continue
        try:
            value = json.loads(text, object_pairs_hook=_no_repeats)
        except json.JSONDecodeError as error:
            raise _error(place, f"broken JSON at column {error.colno}: {error.msg}") from None
        except ValueError as error:
            raise _error(place, str(error)) from None
        except RecursionError:
            raise _error(place, "JSON is nested too deeply") from None
        yield parse_row(value, place)


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key occurs twice")
    return result


def _messages(value: Any, place: str) -> tuple[dict[str, str], ...]:
    if not isinstance(value, list):
        raise _error(place, f"messages is a list, found {_kind(value)}")
    messages = []
    for number, message in enumerate(value):
        where = f"messages[{number}]"
        if not isinstance(message, dict):
            raise _error(place, f"{where} is an object, found {_kind(message)}")
        for key in message:
            if key not in ("role", "content"):
                near = _nearest(key, ["role", "content"])
                raise _error(place, f"unknown key {key!r} in {where}{near}")
        for key in ("role", "content"):
            if key not in message:
                raise _error(place, f"{where} has no {key}")
        role = message["role"]
        if role not in ROLES:
            raise _error(
                place, f"{where} has the unknown role {role!r}; known are {', '.join(ROLES)}"
            )
        content = _text(message["content"], f"{where}.content", place)
        messages.append({"role": role, "content": content})
    if not any(message["role"] == "assistant" for message in messages):
        raise _error(place, "no message of the role assistant, so there is nothing to learn")
    return tuple(messages)


def _text(value: Any, name: str, place: str) -> str:
    if not isinstance(value, str):
        raise _error(place, f"{name} is a string, found {_kind(value)}")
    if not value.strip():
        raise _error(place, f"{name} is empty")
    if any("\ud800" <= c <= "\udfff" for c in value):
        raise _error(place, f"{name} holds half a surrogate pair, which is not text")
    return value


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false"}
    if value is None:
        return "null"
    return names.get(type(value), "a number")


def _nearest(key: str, known: list[str]) -> str:
    near = get_close_matches(key, known, 1)
    return f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(known)}"


def _error(place: str, what: str) -> Exception:
    return Error(f"[read_rows] {place}: {what}")
