"""budwood convert"""

from __future__ import annotations

from pathlib import Path

from ..merging import convert
from .console import Output, count


def run(*, adapter: str, to: str, model: str, out: Path, overwrite: bool, as_json: bool) -> None:
    output = Output(as_json)
    report = convert(adapter, out, to=to, model=model, overwrite=overwrite)
    for warning in report.warnings:
        output.warn(warning)
    output.figures(
        [
            ("adapter", f"{adapter} ({report.from_format})"),
            ("written to", f"{out} ({to})"),
            ("modules", f"{report.modules} with {count(report.parameters)} parameters"),
        ]
    )
    output.result(
        {
            "adapter": adapter,
            "from": report.from_format,
            "to": to,
            "output": str(out),
            "modules": report.modules,
            "parameters": report.parameters,
        }
    )
