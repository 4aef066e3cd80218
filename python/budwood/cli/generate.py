"""budwood generate"""

from __future__ import annotations

import sys
import time
from typing import Any

from ..errors import Error
from ..tokenizer import end_ids, load_tokenizer
from .console import Output
from .opening import open_model


def run(
    prompt: str | None,
    *,
    model: str,
    adapters: list[str],
    chat: bool,
    system: str | None,
    sampling: dict[str, Any],
    tokenizer: str | None,
    dtype: str,
    quantize: str | None,
    as_json: bool,
) -> None:
    if system is not None and not chat:
        raise Error("[generate] --system belongs to --chat")
    talk = chat and prompt is None and sys.stdin.isatty()
    if talk and as_json:
        raise Error("[generate] --json needs a prompt: give --prompt or pipe one in")
    if prompt is None and not talk:
        prompt = sys.stdin.read()
        prompt = prompt.removesuffix("\n")
    if prompt == "":
        raise Error("[generate] the prompt is empty")
    speaker = Speaker(
        load_tokenizer(tokenizer or model), open_model(model, dtype, adapters, quantize), sampling
    )
    messages = [] if system is None else [{"role": "system", "content": system}]
    if talk:
        converse(speaker, messages)
        return
    if chat:
        ids = speaker.chat_ids([*messages, {"role": "user", "content": prompt}])
    else:
        ids = speaker.tokenizer(prompt).input_ids
    begin = time.perf_counter()
    answer, new = speaker.speak(ids, quiet=as_json)
    seconds = time.perf_counter() - begin
    output = Output(as_json)
    output.result(
        {
            "prompt": prompt,
            "text": answer,
            "prompt_tokens": len(ids),
            "new_tokens": len(new),
            "stopped": bool(new) and new[-1] in speaker.ends,
            "seconds": round(seconds, 3),
            "tokens_per_second": round(len(new) / seconds, 2),
            **sampling,
        }
    )


def converse(speaker: Speaker, messages: list[dict[str, str]]) -> None:
    """A conversation on the terminal, until the end of input."""
    print("A conversation; Ctrl-D ends it.\n")
    while True:
        try:
            question = input("> ").strip()
        except EOFError:
            print()
            return
        if not question:
            continue
        messages.append({"role": "user", "content": question})
        answer, _ = speaker.speak(speaker.chat_ids(messages))
        messages.append({"role": "assistant", "content": answer})
        print()


class Speaker:
    """A model and its tokeniser: token ids in, text out as it is made."""

    def __init__(self, tokenizer: Any, model: Any, sampling: dict[str, Any]):
        self.tokenizer = tokenizer
        self.model = model
        self.sampling = sampling
        eos = model.config.get("eos_token_id")
        named = eos if isinstance(eos, list) else [] if eos is None else [eos]
        self.ends = sorted({*end_ids(tokenizer), *named})

    def chat_ids(self, messages: list[dict[str, str]]) -> list[int]:
        """The prompt of a chat turn under the model's template."""
        if not getattr(self.tokenizer, "chat_template", None):
            raise Error("[generate] the tokeniser has no chat template: leave out --chat")
        try:
            text = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
        except Exception as error:
            raise Error(f"[generate] the chat template refuses this: {error}") from None
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def speak(self, ids: list[int], quiet: bool = False) -> tuple[str, list[int]]:
        """Generates, printing the text unless quiet; returns it and the new tokens."""
        from .. import _C

        if not ids:
            raise Error("[generate] the prompt has no tokens")
        stream = TextStream(self.tokenizer, set(self.ends), sys.stdout if not quiet else None)
        new = _C.generate(self.model, ids, eos_ids=self.ends, callback=stream.add, **self.sampling)
        stream.close()
        return stream.text, list(new)


class TextStream:
    """Tokens to text. A character that is still incomplete is held back."""

    def __init__(self, tokenizer: Any, ends: set[int], out: Any | None):
        self.tokenizer = tokenizer
        self.ends = ends
        self.out = out
        self.ids: list[int] = []
        self.text = ""

    def add(self, token: int) -> None:
        if token in self.ends:
            return
        self.ids.append(token)
        text = self._decode()
        if not text.endswith("�"):
            self._put(text)

    def close(self) -> None:
        self._put(self._decode())
        if self.out is not None:
            self.out.write("\n")
            self.out.flush()

    def _decode(self) -> str:
        return self.tokenizer.decode(self.ids, clean_up_tokenization_spaces=False)

    def _put(self, text: str) -> None:
        if self.out is not None:
            self.out.write(text[len(self.text) :])
            self.out.flush()
        self.text = text
