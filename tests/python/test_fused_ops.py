"""The fused operators beside float64 formulas: values, every gradient, schemas, bad input."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import budwood  # noqa: F401  (registers the operators)

ops = torch.ops.budwood
EXACT = {"rtol": 1e-5, "atol": 2e-5}


def rms(x, weight, eps):
    return weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def rotated(x, cos, sin):
    n = cos.shape[1]
    c, s = cos[:, None], sin[:, None]
    a, b = x[..., :n], x[..., n : 2 * n]
    return torch.cat([a * c - b * s, b * c + a * s, x[..., 2 * n :]], -1)


def attended(q, k, v, cu_q, cu_k, scale, causal, window, prefix):
    """Every score of every sequence."""
    out = []
    repeat = q.shape[1] // k.shape[1]
    for s in range(len(cu_q) - 1):
        own_q, own_k = q[cu_q[s] : cu_q[s + 1]], k[cu_k[s] : cu_k[s + 1]]
        own_v = v[cu_k[s] : cu_k[s + 1]].repeat_interleave(repeat, 1)
        tq, tk = len(own_q), len(own_k)
        scores = torch.einsum("ihd,jhd->hij", own_q, own_k.repeat_interleave(repeat, 1)) * scale
        i, j = torch.arange(tk - tq, tk)[:, None], torch.arange(tk)[None]
        seen = (j <= i) if causal else torch.ones(tq, tk, dtype=torch.bool)
        if window:
            seen = seen & (j > i - window)
        seen = seen | (j < prefix)
        weights = torch.where(seen, scores, -math.inf).softmax(-1)
        out.append(torch.einsum("hij,jhd->ihd", weights, own_v))
    return torch.cat(out)


def case(name, *shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(map(ord, name)))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


NORM = (case("x", 3, 5, 24), case("w", 24), case("b", 24))
HEADS = (case("q", 11, 4, 6), case("k", 11, 2, 6), case("v", 11, 2, 6))
SHAPE = ([0, 4, 11], [0, 4, 11], 0.4, True, 0, 0)
ANGLES = (case("c", 11, 2), case("s", 11, 2))
LABELS = torch.tensor([3, -100, 0, 8, 2])
WEIGHTS = torch.tensor([1.0, 2.0, 0.5, 1.0, 3.0])

# operator, formula, tensors that are differentiated, other arguments
OPERATORS = {
    "rms_norm": (ops.rms_norm, rms, NORM[:2], (1e-5,)),
    "layer_norm": (
        ops.layer_norm,
        lambda x, w, b, eps: F.layer_norm(x, (24,), w, b, eps),
        NORM,
        (1e-5,),
    ),
    "swiglu": (ops.swiglu, lambda g, u: F.silu(g) * u, (NORM[0], NORM[0].flip(0)), ()),
    "geglu": (ops.geglu, lambda g, u, a: F.gelu(g) * u, (NORM[0], NORM[0].flip(0)), ("none",)),
    "geglu_tanh": (
        ops.geglu,
        lambda g, u, a: F.gelu(g, approximate="tanh") * u,
        (NORM[0], NORM[0].flip(0)),
        ("tanh",),
    ),
    "attention": (ops.attention, attended, HEADS, SHAPE),
    "attention_window": (ops.attention, attended, HEADS, (*SHAPE[:4], 3, 2)),
    "attention_encoder": (ops.attention, attended, HEADS, (*SHAPE[:3], False, 0, 0)),
}


def gradients(function, tensors, others, dtype):
    leaves = [t.detach().clone().to(dtype).requires_grad_() for t in tensors]
    out = function(*leaves, *others)
    grads = torch.autograd.grad((out * out.detach().cos()).sum(), leaves, retain_graph=True)
    again = torch.autograd.grad((out * out.detach().cos()).sum(), leaves)
    for first, second in zip(grads, again, strict=True):
        assert torch.equal(first, second)  # a graph can be traversed twice
    return out, grads


@pytest.mark.parametrize("name", OPERATORS)
def test_values_and_every_gradient_equal_the_float64_formula(name):
    operator, formula, tensors, others = OPERATORS[name]
    wanted, wanted_grads = gradients(formula, tensors, others, torch.float64)
    for dtype, bound in ((torch.float32, EXACT), (torch.bfloat16, {"rtol": 0.05, "atol": 0.15})):
        found, found_grads = gradients(operator, tensors, others, dtype)
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), wanted, **bound)
        for grad, exact in zip(found_grads, wanted_grads, strict=True):
            torch.testing.assert_close(grad.double(), exact, **bound)


@pytest.mark.parametrize("name", OPERATORS)
def test_the_fallback_in_float64_passes_gradcheck(name):
    operator, _, tensors, others = OPERATORS[name]
    leaves = [t.detach().clone().double().requires_grad_() for t in tensors]
    torch.autograd.gradcheck(lambda *own: operator(*own, *others), leaves)


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_operators_pass_opcheck(name, requires_grad):
    operator, _, tensors, others = OPERATORS[name]
    leaves = [t.detach().clone().requires_grad_(requires_grad) for t in tensors]
    torch.library.opcheck(operator.default, (*leaves, *others))


def test_rotary_turns_back_with_its_gradient_and_passes_opcheck():
    x = HEADS[0].clone().requires_grad_()
    y = ops.rotary(x, *ANGLES)
    exact = rotated(HEADS[0].double(), *(a.double() for a in ANGLES))
    torch.testing.assert_close(y.double(), exact, **EXACT)
    (grad,) = torch.autograd.grad(y, x, torch.ones_like(y))
    torch.testing.assert_close(grad, ops.rotary(torch.ones_like(y), *ANGLES, True))
    torch.library.opcheck(ops.rotary.default, (x, *ANGLES))
    torch.autograd.gradcheck(
        lambda own: ops.rotary(own, *(a.double() for a in ANGLES)),
        x.detach().double().requires_grad_(),
    )


def full_loss(hidden, weight, labels, weights, smoothing, z_loss):
    kept = labels >= 0
    logits = (hidden @ weight.T)[kept].double()
    lse = logits.logsumexp(1)
    at_label = logits.gather(1, labels[kept, None])[:, 0]
    losses = (1 - smoothing) * (lse - at_label) + smoothing * (lse - logits.mean(1))
    return ((losses + z_loss * lse.square()) * weights[kept].double()).sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("smoothing", "z_loss"), [(0.0, 0.0), (0.1, 0.0), (0.2, 1e-2)])
@pytest.mark.parametrize("chunk", [1, 2, 256])
def test_linear_cross_entropy_equals_the_whole_loss(dtype, smoothing, z_loss, chunk):
    weight, hidden = case("W", 9, 6, dtype=dtype), case("h", 5, 6, dtype=dtype).requires_grad_()
    wanted = full_loss(hidden, weight, LABELS, WEIGHTS, smoothing, z_loss)
    (wanted_grad,) = torch.autograd.grad(wanted * 3, hidden)
    arguments = ([weight], 0, [9, 6], LABELS, WEIGHTS, smoothing, z_loss, chunk)
    found = ops.linear_cross_entropy(hidden, *arguments)
    (found_grad,) = torch.autograd.grad(found * 3, hidden)
    torch.testing.assert_close(found.double(), wanted, **EXACT)
    torch.testing.assert_close(found_grad, wanted_grad, **EXACT)
    with torch.no_grad():
        torch.testing.assert_close(ops.linear_cross_entropy(hidden, *arguments), found)
    torch.library.opcheck(ops.linear_cross_entropy.default, (hidden, *arguments))


def test_a_loss_that_counts_nothing_is_zero_and_so_is_its_gradient():
    hidden = case("h", 3, 6).requires_grad_()
    loss = ops.linear_cross_entropy(hidden, [case("W", 9, 6)], 0, [9, 6], torch.full((3,), -100))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(hidden.grad, torch.zeros(3, 6))


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=4),
    cached=st.integers(0, 5),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    d=st.integers(1, 20),
    window=st.integers(0, 9),
    prefix=st.integers(0, 5),
)
def test_attention_of_any_shape_equals_the_formula(
    lengths, cached, kv_heads, group, d, window, prefix
):
    cu_q, cu_k = [0], [0]
    for n in lengths:
        cu_q.append(cu_q[-1] + n)
        cu_k.append(cu_k[-1] + n + cached)
    q, k, v = (
        case("q", cu_q[-1], kv_heads * group, d),
        case("k", cu_k[-1], kv_heads, d),
        case("v", cu_k[-1], kv_heads, d),
    )
    arguments = (cu_q, cu_k, d**-0.5, True, window, prefix)
    found, grads = gradients(ops.attention, (q, k, v), arguments, torch.float32)
    wanted, exact = gradients(attended, (q, k, v), arguments, torch.float64)
    torch.testing.assert_close(found.double(), wanted, **EXACT)
    for grad, own in zip(grads, exact, strict=True):
        torch.testing.assert_close(grad.double(), own, **EXACT)


def test_strided_inputs_are_read_where_they_lie():
    packed = case("qkv", 11, 8, 6)
    parts = packed[:, :4], packed[:, 4:6], packed[:, 6:]
    found = ops.attention(*parts, *SHAPE)
    assert torch.equal(found, ops.attention(*(p.contiguous() for p in parts), *SHAPE))
    x = case("x", 24, 5).T
    assert torch.equal(ops.rms_norm(x, NORM[1], 1e-5), ops.rms_norm(x.contiguous(), NORM[1], 1e-5))


def test_results_do_not_depend_on_threads():
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        q, k, v = case("q", 300, 4, 16), case("k", 300, 2, 16), case("v", 300, 2, 16)
        results.append(
            gradients(
                ops.attention, (q, k, v), ([0, 300], [0, 300], 0.25, True, 0, 0), torch.float32
            )
        )
    torch.set_num_threads(2)
    for out, grads in results[1:]:
        assert torch.equal(out, results[0][0])
        assert all(torch.equal(a, b) for a, b in zip(grads, results[0][1], strict=True))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.rms_norm(NORM[0], NORM[1][:3], 1e-5), "x is"),
        (lambda: ops.swiglu(NORM[0], NORM[0][0]), "one shape and dtype"),
        (lambda: ops.geglu(NORM[0], NORM[0], "fast"), '"none" or "tanh"'),
        (lambda: ops.rotary(HEADS[0], ANGLES[0][:3], ANGLES[1][:3]), r"cos and sin are"),
        (lambda: ops.attention(*HEADS, [0, 11], [0, 10], 1.0), "cu_k rises from 0"),
        (lambda: ops.attention(*HEADS, [0, 7, 4, 11], [0, 7, 4, 11], 1.0), "rises"),
        (lambda: ops.attention(HEADS[0][:, :3], *HEADS[1:], [0, 11], [0, 11], 1.0), "multiple"),
        (lambda: ops.attention(*HEADS, [0, 11], [0, 11], 1.0, False, 3), "a window needs causal"),
        (
            lambda: ops.linear_cross_entropy(
                case("h", 1, 6), [case("W", 9, 6)], 0, [9, 6], torch.tensor([9])
            ),
            "below the number of classes, 9; found 9",
        ),
        (
            lambda: ops.linear_cross_entropy(
                case("h", 1, 6), [case("W", 9, 6)], 0, [9, 6], torch.tensor([1]), None, 1.5
            ),
            "label_smoothing is in",
        ),
    ],
)
def test_bad_input_is_refused_by_name(call, message):
    with pytest.raises(RuntimeError, match=message):
        call()


def test_nan_propagates():
    q, k, v = (t.clone() for t in HEADS)
    v[5, 0, 0] = math.nan
    out = ops.attention(q, k, v, *SHAPE)
    assert torch.isnan(out[5:, :2, 0]).all()  # row 4 too may be: a hidden weight of 0 times NaN
    assert not torch.isnan(out[:4]).any()  # the other sequence
    assert not torch.isnan(out[:, 2:]).any()  # the other key head
