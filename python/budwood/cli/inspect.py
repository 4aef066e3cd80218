"""budwood inspect"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import Error
from .console import Output, count, size


def run(path: str, *, tensors: bool, plot: Path | None, as_json: bool) -> None:
    from .. import _C

    output = Output(as_json)
    found = json.loads(_C.inspect(path))
    if plot is not None:
        from ..plot import plot_norms

        if found["kind"] != "adapter":
            raise Error(f"[inspect] the heat map is of an adapter; {path} is a {found['kind']}")
        name = Path(path).resolve().name
        plot_norms(found["modules"], plot, f"{name}: what the adapter changes")
        output.note(f"heat map: {plot}")
    if as_json:
        output.result(found if tensors else {k: v for k, v in found.items() if k != "tensors"})
        return
    show = {"adapter": show_adapter, "gguf": show_gguf, "model": show_model}
    show.get(found["kind"], show_file)(output, found)
    for warning in found.get("warnings", []):
        output.warn(warning)
    if tensors:
        output.say()
        show_tensors(output, found["tensors"])
    elif found["kind"] != "adapter":
        output.note("--tensors lists them")


def show_adapter(output: Output, found: dict[str, Any]) -> None:
    config = found["config"]
    output.figures(
        [
            ("adapter", found["path"]),
            ("method", found["method"]),
            ("base model", str(config.get("base_model_name_or_path"))),
            ("base weights", found.get("base") or "not recorded"),
            ("parameters", count(found["parameters"])),
            ("dtype", types(found)),
            ("targets", names(config.get("target_modules"))),
            ("places", count(len(found["modules"]))),
        ]
    )
    output.say()
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for module in found["modules"]:
        name = module["path"].rpartition(".")[2]
        key = (name, module.get("rank"), module.get("alpha"), module.get("scaling"))
        groups.setdefault(key, []).append(module)
    rows = []
    for (name, rank, alpha, scaling), modules in groups.items():
        norms = [m["delta_norm"] for m in modules if m.get("delta_norm") is not None]
        rows.append(
            [
                name,
                str(len(modules)),
                *(dash(x) for x in (rank, alpha, scaling)),
                f"{sum(norms) / len(norms):.4g}" if norms else "-",
            ]
        )
    columns = [("target", "left"), ("places", "right"), ("rank", "right"), ("alpha", "right")]
    columns += [("scale", "right"), ("mean norm of the change", "right")]
    output.table(columns, rows)


def show_gguf(output: Output, found: dict[str, Any]) -> None:
    metadata = found["metadata"]
    output.figures(
        [
            ("GGUF file", found["path"]),
            ("version", str(found["version"])),
            ("architecture", found["architecture"]),
            ("parameters", count(found["parameters"])),
            ("tensors", count(len(found["tensors"]))),
            ("types", types(found)),
            ("size", size(total_bytes(found))),
        ]
    )
    output.say()
    rows = [[key, shorten(value)] for key, value in metadata.items()]
    output.table([("metadata", "left"), ("value", "left")], rows)


def show_model(output: Output, found: dict[str, Any]) -> None:
    config = found["config"]
    layers = [f"{config[k]} {label}" for k, label in SHAPE.items() if config.get(k) is not None]
    output.figures(
        [
            ("model folder", found["path"]),
            ("architecture", names(config.get("architectures")) or str(config.get("model_type"))),
            ("shape", ", ".join(layers)),
            ("parameters", count(found["parameters"])),
            ("tensors", count(len(found["tensors"]))),
            ("dtype", types(found)),
            ("files", ", ".join(found["shards"])),
            ("size", size(total_bytes(found))),
        ]
    )


def show_file(output: Output, found: dict[str, Any]) -> None:
    pairs = [
        ("safetensors file", found["path"]),
        ("parameters", count(found["parameters"])),
        ("tensors", count(len(found["tensors"]))),
        ("dtype", types(found)),
        ("size", size(total_bytes(found))),
    ]
    pairs += [(f"metadata {key}", shorten(value)) for key, value in found["metadata"].items()]
    output.figures(pairs)


SHAPE = {
    "num_hidden_layers": "layers",
    "hidden_size": "wide",
    "num_attention_heads": "heads",
    "num_key_value_heads": "key-value heads",
    "vocab_size": "tokens in the vocabulary",
}


def show_tensors(output: Output, tensors: list[dict[str, Any]]) -> None:
    rows = [
        [t["name"], t["dtype"], " x ".join(map(str, t["shape"])) or "scalar", size(t["bytes"])]
        for t in tensors
    ]
    columns = [("tensor", "left"), ("dtype", "left"), ("shape", "right"), ("size", "right")]
    output.table(columns, rows)


def types(found: dict[str, Any]) -> str:
    """'F32 (61), Q4_1 (210)'."""
    known = found.get("types")
    if known is None:
        known = {}
        for tensor in found["tensors"]:
            known[tensor["dtype"]] = known.get(tensor["dtype"], 0) + 1
    return ", ".join(f"{name} ({number})" for name, number in sorted(known.items()))


def total_bytes(found: dict[str, Any]) -> int:
    return sum(t["bytes"] for t in found["tensors"])


def names(value: Any) -> str:
    return (
        ", ".join(map(str, value))
        if isinstance(value, list)
        else ""
        if value is None
        else str(value)
    )


def dash(value: Any) -> str:
    return "-" if value is None else f"{value:g}"


def shorten(value: Any, length: int = 60) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= length else text[: length - 3] + "..."
