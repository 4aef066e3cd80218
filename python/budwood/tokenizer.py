"""The tokeniser of a model, from its folder or out of its GGUF file. Nothing is ever downloaded."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from .errors import Error

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


def load_tokenizer(path: str | os.PathLike[str]) -> Any:
    """The transformers tokeniser of a model folder, of a tokeniser folder or of a GGUF file."""
    path = Path(path)
    if not path.exists():
        raise Error(f"[load_tokenizer] {path} does not exist")
    transformers = _transformers()
    if path.is_dir():
        if not any((path / name).exists() for name in TOKENIZER_FILES):
            raise Error(
                f"[load_tokenizer] {path} holds no tokeniser ({', '.join(TOKENIZER_FILES)}): copy "
                "the tokeniser files of the model there, or name another folder with --tokenizer"
            )
        try:
            return transformers.AutoTokenizer.from_pretrained(str(path), local_files_only=True)
        except Exception as error:
            raise Error(f"[load_tokenizer] {path}: {_first_line(error)}") from error
    from . import _C

    with tempfile.TemporaryDirectory(prefix="budwood-tokenizer-") as folder:
        _C.write_tokenizer(str(path), folder)
        return transformers.PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)


def fingerprint(tokenizer: Any) -> str:
    """SHA-256 in hexadecimal over the vocabulary with its ids and the merges.

    Two tokenisers share it when their ids mean the same pieces of text, however their files were
    written.
    """
    parts: dict[str, Any] = {"vocabulary": sorted(tokenizer.get_vocab().items())}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        merges = json.loads(backend.to_str())["model"].get("merges", [])
        parts["merges"] = [m.split(" ") if isinstance(m, str) else m for m in merges]
    text = json.dumps(parts, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def vocabulary_size(tokenizer: Any) -> int:
    """One more than the largest id that the tokeniser can produce."""
    return max(tokenizer.get_vocab().values()) + 1


def end_ids(tokenizer: Any) -> list[int]:
    """Ids after which an answer is over: the end of the sequence and the end of a chat turn."""
    ids = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    vocabulary = tokenizer.get_added_vocab()
    for token in ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>"):
        if token in vocabulary and vocabulary[token] not in ids:
            ids.append(int(vocabulary[token]))
    return ids


def _transformers() -> Any:
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TRANSFORMERS_OFFLINE"] = "1"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        import transformers
    except ImportError:
        raise Error(
            "[load_tokenizer] text needs the package transformers: pip install 'budwood[hf]'"
        ) from None
    return transformers


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
