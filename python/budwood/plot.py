"""Figures: the loss curve of a run, and what an adapter changes where."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from .errors import Error

INK, TRAIN, EVAL = "#333333", "#2f6f9f", "#c0562b"


def _pyplot(what: str) -> Any:
    try:
        import matplotlib
    except ImportError:
        raise Error(f"[plot] {what} needs matplotlib: pip install 'budwood[plot]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


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
    pyplot = _pyplot("the loss curve")
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


def plot_norms(modules: list[dict[str, Any]], image: str | os.PathLike[str], title: str) -> Path:
    """Draws a heat map of an adapter's changes, a row for each block and a column for each target.

    modules: {"path", "delta_norm"} of each, as `inspect` has them; the image is PNG or SVG by its
    name. Norms are those of the whole change of a weight (Frobenius).
    """
    image = Path(image)
    if image.suffix.lower() not in (".png", ".svg"):
        raise Error(f"[plot] {image} is to be a .png or .svg file")
    rows, columns, norms = _by_block(modules)
    if not norms:
        raise Error("[plot] the adapter has no norms to draw: it is no change of weights")
    pyplot = _pyplot("the heat map")
    import numpy
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    grid = numpy.full((len(rows), len(columns)), numpy.nan)
    for (row, column), norm in norms.items():
        grid[rows.index(row), columns.index(column)] = norm
    width, height = 2.4 + 0.75 * len(columns), 1.6 + max(1.2, 0.24 * len(rows))
    figure, axes = pyplot.subplots(figsize=(width, height), dpi=150, layout="constrained")
    colours = pyplot.get_cmap("viridis").copy()
    colours.set_bad("#f0f0f0")
    picture = axes.imshow(grid, cmap=colours, vmin=0.0, aspect="auto", interpolation="nearest")
    axes.set_xticks(range(len(columns)), columns, rotation=40, ha="right", color=INK)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=16, min_n_ticks=1))
    axes.yaxis.set_major_formatter(
        FuncFormatter(
            lambda at, _: rows[round(at)] if at == round(at) and 0 <= at < len(rows) else ""
        )
    )
    axes.set_ylabel("block", color=INK)
    axes.tick_params(colors=INK, length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    bar = figure.colorbar(picture, ax=axes, pad=0.02)
    bar.set_label("norm of the change", color=INK)
    bar.outline.set_visible(False)
    axes.set_title(title, loc="left", fontsize=10, color=INK)
    figure.savefig(image)
    pyplot.close(figure)
    return image


def _by_block(
    modules: list[dict[str, Any]],
) -> tuple[list[str], list[str], dict[tuple[str, str], float]]:
    """(blocks, targets, norm at each) of module paths: "model.layers.3.mlp.up_proj" is up_proj of
    block 3, and what is in no block has a row of its own, "-"."""
    rows: list[str] = []
    columns: list[str] = []
    norms = {}
    for module in modules:
        norm = module.get("delta_norm")
        if norm is None or not math.isfinite(norm):
            continue
        parts = module["path"].split(".")
        number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        row = "-" if number is None else parts[number]
        column = parts[-1] if number is None else ".".join(parts[number + 1 :])
        column = column.removeprefix("self_attn.").removeprefix("mlp.").removeprefix("attn.")
        if row not in rows:
            rows.append(row)
        if column not in columns:
            columns.append(column)
        norms[row, column] = norm
    rows.sort(key=lambda row: (not row.isdigit(), int(row) if row.isdigit() else 0))
    return rows, columns, norms
