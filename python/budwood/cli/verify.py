"""budwood verify"""

from __future__ import annotations

import json
import math
from pathlib import Path

from .. import _C
from ..errors import Error
from .console import Output

SHOWN = 10


def run(
    *,
    model: str,
    adapters: list[str],
    weights: list[float],
    merged: Path,
    tolerance: float,
    tokens: str | None,
    random_tokens: int,
    logits_tolerance: float,
    as_json: bool,
) -> bool:
    """Prints how a merged model stands to what it should be; whether it is within the tolerance."""
    from ..merging import verify_files, with_weights

    output = Output(as_json)
    report = verify_files(model, adapters, merged, weights=weights)
    passed = report.passed(tolerance)
    logits = None
    if tokens or random_tokens > 0:
        pairs = with_weights(adapters, weights)
        try:
            logits = _C.compare_logits(model, pairs, str(merged), ids_of(tokens), random_tokens)
        except Error as error:
            if tokens:
                raise
            output.warn(f"logits are not compared: {error}")
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
    values = json.loads(report.to_json(tolerance))
    if logits is not None:
        passed = passed and logits.relative <= logits_tolerance
        output.figures(
            [
                (
                    "logits",
                    f"{logits.relative:.2g} of the largest apart, {logits_tolerance:g} is allowed",
                ),
                ("best token", f"the same at {logits.agreement:.1%} of {logits.tokens} positions"),
            ]
        )
        values["logits"] = {
            "tokens": logits.tokens,
            "difference": logits.difference,
            "relative": logits.relative,
            "agreement": logits.agreement,
            "tolerance": logits_tolerance,
        }
    if rows:
        output.table(
            [("tensor", "left"), ("steps", "right"), ("survival", "right"), ("error", "right")],
            rows,
        )
    output.result(values)
    return passed


def ids_of(text: str | None) -> list[int]:
    """'1,2,3' -> [1, 2, 3]."""
    try:
        return [int(part) for part in text.split(",")] if text else []
    except ValueError:
        raise Error(f"[verify] --tokens is {text!r}, wanted ids such as 1,15,7") from None
