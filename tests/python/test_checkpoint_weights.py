"""Weights of GPTQ and AWQ checkpoints, packed here by the written rule, are read exactly."""

import numpy as np
import pytest
import torch

import budwood
from budwood import _C

OUT, IN, GROUP = 48, 128, 32
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def pack(fields, bits):
    """[n, m] codes to int32 words [n * bits / 32, m], lowest bits first."""
    per_word = 32 // bits
    words = np.zeros((fields.shape[0] // per_word, fields.shape[1]), np.uint32)
    for i in range(per_word):
        words |= fields[i::per_word].astype(np.uint32) << np.uint32(bits * i)
    return torch.from_numpy(words.view(np.int32).copy())


def random_weight(bits, seed=0, act_order=False):
    random = np.random.default_rng(seed)
    q = random.integers(0, 1 << bits, (IN, OUT))
    z = random.integers(1, 1 << bits, (IN // GROUP, OUT))
    scales = random.random((IN // GROUP, OUT), np.float32).astype(np.float16)
    g_idx = np.arange(IN) // GROUP
    if act_order:
        random.shuffle(g_idx)
    w = scales.astype(np.float32)[g_idx] * (q - z[g_idx]).astype(np.float32)
    return q, z, torch.from_numpy(scales), torch.from_numpy(g_idx.astype(np.int32)), w.T


def relative(found, wanted):
    return ((found - wanted).norm() / wanted.norm()).item()


def check(weight, wanted):
    parts, number, shape = weight
    wanted = torch.from_numpy(wanted.copy())
    assert torch.equal(_C.dequantize(parts, number, shape), wanted)
    x = torch.randn(5, IN, requires_grad=True)
    y = torch.ops.budwood.linear(x, parts, number, shape)
    assert relative(y, x @ wanted.T) < 1e-6
    grad = torch.randn_like(y)
    assert relative(torch.autograd.grad(y, x, grad)[0], grad @ wanted) < 1e-6


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("v2", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_gptq_weight_is_read_exactly(bits, v2, act_order):
    q, z, scales, g_idx, w = random_weight(bits, act_order=act_order)
    qzeros = pack((z if v2 else z - 1).T, bits).T.contiguous()
    weight = _C.weight_from_gptq(
        pack(q, bits),
        qzeros,
        scales,
        g_idx,
        bits=bits,
        group_size=GROUP,
        v2=v2,
        out_features=OUT,
        in_features=IN,
    )
    assert len(weight[0]) == (5 if act_order else 4)
    check(weight, w)


def test_an_awq_weight_is_read_exactly():
    q, z, scales, _g_idx, w = random_weight(4)

    def pack_columns(codes):
        words = np.zeros((codes.shape[0], OUT // 8), np.uint32)
        for i, column in enumerate(AWQ_ORDER):
            words |= codes[:, column::8].astype(np.uint32) << np.uint32(4 * i)
        return torch.from_numpy(words.view(np.int32).copy())

    weight = _C.weight_from_awq(
        pack_columns(q),
        pack_columns(z),
        scales,
        group_size=GROUP,
        out_features=OUT,
        in_features=IN,
    )
    check(weight, w)


def test_a_weight_with_ordered_columns_is_a_sound_operator_and_takes_lora():
    q, z, scales, g_idx, _w = random_weight(4, act_order=True)
    parts, number, shape = _C.weight_from_gptq(
        pack(q, 4),
        pack(z.T, 4).T.contiguous(),
        scales,
        g_idx,
        group_size=GROUP,
        v2=True,
        out_features=OUT,
        in_features=IN,
    )
    x = torch.randn(3, IN, requires_grad=True)
    torch.library.opcheck(torch.ops.budwood.linear.default, (x, parts, number, shape, None))
    with pytest.raises(budwood.Error, match=r"order of the columns .* has 900 at place 7"):
        parts[4][7] = 900
        torch.ops.budwood.linear(x, parts, number, shape)
