"""budwood verify"""

from __future__ import annotations

import json
import math
from pathlib import Path

from .console import Output

SHOWN = 10


def run(
    *,
    model: str,
    adapters: list[str],
    weights: list[float],
    merged: Path,
    tolerance: float,
    as_json: bool,
) -> bool:
    """Prints how a merged model stands to what it should be; whether it is within the tolerance."""
    from ..merging import verify_files

    output = Output(as_json)
    report = verify_files(model, adapters, merged, weights=weights)
    passed = report.passed(tolerance)
    for fault in report.faults:
        output.warn(fault)
    changed = [tensor for tensor in report.tensors if tensor.delta_norm > 0]
    wrong = [tensor for tensor in report.tensors if not tensor.equal]
    rows = [
        [
            tensor.name,
            f"{tensor.steps:.3g}" if math.isfinite(tensor.steps) else "should not change",
            f"{tensor.survival:.4f}",
            f"{tensor.error:.2%}",
        ]
        for tensor in sorted(wrong, key=lambda tensor: -tensor.steps)[:SHOWN]
    ]
    output.figures(
        [
            ("tensors", f"{len(report.tensors)}, {len(changed)} of them changed by the adapters"),
            ("as Budwood", f"{len(report.tensors) - len(wrong)} byte for byte"),
            ("largest", f"{max((t.steps for t in report.tensors), default=0):.3g} steps"),
            ("verdict", f"{'within' if passed else 'not within'} {tolerance:g} steps"),
        ]
    )
    if rows:
        output.table(
            [("tensor", "left"), ("steps", "right"), ("survival", "right"), ("error", "right")],
            rows,
        )
    output.result(json.loads(report.to_json(tolerance)))
    return passed
