"""Token files against a reader written from docs/formats.md, sampling against plain Python,
learning rates against transformers."""

import itertools
import struct
import zlib

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from budwood import _C

VOCABULARY = 50

rows_of_tokens = st.lists(
    st.lists(st.tuples(st.integers(0, VOCABULARY - 1), st.booleans()), min_size=1, max_size=40),
    min_size=1,
    max_size=20,
)


def has_target(rows):
    return any(counts for row in rows for _, counts in row)


def write(path, rows, **arguments):
    with _C.TokenFileWriter(path, VOCABULARY, **arguments) as writer:
        for row in rows:
            writer.add([i for i, _ in row], [c for _, c in row])
    return _C.TokenFile.open(path)


def read_by_specification(data):
    """docs/formats.md, word for word, without Budwood."""
    assert data[:8] == b"BUDWTOKS"
    assert struct.unpack("<I", data[8:12]) == (1,)
    assert data[12:64] == bytes(52)
    foot = data[-128:]
    assert foot[:8] == b"BUDWTEND"
    vocabulary, rows, tokens, counted = struct.unpack("<4Q", foot[8:40])
    assert struct.unpack("<I", foot[120:124]) == (zlib.crc32(data[:-128]),)
    assert struct.unpack("<I", foot[124:128]) == (zlib.crc32(foot[:124]),)
    ids = np.frombuffer(data, "<u4", tokens, 64)
    at = (64 + 4 * tokens + 7) // 8 * 8
    size = (tokens + 7) // 8
    bits = np.unpackbits(np.frombuffer(data, "u1", size, at), bitorder="little")
    assert not bits[tokens:].any()
    at = (at + size + 7) // 8 * 8
    offsets = np.frombuffer(data, "<u8", rows + 1, at)
    assert at + 8 * (rows + 1) + 128 == len(data)
    assert bits.sum() == counted
    result = []
    for begin, end in itertools.pairwise(offsets):
        result.append([(int(i), bool(b)) for i, b in zip(ids[begin:end], bits[begin:end])])
    return vocabulary, result, foot[40:104].rstrip(b"\0").decode()


