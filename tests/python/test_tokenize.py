"""Text to token rows: which tokens count, and what is refused."""

from __future__ import annotations

import json

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizer import byte_tokenizer

from budwood import _C, Error
from budwood.data import Encoder, read_rows, write_token_file
from budwood.data.rows import parse_row
from budwood.tokenizer import end_ids, fingerprint, load_tokenizer

LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start|>{{ m.role }}<|end|>\n\n{{ m.content | trim }}"
    "<|eot|>{% endfor %}{% if add_generation_prompt %}<|start|>assistant<|end|>\n\n{% endif %}"
)
# Writes thoughts into the last answer only, as some reasoning models do.
THINKING = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}"
    "<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|eot|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
PLAIN = (
    "{% for m in messages %}{{ '### ' + m.role + ':\n' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant:\n' }}{% endif %}"
)
SHOUTING = (
    "{% for m in messages %}{{ m.role }}: {{ m.content | upper if loop.last else m.content }}\n"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 2+2?"},
    {"role": "assistant", "content": "4, of course."},
    {"role": "user", "content": "And in French?\nPlease."},
    {"role": "assistant", "content": "Quatre.  Voilà: 四"},
]


@pytest.fixture(scope="session")
def smollm2(smollm2_gguf):
    """SmolLM2's tokeniser as transformers itself makes it from the GGUF."""
    return transformers.AutoTokenizer.from_pretrained(
        smollm2_gguf.parent, gguf_file=smollm2_gguf.name, local_files_only=True
    )


def encode(tokenizer, value, **options):
    return Encoder(tokenizer, **options)(parse_row(value, "rows.jsonl:1"))


def counted_text(tokenizer, encoded):
    ids = [i for i, counted in zip(encoded.ids, encoded.counted) if counted]
    return tokenizer.decode(ids)


def chatml_mask(tokenizer, ids):
    """Counted tokens of a ChatML row, by walking over the tokens alone."""
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    opening = [start, *tokenizer("assistant\n").input_ids]
    mask, inside = [], False
    for i, token in enumerate(ids):
        mask.append(inside)
        if inside and token == end:
            inside = False
        elif ids[max(0, i + 1 - len(opening)) : i + 1] == opening:
            inside = True
    return mask


def test_multi_turn_chat_counts_the_answers_with_their_end_of_turn(smollm2):
    encoded = encode(smollm2, {"messages": CONVERSATION})
    whole = smollm2.apply_chat_template(CONVERSATION, tokenize=False)
    assert encoded.ids == smollm2(whole).input_ids
    assert encoded.counted == chatml_mask(smollm2, encoded.ids)
    assert counted_text(smollm2, encoded) == "4, of course.<|im_end|>Quatre.  Voilà: 四<|im_end|>"


@settings(max_examples=40, deadline=None)
@given(st.lists(st.text(st.characters(codec="utf-8")), min_size=2))
def test_chat_mask_holds_for_any_content(smollm2, contents):
    contents = [c for c in contents if c.strip() and "<|" not in c][:6]
    if len(contents) < 2:
        return
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": c} for i, c in enumerate(contents)]
    encoded = encode(smollm2, {"messages": messages})
    assert encoded.counted == chatml_mask(smollm2, encoded.ids)
    wanted = "".join(c + "<|im_end|>" for c in contents[1::2])
    assert encoded.lost or counted_text(smollm2, encoded) == wanted


def test_characters_that_the_tokeniser_drops_are_counted(tmp_path, smollm2):
    (tmp_path / "a.txt").write_text("one\x06 two\x06\n")
    statistics = write_token_file(tmp_path, tmp_path / "x.tokens", smollm2)
    assert statistics.lost == 2
    assert f"first are in {tmp_path / 'a.txt'}" in statistics.warnings[0]


def test_completion_counts_from_its_first_character_to_the_end_token(smollm2):
    prompt, completion = "Q: What is the capital of France?\nA:", " Paris, naturally."
    encoded = encode(smollm2, {"prompt": prompt, "completion": completion})
    assert encoded.ids == [*smollm2(prompt + completion).input_ids, smollm2.eos_token_id]
    begins = [len(smollm2.decode(encoded.ids[:i])) for i in range(len(encoded))]
    assert encoded.counted == [begin >= len(prompt) for begin in begins]
    assert counted_text(smollm2, encoded) == completion + "<|im_end|>"


def test_a_token_across_the_boundary_is_an_error_that_names_the_row(smollm2):
    with pytest.raises(Error, match=r"rows.jsonl:1: the token ' Paris' lies across"):
        encode(smollm2, {"prompt": "A: ", "completion": "Paris"})


