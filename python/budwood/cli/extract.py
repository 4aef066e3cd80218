"""budwood extract"""

from __future__ import annotations

import math
from pathlib import Path

from .console import Output, count
from .replacing import check_replaceable

SHOWN = 10


def run(
    *,
    base: Path,
    tuned: Path,
    out: Path,
    rank: int,
    energy: float,
    targets: list[str],
    overwrite: bool,
    as_json: bool,
) -> None:
    from ..merging import extract

    output = Output(as_json)
    if out.exists():
        check_replaceable("extract", out, [str(base), str(tuned)], overwrite, "an adapter folder")
    report = extract(
        base, tuned, out, rank=rank, energy=energy, targets=targets, overwrite=overwrite
    )
    least = min(report.modules, key=lambda module: module.energy)
    output.figures(
        [
            ("base", str(base)),
            ("tuned", str(tuned)),
            ("adapter", f"{out}, {count(report.parameters)} parameters"),
            ("modules", f"{len(report.modules)}, and {len(report.identical)} that do not differ"),
            ("least kept", f"{least.energy:.4%} of the squared difference ({least.path})"),
        ]
    )
    if report.lost:
        output.warn(f"{len(report.lost)} tensors differ and are not in the adapter")
        output.table(
            [("not in the adapter", "left"), ("norm of the difference", "right")],
            [
                [
                    lost.name,
                    "other shape" if math.isnan(lost.delta_norm) else f"{lost.delta_norm:.4g}",
                ]
                for lost in report.lost[:SHOWN]
            ],
        )
    output.result(
        {
            "output": str(out),
            "parameters": report.parameters,
            "modules": [
                {key: getattr(m, key) for key in ("path", "rank", "delta_norm", "energy")}
                for m in report.modules
            ],
            "identical": report.identical,
            "lost": [{"name": t.name, "delta_norm": t.delta_norm} for t in report.lost],
        }
    )