@settings(max_examples=40, deadline=None)
@given(rows=rows_of_tokens.filter(has_target), fingerprint=st.sampled_from(["", "a", "f" * 64]))
def test_a_token_file_is_what_the_specification_says(tmp_path_factory, rows, fingerprint):
    path = tmp_path_factory.mktemp("tokens") / "x.tokens"
    file = write(path, rows, fingerprint=fingerprint)
    assert read_by_specification(path.read_bytes()) == (VOCABULARY, rows, fingerprint)
    assert (file.rows, file.vocab_size, file.fingerprint) == (len(rows), VOCABULARY, fingerprint)
    assert file.tokens == sum(map(len, rows))
    assert file.counted == sum(c for row in rows for _, c in row)
    for i, row in enumerate(rows):
        ids, counted = file.row(i)
        assert list(zip(ids.tolist(), counted.tolist())) == row


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_changed_byte_is_never_read(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("tokens")
    rows = data.draw(rows_of_tokens.filter(has_target))
    write(folder / "x", rows)
    good = (folder / "x").read_bytes()
    at = data.draw(st.integers(0, len(good) - 1))
    value = data.draw(st.integers(0, 255).filter(lambda v: v != good[at]))
    (folder / "bad").write_bytes(good[:at] + bytes([value]) + good[at + 1 :])
    with pytest.raises(_C.Error, match="bad"):
        _C.TokenFile.open(folder / "bad")
    (folder / "short").write_bytes(good[:at])
    with pytest.raises(_C.Error, match="short"):
        _C.TokenFile.open(folder / "short")


@pytest.mark.parametrize(
    "convert",
    [
        list,
        np.array,
        torch.tensor,
        lambda ids: np.array(ids, dtype=np.uint16),
        lambda ids: torch.tensor(ids, dtype=torch.int32),
        lambda ids: np.array([i for i in ids for _ in range(2)])[::2],
    ],
)
def test_the_writer_takes_lists_arrays_and_tensors(tmp_path, convert):
    with _C.TokenFileWriter(tmp_path / "x", VOCABULARY) as writer:
        writer.add(convert([3, 1, 4]), convert([0, 1, 1]))
        writer.add(convert([1, 5]))
    file = _C.TokenFile.open(tmp_path / "x")
    assert [file.row(i)[0].tolist() for i in range(2)] == [[3, 1, 4], [1, 5]]
    assert [file.row(i)[1].tolist() for i in range(2)] == [[False, True, True], [True, True]]


@pytest.mark.parametrize(
    ("ids", "counted", "message"),
    [
        ([], None, "no tokens"),
        ([1.5], None, "whole numbers"),
        ([[1, 2]], None, "one-dimensional"),
        ([VOCABULARY], None, "position 0: token id 50"),
        ([-1], None, "token id -1"),
        ([1, 2], [1], "2 tokens and 1 mask"),
        ([1, 2], [1, 2], "position 1: mask entry"),
        ([1, 2], [], "counted is empty"),
    ],
)
def test_what_is_no_row_is_refused(tmp_path, ids, counted, message):
    writer = _C.TokenFileWriter(tmp_path / "x", VOCABULARY)
    with pytest.raises(_C.Error, match=message):
        writer.add(ids, counted)
    assert writer.rows == 0


def test_an_exception_while_writing_leaves_no_file(tmp_path):
    with (
        pytest.raises(KeyError),
        _C.TokenFileWriter(tmp_path / "x", VOCABULARY) as writer,
    ):
        writer.add([1, 2])
        raise KeyError
    assert not (tmp_path / "x").exists()


def sequences(batch):
    cu = batch.tokens.cu_seqlens
    for begin, end in itertools.pairwise(cu):
        part = slice(begin, end)
        yield (
            tuple(batch.tokens.ids[part].tolist()),
            tuple(batch.labels[part].tolist()),
            tuple(batch.tokens.positions[part].tolist()),
        )


def expected_sequences(rows, length, packing, long_rows):
    def pieces():
        if packing == "concat":
            stream = [token for row in rows for token in row]
            for begin in range(0, len(stream) - 1, length):
                yield stream[begin : begin + length + 1]
            return
        for row in rows:
            if long_rows == "truncate":
                yield row[: length + 1]
            else:
                for begin in range(0, len(row) - 1, length):
                    yield row[begin : begin + length + 1]

    result = []
    for piece in pieces():
        labels = tuple(i if c else -100 for i, c in piece[1:])
        if any(label >= 0 for label in labels):
            result.append((tuple(i for i, _ in piece[:-1]), labels, tuple(range(len(labels)))))
    return sorted(result)


@settings(max_examples=100, deadline=None)
@given(
    rows=rows_of_tokens.filter(has_target),
    length=st.integers(1, 45),
    batch_size=st.integers(1, 5),
    packing=st.sampled_from(["concat", "pack", "none"]),
    long_rows=st.sampled_from(["truncate", "split"]),
    shuffle=st.booleans(),
    seed=st.integers(0, 2**63),
)
def test_batches_hold_what_plain_python_says(
    tmp_path_factory, rows, length, batch_size, packing, long_rows, shuffle, seed
):
    file = write(tmp_path_factory.mktemp("tokens") / "x", rows)
    wanted = expected_sequences(rows, length, packing, long_rows)
    arguments = (file, length, batch_size, packing, long_rows, shuffle, seed)
    if not wanted:
        with pytest.raises(_C.Error, match="nothing to learn"):
            _C.Sampler(*arguments)
        return
    sampler = _C.Sampler(*arguments)
    for epoch in range(2):
        assert sampler.state() == (epoch, 0)
        batches = list(sampler)
        assert len(batches) == sampler.batches
        assert sorted(s for batch in batches for s in sequences(batch)) == wanted
        for batch in batches:
            assert batch.counted == (batch.labels >= 0).sum() > 0
            assert batch.tokens.tokens <= batch_size * length
    report = sampler.report
    assert report["tokens"] == sum(len(ids) for ids, _, _ in wanted)
    assert report["sequences"] == len(wanted)
    assert report["longest"] == max(len(ids) for ids, _, _ in wanted)


@pytest.mark.parametrize("warmup", [0, 1, 7])
@pytest.mark.parametrize("total", [1, 20, 33])
def test_learning_rates_are_those_of_transformers(warmup, total):
    def rates(make, **arguments):
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        schedule = make(optimizer, num_warmup_steps=warmup, **arguments)
        result = []
        for _ in range(total + 3):
            result.append(schedule.get_last_lr()[0])
            optimizer.step()
            schedule.step()
        return result

    t = transformers
    cases = [
        ("constant", 0.0, rates(t.get_constant_schedule_with_warmup)),
        ("linear", 0.0, rates(t.get_linear_schedule_with_warmup, num_training_steps=total)),
        ("cosine", 0.0, rates(t.get_cosine_schedule_with_warmup, num_training_steps=total)),
        (
            "cosine",
            0.1,
            rates(
                t.get_cosine_with_min_lr_schedule_with_warmup,
                num_training_steps=total,
                min_lr_rate=0.1,
            ),
        ),
    ]
    for name, least, wanted in cases:
        # Past the end transformers' cosine rises again; a run does not go there.
        found = [_C.schedule_multiplier(name, s, total, warmup, least) for s in range(total + 1)]
        assert found == pytest.approx(wanted[: total + 1], abs=1e-15), (name, least)
