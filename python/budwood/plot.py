"""The loss curve of a run, from its metrics.jsonl."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from .errors import Error

INK, TRAIN, EVAL = "#333333", "#2f6f9f", "#c0562b"


def read_metrics(path: str | os.PathLike[str]) -> tuple[list[Any], list[Any]]:
    """(logged steps, evaluations) of a metrics.jsonl. A last line cut short is left out."""
    train, evaluations = [], []
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise Error(f"[plot] {path} does not exist") from None
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            if number == len(lines):
                break
            raise Error(f"[plot] {path}:{number} is not JSON") from None
        if "eval_loss" in entry:
            evaluations.append(entry)
        elif "loss" in entry:
            train.append(entry)
    return train, evaluations


def smooth(values: list[float], weight: float) -> list[float]:
    """Exponential moving average, corrected for its start: the first value is the first value."""
    result, total, mass = [], 0.0, 0.0
    for value in values:
        total = weight * total + (1 - weight) * value
        mass = weight * mass + (1 - weight)
        result.append(total / mass)
    return result


def plot_loss(
    metrics: str | os.PathLike[str],
    image: str | os.PathLike[str],
    title: str = "",
    start: dict[str, Any] | None = None,
) -> Path:
    """Draws training and evaluation loss over steps into a PNG file, and returns its path.

    start: an evaluation (loss, loss_error) from before the first step.
    """
    try:
        import matplotlib
    except ImportError:
        raise Error("[plot] the loss curve needs matplotlib: pip install 'budwood[plot]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator

    train, evaluations = read_metrics(metrics)
    train = [m for m in train if m["loss"] is not None and math.isfinite(m["loss"])]
    if not train:
        raise Error(f"[plot] {metrics} holds no logged step")
    if start is not None:
        first = {"step": 0, "eval_loss": start["loss"], "eval_loss_error": start["loss_error"]}
        evaluations = [first, *evaluations]
    steps, losses = [m["step"] for m in train], [m["loss"] for m in train]

    figure, axes = pyplot.subplots(figsize=(7.2, 4.2), dpi=150, layout="constrained")
    many = len(steps) >= 10
    axes.plot(
        steps,
        losses,
        color=TRAIN,
        alpha=0.3 if many else 1.0,
        linewidth=1.0 if many else 1.6,
        marker=None if many else "o",
        markersize=4,
        label=None if many else "training",
    )
    if many:
        weight = 1 - 1 / max(4.0, len(steps) / 12)
        axes.plot(steps, smooth(losses, weight), color=TRAIN, linewidth=1.8, label="training")
    if evaluations:
        errors = [m.get("eval_loss_error") or 0.0 for m in evaluations]
        errors = [e if math.isfinite(e) else 0.0 for e in errors]
        axes.errorbar(
            [m["step"] for m in evaluations],
            [m["eval_loss"] for m in evaluations],
            yerr=errors if any(e > 0 for e in errors) else None,
            color=EVAL,
            marker="o",
            markersize=5,
            linewidth=1.4,
            capsize=3,
            label="held out",
        )
    if title:
        axes.set_title(title, loc="left", fontsize=11, color=INK)
    axes.set_xlabel("step", color=INK)
    axes.set_ylabel("loss (nats per token)", color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.tick_params(colors=INK)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(frameon=False, loc="upper right")
    figure.savefig(Path(image))
    pyplot.close(figure)
    return Path(image)