def test_text_counts_everything_and_ends_with_the_end_token(smollm2):
    encoded = encode(smollm2, {"text": "Once upon a time"})
    assert encoded.ids == [*smollm2("Once upon a time").input_ids, smollm2.eos_token_id]
    assert all(encoded.counted)
    assert encoded.targets == len(encoded) - 1
    without = encode(smollm2, {"text": "Once upon a time"}, eos=False)
    assert without.ids == encoded.ids[:-1]
    written = encode(smollm2, {"text": "Once<|im_end|>"})
    assert written.ids.count(smollm2.eos_token_id) == 1


def test_bos_follows_the_tokeniser_unless_told_otherwise():
    plain = byte_tokenizer(None)
    assert encode(plain, {"text": "ab"}).ids[0] != plain.bos_token_id
    told = encode(plain, {"text": "ab"}, bos=True)
    assert told.ids[0] == plain.bos_token_id
    assert told.counted == [False, True, True, True]
    assert told.targets == 3
    with pytest.raises(Error, match="names no bos token"):
        encode(byte_tokenizer(None, bos=None), {"text": "ab"}, bos=True)


def test_templates_of_other_families_give_the_answers_alone():
    llama = byte_tokenizer(LLAMA3)
    encoded = encode(llama, {"messages": CONVERSATION})
    assert counted_text(llama, encoded) == "4, of course.<|eot|>Quatre.  Voilà: 四<|eot|>"
    assert encoded.ids.count(llama.bos_token_id) == 1
    thinking = byte_tokenizer(THINKING)
    encoded = encode(thinking, {"messages": CONVERSATION})
    wanted = "4, of course.<|eot|><think>\n\n</think>\n\nQuatre.  Voilà: 四<|eot|>"
    assert counted_text(thinking, encoded) == wanted


def test_a_template_without_an_end_of_turn_gets_the_end_token():
    plain = byte_tokenizer(PLAIN)
    encoded = encode(plain, {"messages": CONVERSATION[1:3]})
    assert encoded.ids[-1] == plain.eos_token_id
    assert counted_text(plain, encoded) == "4, of course.\n</s>"


def test_an_answer_that_cannot_be_found_is_an_error_that_names_it():
    with pytest.raises(Error, match=r"rows.jsonl:1: .*messages\[2\] .* this answer begins"):
        encode(byte_tokenizer(SHOUTING), {"messages": CONVERSATION})
    stubborn = byte_tokenizer("{% for m in messages %}{{ loop.length }}{{ m.content }}{% endfor %}")
    with pytest.raises(Error, match=r"rows.jsonl:1: .*messages\[2\] differently"):
        encode(stubborn, {"messages": CONVERSATION})
    refusing = byte_tokenizer("{{ raise_exception('no system role') }}")
    with pytest.raises(Error, match=r"rows.jsonl:1: the chat template refuses.*no system role"):
        encode(refusing, {"messages": CONVERSATION})
    with pytest.raises(Error, match="need a chat template"):
        encode(byte_tokenizer(None), {"messages": CONVERSATION})


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ('{"text": "a"', "broken JSON at column"),
        ("[1]", "a row is a JSON object, found a list"),
        ('{"txt": "a"}', "unknown key 'txt'; did you mean 'text'?"),
        ('{"prompt": "a"}', "found prompt"),
        ('{"text": "a", "prompt": "b"}', "found prompt, text"),
        ('{"text": 3}', "text is a string, found a number"),
        ('{"text": " "}', "text is empty"),
        ('{"text": "a", "text": "b"}', "a key occurs twice"),
        ('{"prompt": "a", "completion": ""}', "completion is empty"),
        ('{"text": "\\ud800"}', "half a surrogate pair"),
        ('{"messages": {}}', "messages is a list, found an object"),
        ('{"messages": ["a"]}', r"messages\[0\] is an object, found a string"),
        ('{"messages": [{"role": "user"}]}', r"messages\[0\] has no content"),
        ('{"messages": [{"role": "bot", "content": "a"}]}', "unknown role 'bot'"),
        ('{"messages": [{"role": ["user"], "content": "a"}]}', "unknown role"),
        ('{"messages": [{"rol": "user", "content": "a"}]}', r"unknown key 'rol' in messages\[0\]"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "no message of the role assistant"),
        (
            '{"messages": [{"role": "assistant", "content": null}]}',
            "content is a string, found null",
        ),
    ],
)
def test_a_bad_row_is_an_error_with_file_and_line(tmp_path, line, what):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "fine"}\n\n' + line + "\n")
    with pytest.raises(Error, match=rf"rows\.jsonl:3: .*{what}"):
        list(read_rows(file))


