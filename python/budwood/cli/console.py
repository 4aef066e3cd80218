"""What verbs print: lines and tables for a person, one JSON object for a program."""

from __future__ import annotations

import json
import math
import sys
from typing import Any

from rich.console import Console


class Output:
    """Where a verb writes. With as_json only result() reaches stdout; all else goes to stderr."""

    def __init__(self, as_json: bool = False):
        self.as_json = as_json
        self.console = Console(stderr=as_json, highlight=False, soft_wrap=True)

    @property
    def terminal(self) -> bool:
        return self.console.is_terminal

    def say(self, text: str = "", style: str | None = None) -> None:
        self.console.print(text, style=style, markup=False)

    def note(self, text: str) -> None:
        """A remark that does not belong to the result."""
        if self.terminal:
            self.console.print(text, style="dim", markup=False)
        else:
            self.say(text)

    def warn(self, text: str) -> None:
        self.console.print(f"warning: {text}", style="yellow", markup=False)

    def result(self, values: dict[str, Any]) -> None:
        """The figures of a verb, as JSON; without as_json nothing, since they were shown."""
        if self.as_json:
            json.dump(finite(values), sys.stdout, indent=2, ensure_ascii=False)
            sys.stdout.write("\n")
            sys.stdout.flush()

    def figures(self, pairs: list[tuple[str, str]]) -> None:
        """Names and values, one a line."""
        width = max(len(name) for name, _ in pairs)
        for name, value in pairs:
            self.console.print(f"[dim]{name:<{width}}[/dim]  ", end="")
            self.console.print(value, markup=False)

    def table(self, columns: list[tuple[str, str]], rows: list[list[str]]) -> None:
        """columns: (title, "left" or "right"). Nothing is cut: names are there to be copied."""
        titles = [title for title, _ in columns]
        widths = [max(map(len, cells)) for cells in zip(titles, *rows)]
        for number, cells in enumerate([titles, *rows]):
            padded = [
                cell.rjust(width) if side == "right" else cell.ljust(width)
                for cell, width, (_, side) in zip(cells, widths, columns)
            ]
            self.say("  ".join(padded).rstrip(), style="bold" if number == 0 else None)


def finite(value: Any) -> Any:
    """The value with null for numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def count(number: int) -> str:
    """1234567 -> '1,234,567'."""
    return f"{number:,}"


def size(number: float) -> str:
    """Bytes for a person."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if number < 1000 or unit == "GB":
            return f"{number:.0f} {unit}" if unit == "bytes" else f"{number:.1f} {unit}"
        number /= 1000
    raise AssertionError


def duration(seconds: float) -> str:
    """Seconds as 0:42 or 1:02:03."""
    whole = round(max(0.0, seconds))
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
