"""Rows of text to rows of token ids, with the tokens that the loss counts.

* text: all tokens count.
* prompt and completion: the tokens of the completion count.
* messages: the tokens of the assistant's answers count, with the token that ends each turn.

A row is tokenised once, as one text; the counted part is found by character positions. Text and
completions end with the end-of-sequence token, which counts, so that the model learns to stop. A
beginning-of-sequence token is put in front where the tokeniser itself would put one; it never
counts, since nothing predicts it.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from dataclasses import dataclass
from typing import Any

from ..errors import Error
from .chat import answer_spans, control_tokens
from .rows import Row


@dataclass
class Encoded:
    """Token ids of a row and, for each, whether the loss counts on it.

    lost: bytes that the tokeniser has no token for and drops, and unknown tokens.
    """

    ids: list[int]
    counted: list[bool]
    lost: int = 0

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def targets(self) -> int:
        """Tokens that are predicted: the first token of a row never is."""
        return sum(self.counted[1:])


class Encoder:
    """Tokenises rows.

    bos: put a beginning-of-sequence token in front; None = where the tokeniser does so itself.
    eos: end text and completions with the end-of-sequence token. Chat templates bring their own.
    """

    def __init__(self, tokenizer: Any, *, bos: bool | None = None, eos: bool = True):
        if not getattr(tokenizer, "is_fast", False):
            raise Error(
                f"[tokenize] {type(tokenizer).__name__} does not say which characters a token "
                "covers; save the tokeniser as tokenizer.json (a fast tokeniser)"
            )
        self.tokenizer = tokenizer
        plain = tokenizer("a", add_special_tokens=False).input_ids
        added = tokenizer("a", add_special_tokens=True).input_ids
        adds_bos = len(added) > len(plain) and added[0] == tokenizer.bos_token_id
        self.bos = self._token("bos", adds_bos if bos is None else bos)
        self.eos = self._token("eos", eos)
        self.missing = missing_bytes(tokenizer)
        # A byte-level model never makes the unknown token; others put it where they know nothing.
        self.unknown = None if byte_level(tokenizer) else tokenizer.unk_token_id
        self.control = set(tokenizer.convert_tokens_to_ids(control_tokens(tokenizer)))

    def __call__(self, row: Row) -> Encoded:
        """Raises Error naming the row when its counted part cannot be told apart."""
        if row.kind == "text":
            ids, _ = self._tokenise(row.text)
            return self._close(row.text, ids, [True] * len(ids))
        if row.kind == "completion":
            return self._completion(row)
        return self._messages(row)

    def _token(self, name: str, wanted: bool) -> int | None:
        if not wanted:
            return None
        value = getattr(self.tokenizer, f"{name}_token_id")
        if value is None:
            raise Error(
                f"[tokenize] the tokeniser names no {name} token; switch it off with {name}: false"
            )
        return int(value)

    def _tokenise(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        result = self.tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        return list(result["input_ids"]), [tuple(span) for span in result["offset_mapping"]]

    def _lost(self, text: str, ids: list[int]) -> int:
        data = text.encode()
        dropped = len(data) - len(data.translate(None, self.missing))
        return dropped + (0 if self.unknown is None else ids.count(self.unknown))

    def _close(self, text: str, ids: list[int], counted: list[bool]) -> Encoded:
        """Adds the tokens around a row of text unless its text already holds them."""
        lost = self._lost(text, ids)
        if self.bos is not None and ids[:1] != [self.bos]:
            ids, counted = [self.bos, *ids], [False, *counted]
        if self.eos is not None and ids[-1:] != [self.eos]:
            ids, counted = [*ids, self.eos], [*counted, True]
        return Encoded(ids, counted, lost)

    def _completion(self, row: Row) -> Encoded:
        text = row.prompt + row.completion
        ids, offsets = self._tokenise(text)
        first = self._boundary(ids, offsets, row, row.prompt, len(row.prompt))
        return self._close(text, ids, [i >= first for i in range(len(ids))])

    def _messages(self, row: Row) -> Encoded:
        text, spans = answer_spans(self.tokenizer, row)
        ids, offsets = self._tokenise(text)
        special = self.control
        counted = [False] * len(ids)
        for begin, end in spans:
            first = self._boundary(ids, offsets, row, text[:begin], begin)
            last = self._boundary(ids, offsets, row, text[:end], end)
            # What follows the end-of-turn token belongs to the template: it is never generated.
            ends = [i for i in range(first, last) if ids[i] in special]
            if ends and not text[offsets[ends[-1]][1] : end].strip():
                last = ends[-1] + 1
            if last <= first:
                raise Error(f"[tokenize] {row.place}: an answer has no tokens")
            counted[first:last] = [True] * (last - first)
        lost = self._lost(text, ids)
        stops = any(flag and token in special for token, flag in zip(ids, counted))
        if not stops and self.eos is not None and row.messages[-1]["role"] == "assistant":
            # A template without an end-of-turn token: the end of the row has to teach stopping.
            ids, counted = [*ids, self.eos], [*counted, True]
        return Encoded(ids, counted, lost)

    def _boundary(
        self,
        ids: list[int],
        offsets: list[tuple[int, int]],
        row: Row,
        before: str,
        position: int,
    ) -> int:
        """Index of the first token at or after a character position; no token may lie across it."""
        first = bisect_right(offsets, position, key=lambda span: span[1])
        across = first < len(ids) and offsets[first][0] < position
        # Some tokenisers leave white space out of the offsets of the token that holds it.
        covered = first > 0 and offsets[first - 1][1] == position
        if position == 0 or first == len(ids) or (covered and not across):
            return first
        if not across and self._tokenise(before)[0] == ids[:first]:
            return first
        token = self.tokenizer.decode([ids[first]])
        raise Error(
            f"[tokenize] {row.place}: the token {token!r} lies across the boundary after "
            f"{before[-20:]!r}; move white space from the end of the prompt to the start of the "
            "completion"
        )


def byte_level(tokenizer: Any) -> bool:
    """Whether the vocabulary is made of bytes."""
    decoder = json.loads(tokenizer.backend_tokenizer.to_str()).get("decoder")
    return "ByteLevel" in json.dumps(decoder)


def missing_bytes(tokenizer: Any) -> bytes:
    """Bytes that a byte-level tokeniser has no token for and drops in silence."""
    if not byte_level(tokenizer):
        return b""
    known = tokenizer.get_vocab()
    return bytes(byte for byte, symbol in byte_symbols().items() if symbol not in known)


def byte_symbols() -> dict[int, str]:
    """The characters that stand for bytes in a byte-level vocabulary, as GPT-2 chose them."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    symbols = {byte: chr(byte) for byte in printable}
    others = [byte for byte in range(256) if byte not in symbols]
    return symbols | {byte: chr(256 + i) for i, byte in enumerate(others)}
