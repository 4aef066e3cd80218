"""Which characters of a rendered conversation the assistant wrote.

The template renders the whole conversation once, and that text is tokenised once. Where an answer
begins and ends is found by rendering the conversation up to it: what comes out must be the
beginning of the whole text, or the row is refused.
"""

from __future__ import annotations

import itertools
from typing import Any

from ..errors import Error
from .rows import Row


def render(tokenizer: Any, messages: Any, row: Row, *, ask: bool = False) -> str:
    """The text of messages under the model's chat template; ask: with the opening of an answer."""
    if not getattr(tokenizer, "chat_template", None):
        raise Error(
            f"[tokenize] {row.place}: messages need a chat template and the tokeniser has none; "
            "use rows with prompt and completion, or a chat model"
        )
    try:
        return tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=ask
        )
    except Exception as error:
        raise Error(f"[tokenize] {row.place}: the chat template refuses the row: {error}") from None


def answer_spans(tokenizer: Any, row: Row) -> tuple[str, list[tuple[int, int]]]:
    """The rendered conversation and the [begin, end) of each answer with what closes its turn."""
    check_content(tokenizer, row)
    messages = row.messages
    whole = render(tokenizer, messages, row)
    spans = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = render(tokenizer, messages[:i], row, ask=True)
        if not whole.startswith(before):
            raise _unclear(row, i, "begins")
        through = render(tokenizer, messages[: i + 1], row)
        if len(through) > len(before) and whole.startswith(through):
            spans.append((len(before), len(through)))
            continue
        # Some templates write the last answer differently from earlier ones: look for the words.
        content = message["content"]
        for words in (content, content.strip()):
            if whole.startswith(words, len(before)):
                end = _turn_end(tokenizer, whole, len(before) + len(words))
                spans.append((len(before), end))
                break
        else:
            raise _unclear(row, i, "ends")
    if any(a[1] > b[0] for a, b in itertools.pairwise(spans)):
        raise _unclear(row, len(messages) - 1, "begins")
    return whole, spans


def check_content(tokenizer: Any, row: Row) -> None:
    """Refuses messages that contain a control token's text: they could fake the end of a turn."""
    for i, message in enumerate(row.messages):
        for token in control_tokens(tokenizer):
            if token in message["content"]:
                raise Error(
                    f"[tokenize] {row.place}: messages[{i}].content contains {token!r}, which the "
                    "model reads as a control token; remove it, or render the row yourself as text"
                )


def control_tokens(tokenizer: Any) -> list[str]:
    """The texts of the tokeniser's control tokens."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return [token.content for token in added.values() if token.special]


def _turn_end(tokenizer: Any, text: str, begin: int) -> int:
    for token in control_tokens(tokenizer):
        if text.startswith(token, begin):
            return begin + len(token)
    return begin


def _unclear(row: Row, index: int, what: str) -> Exception:
    return Error(
        f"[tokenize] {row.place}: the chat template renders messages[{index}] differently inside "
        f"the whole conversation, so it is unclear where this answer {what}; split the "
        "conversation so that it ends with this answer"
    )
