"""budwood unmerge"""

from __future__ import annotations

from pathlib import Path

from ..merging import unmerge_files
from .console import Output
from .merge import parse_size
from .replacing import check_replaceable

SOURCES = {
    "backup": "bit for bit, from the backup",
    "base": "bit for bit, from the base",
    "subtracted": "by subtraction",
}


def run(
    *,
    model: Path,
    adapters: list[str],
    weights: list[float],
    base: Path | None,
    out: Path,
    max_shard_size: str,
    overwrite: bool,
    as_json: bool,
) -> None:
    output = Output(as_json)
    if out.exists():
        check_replaceable("unmerge", out, [model, base, *adapters], overwrite, "a model folder")
    report = unmerge_files(
        model,
        out,
        adapters=adapters,
        weights=weights or None,
        base=base or "",
        max_shard_size=parse_size("unmerge", max_shard_size),
        overwrite=overwrite,
    )
    for warning in report.warnings:
        output.warn(warning)
    how = SOURCES[report.source]
    if report.source == "subtracted":
        how += f"; up to {report.error:.2%} of a change is left"
    output.figures(
        [
            ("merged model", str(model)),
            ("written to", str(out)),
            ("weights", f"{len(report.restored)} changed back, {how}"),
        ]
    )
    output.result(
        {
            "model": str(model),
            "output": str(out),
            "source": report.source,
            "restored": report.restored,
            "error": report.error,
        }
    )