def test_sources_that_hold_nothing_are_refused(tmp_path):
    with pytest.raises(Error, match="does not exist"):
        list(read_rows(tmp_path / "none.txt"))
    with pytest.raises(Error, match="holds no file ending in"):
        list(read_rows(tmp_path))
    (tmp_path / "a.txt").write_text(" \n")
    with pytest.raises(Error, match=r"a\.txt: the file holds no text"):
        list(read_rows(tmp_path))
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(Error, match=r"byte 3 \(0xe9\) is not UTF-8"):
        list(read_rows(tmp_path))
    (tmp_path / "a.jsonl").write_text("\n")
    with pytest.raises(Error, match="holds no rows"):
        list(read_rows(tmp_path / "a.jsonl"))
    (tmp_path / "a.csv").write_text("a,b")
    with pytest.raises(Error, match="say format text or jsonl"):
        list(read_rows(tmp_path / "a.csv"))


def test_a_folder_gives_one_row_for_each_text_file_in_order(tmp_path):
    for name in ("b", "a"):
        (tmp_path / f"{name}.txt").write_bytes(b"\xef\xbb\xbftext " + name.encode() + b"\r\nx")
    (tmp_path / "skip.bin").write_bytes(b"\xff")
    assert [row.text for row in read_rows(tmp_path)] == ["text a\nx", "text b\nx"]
    assert [row.text for row in read_rows(tmp_path / "b.txt", "text")] == ["text b\nx"]


def test_the_token_file_holds_what_was_encoded_and_the_counts_are_right(tmp_path, smollm2):
    rows = [
        {"text": "A first row of text."},
        {"prompt": "2+2=", "completion": "4"},
        {"messages": CONVERSATION},
    ]
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    encoded = [encode(smollm2, row) for row in rows]
    statistics = write_token_file(source, tmp_path / "x.tokens", smollm2, sequence_length=10)
    file = _C.TokenFile.open(str(tmp_path / "x.tokens"))
    for i, row in enumerate(encoded):
        ids, counted = file.row(i)
        assert ids.tolist() == row.ids
        assert counted.tolist() == row.counted
    assert statistics.rows == file.rows == 3
    assert statistics.tokens == file.tokens == sum(len(e) for e in encoded)
    assert statistics.targets == sum(sum(e.counted[1:]) for e in encoded)
    assert statistics.longest == len(encoded[2])
    assert statistics.truncated == sum(len(e) > 11 for e in encoded)
    assert statistics.without_targets == 1  # the conversation's first ten tokens are the system's
    assert file.fingerprint == fingerprint(smollm2)
    assert file.vocab_size == 49152


def test_a_refused_row_leaves_no_token_file(tmp_path, smollm2):
    (tmp_path / "rows.jsonl").write_text('{"text": "fine"}\n{"text": 1}\n')
    with pytest.raises(Error):
        write_token_file(tmp_path / "rows.jsonl", tmp_path / "x.tokens", smollm2)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["rows.jsonl"]


def test_control_tokens_in_a_message_are_refused(smollm2):
    row = [{"role": "user", "content": "x<|im_end|>"}, {"role": "assistant", "content": "y"}]
    with pytest.raises(Error, match=r"messages\[0\].content contains '<\|im_end\|>'"):
        encode(smollm2, {"messages": row})


def test_the_tokeniser_of_a_gguf_opens_and_has_the_vocabulary_of_transformers(
    smollm2, smollm2_gguf, tmp_path
):
    ours = load_tokenizer(smollm2_gguf)
    assert ours.chat_template == smollm2.chat_template
    assert end_ids(ours) == [smollm2.convert_tokens_to_ids("<|im_end|>")]
    assert fingerprint(ours) == fingerprint(smollm2)
    ours.save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    assert fingerprint(again) == fingerprint(ours)
    text = "Hamlet, Prince of Denmark: 1603\n  é 四"
    assert again(text).input_ids == ours(text).input_ids
    assert ours.decode(ours(text).input_ids) == text


def test_fingerprints_of_different_tokenisers_differ(smollm2):
    assert fingerprint(smollm2) != fingerprint(byte_tokenizer())
    assert len(fingerprint(smollm2)) == 64


def test_a_folder_without_a_tokeniser_is_refused(tmp_path):
    with pytest.raises(Error, match="holds no tokeniser"):
        load_tokenizer(tmp_path)
    with pytest.raises(Error, match="does not exist"):
        load_tokenizer(tmp_path / "none")
