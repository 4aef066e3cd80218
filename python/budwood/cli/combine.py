"""budwood combine"""

from __future__ import annotations

from pathlib import Path

from .console import Output
from .replacing import check_replaceable


def run(
    *,
    adapters: list[str],
    weights: list[float],
    out: Path,
    mode: str,
    rank: int,
    density: float,
    seed: int,
    overwrite: bool,
    as_json: bool,
) -> None:
    from ..merging import combine_files

    output = Output(as_json)
    if out.exists():
        check_replaceable("combine", out, adapters, overwrite, "an adapter folder")
    report = combine_files(
        adapters,
        out,
        weights=weights,
        mode=mode,
        rank=rank,
        density=density,
        seed=seed,
        overwrite=overwrite,
    )
    for warning in report.warnings:
        output.warn(warning)
    worst = max(report.modules, key=lambda module: module.error)
    ranks = sorted({module.rank for module in report.modules})
    output.figures(
        [
            ("adapters", ", ".join(adapters)),
            ("combined into", str(out)),
            ("modules", f"{len(report.modules)}, of rank {', '.join(map(str, ranks))}"),
            ("error", f"up to {worst.error:.3g} of the sum ({worst.path})"),
        ]
    )
    output.result(
        {
            "output": str(out),
            "mode": mode,
            "modules": [
                {key: getattr(m, key) for key in ("path", "rank", "delta_norm", "error")}
                for m in report.modules
            ],
            "warnings": report.warnings,
        }
    )
