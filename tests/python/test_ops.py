"""The registered operators: exact gradients, sound schemas, and the same numbers as plain torch."""

import pytest
import torch

import budwood  # noqa: F401  registers the operators

DENSE, TRANSPOSED = 0, 1
IN, OUT, RANK = 5, 4, 2


def operands(form, bias, lead, dtype=torch.float64, requires_grad=True):
    torch.manual_seed(0)
    x = torch.randn(*lead, IN, dtype=dtype, requires_grad=requires_grad)
    w = torch.randn(OUT, IN, dtype=dtype)
    part = w if form == DENSE else w.t().contiguous()
    b = torch.randn(OUT, dtype=dtype, requires_grad=requires_grad) if bias else None
    lora_a = torch.randn(RANK, IN, dtype=dtype, requires_grad=requires_grad)
    lora_b = torch.randn(OUT, RANK, dtype=dtype, requires_grad=requires_grad)
    return x, w, part, b, lora_a, lora_b


def plain(x, w, b, lora_a, lora_b, scaling):
    linear = torch.nn.functional.linear
    return linear(x, w, b) + scaling * linear(linear(x, lora_a), lora_b)


def assert_same_gradients(ours, wanted, inputs, grad):
    for mine, other in zip(
        torch.autograd.grad(ours, inputs, grad),
        torch.autograd.grad(wanted, inputs, grad),
        strict=True,
    ):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)


FORMS = pytest.mark.parametrize("form", [DENSE, TRANSPOSED])
BIAS = pytest.mark.parametrize("bias", [False, True])
LEAD = pytest.mark.parametrize("lead", [(3,), (2, 3), (1,), (0,), (2, 0), ()])


@FORMS
@BIAS
@LEAD
def test_values_and_gradients_equal_plain_torch(form, bias, lead):
    x, w, part, b, lora_a, lora_b = operands(form, bias, lead)
    inputs = [t for t in (x, b, lora_a, lora_b) if t is not None]
    ours = torch.ops.budwood.lora_linear(x, [part], form, [OUT, IN], b, lora_a, lora_b, 0.7)
    wanted = plain(x, w, b, lora_a, lora_b, 0.7)
    assert ours.shape == wanted.shape
    torch.testing.assert_close(ours, wanted, rtol=1e-12, atol=1e-12)
    grad = torch.randn_like(wanted)
    assert_same_gradients(ours, wanted, inputs, grad)

    inputs = [t for t in (x, b) if t is not None]
    ours = torch.ops.budwood.linear(x, [part], form, [OUT, IN], b)
    wanted = torch.nn.functional.linear(x, w, b)
    torch.testing.assert_close(ours, wanted, rtol=1e-12, atol=1e-12)
    assert_same_gradients(ours, wanted, inputs, grad)


@FORMS
@BIAS
@pytest.mark.parametrize("lead", [(3,), (2, 2), (1,)])
def test_gradcheck_in_float64(form, bias, lead):
    x, _, part, b, lora_a, lora_b = operands(form, bias, lead)

    def lora(x, b, lora_a, lora_b):
        return torch.ops.budwood.lora_linear(x, [part], form, [OUT, IN], b, lora_a, lora_b, 0.7)

    def linear(x, b):
        return torch.ops.budwood.linear(x, [part], form, [OUT, IN], b)

    assert torch.autograd.gradcheck(lora, (x, b, lora_a, lora_b))
    assert torch.autograd.gradcheck(linear, (x, b))


@FORMS
def test_a_dense_weight_that_is_trained_gets_its_gradient(form):
    x, _, part, b, _, _ = operands(form, True, (3,))
    part.requires_grad_()

    def linear(x, part, b):
        return torch.ops.budwood.linear(x, [part], form, [OUT, IN], b)

    assert torch.autograd.gradcheck(linear, (x, part, b))


@FORMS
@BIAS
@pytest.mark.parametrize("lead", [(3,), (2, 3), (1,), (0,)])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_schemas_meta_kernels_and_autograd_pass_opcheck(form, bias, lead, requires_grad):
    x, _, part, b, lora_a, lora_b = operands(form, bias, lead, torch.float32, requires_grad)
    torch.library.opcheck(
        torch.ops.budwood.lora_linear.default,
        (x, [part], form, [OUT, IN], b, lora_a, lora_b, 0.7),
    )
    torch.library.opcheck(torch.ops.budwood.linear.default, (x, [part], form, [OUT, IN], b))


@FORMS
def test_strided_inputs_are_read_as_they_are(form):
    _, w, part, b, lora_a, lora_b = operands(form, True, (1,))
    torch.manual_seed(1)
    for x in (
        torch.randn(IN, 6, dtype=torch.float64).t(),
        torch.randn(6, 2 * IN, dtype=torch.float64)[:, ::2],
        torch.randn(3, 4, IN, dtype=torch.float64).transpose(0, 1),
        torch.randn(1, IN, dtype=torch.float64).expand(6, IN),
    ):
        x = x.requires_grad_() if x.is_leaf else x.detach().requires_grad_()
        ours = torch.ops.budwood.lora_linear(x, [part], form, [OUT, IN], b, lora_a, lora_b, 0.7)
        wanted = plain(x, w, b, lora_a, lora_b, 0.7)
        torch.testing.assert_close(ours, wanted, rtol=1e-12, atol=1e-12)
        # a gradient that is strided too: that of a sum is expanded from one number
        mine = torch.autograd.grad(ours.sum(), [x, lora_a, lora_b])
        other = torch.autograd.grad(wanted.sum(), [x, lora_a, lora_b])
        for a, c in zip(mine, other, strict=True):
            torch.testing.assert_close(a, c, rtol=1e-12, atol=1e-12)


@FORMS
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("w_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_results_have_the_dtype_of_x_and_adapters_stay_fp32(form, x_dtype, w_dtype):
    x, w, part, b, lora_a, lora_b = operands(form, True, (8,), torch.float32, False)
    lora_a.requires_grad_()
    x, part = x.to(x_dtype).requires_grad_(), part.to(w_dtype)
    y = torch.ops.budwood.lora_linear(x, [part], form, [OUT, IN], b, lora_a, lora_b, 0.7)
    assert y.dtype == x_dtype
    y.float().sum().backward()
    assert x.grad.dtype == x_dtype
    assert lora_a.grad.dtype == torch.float32
    wanted = plain(
        x.double(), w.to(w_dtype).double(), b.double(), lora_a.double(), lora_b.double(), 0.7
    )
    low = torch.bfloat16 in (x_dtype, w_dtype)
    torch.testing.assert_close(y.double(), wanted, rtol=0, atol=0.1 if low else 0.02)


def dora(x, part, form, b, lora_a, lora_b, gain):
    return torch.ops.budwood.dora_linear(x, [part], form, [OUT, IN], b, lora_a, lora_b, gain, 0.7)


def gain_of(dtype=torch.float64, zero=False, requires_grad=True):
    gain = torch.linspace(0.5, 1.5, OUT, dtype=dtype)
    if zero:
        gain[1] = 0
    return gain.requires_grad_(requires_grad)


@FORMS
@BIAS
@LEAD
def test_dora_linear_equals_plain_torch(form, bias, lead):
    x, w, part, b, lora_a, lora_b = operands(form, bias, lead)
    gain = gain_of(zero=True)
    inputs = [t for t in (x, b, lora_a, lora_b, gain) if t is not None]
    ours = dora(x, part, form, b, lora_a, lora_b, gain)
    wanted = gain * plain(x, w, None, lora_a, lora_b, 0.7) + (0 if b is None else b)
    assert ours.shape == wanted.shape
    torch.testing.assert_close(ours, wanted, rtol=1e-12, atol=1e-12)
    grad = torch.randn_like(wanted)
    assert_same_gradients(ours, wanted, inputs, grad)


@FORMS
@BIAS
def test_dora_linear_passes_gradcheck_and_opcheck(form, bias):
    x, _, part, b, lora_a, lora_b = operands(form, bias, (3,))
    assert torch.autograd.gradcheck(
        lambda x, b, lora_a, lora_b, gain: dora(x, part, form, b, lora_a, lora_b, gain),
        (x, b, lora_a, lora_b, gain_of()),
    )
    for lead in [(3,), (2, 3), (1,), (0,)]:
        for requires_grad in (False, True):
            x, _, part, b, lora_a, lora_b = operands(form, bias, lead, torch.float32, requires_grad)
            gain = gain_of(torch.float32, requires_grad=requires_grad)
            torch.library.opcheck(
                torch.ops.budwood.dora_linear.default,
                (x, [part], form, [OUT, IN], b, lora_a, lora_b, gain, 0.7),
            )


@pytest.mark.parametrize("dynamic", [False, True])
def test_dora_linear_compiles_whole(dynamic):
    x, _w, part, b, lora_a, lora_b = operands(DENSE, True, (3,), torch.float32)
    gain = gain_of(torch.float32)

    def step(x):
        return torch.relu(dora(x, part, DENSE, b, lora_a, lora_b, gain))

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows in (3, 5, 8):
        x = torch.randn(rows, IN, requires_grad=True)
        torch.testing.assert_close(compiled(x), step(x))
        mine = torch.autograd.grad(compiled(x).sum(), [x, gain])
        other = torch.autograd.grad(step(x).sum(), [x, gain])
        for a, c in zip(mine, other, strict=True):
            torch.testing.assert_close(a, c)


def test_autocast_takes_x_alone_to_16_bits():
    x, _w, part, b, lora_a, lora_b = operands(DENSE, True, (3,), torch.float32)
    gain = gain_of(torch.float32)
    exact = dora(x, part, DENSE, b, lora_a, lora_b, gain)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = dora(x, part, DENSE, b, lora_a, lora_b, gain)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), exact, rtol=0.03, atol=0.1)
    y.float().sum().backward()
    assert lora_a.grad.dtype == gain.grad.dtype == torch.float32


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_with_changing_batch_sizes(dynamic):
    x, _w, part, b, lora_a, lora_b = operands(DENSE, True, (3,), torch.float32)

    def step(x):
        y = torch.ops.budwood.lora_linear(x, [part], DENSE, [OUT, IN], b, lora_a, lora_b, 0.7)
        return torch.ops.budwood.linear(torch.relu(y), [part.t()], DENSE, [IN, OUT])

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows in (3, 5, 8):
        x = torch.randn(rows, IN, requires_grad=True)
        torch.testing.assert_close(compiled(x), step(x))
        compiled(x).sum().backward()


@FORMS
def test_bad_arguments_are_refused_by_name(form):
    x, _, part, _, lora_a, lora_b = operands(form, False, (3,), torch.float32, False)
    lora = torch.ops.budwood.lora_linear
    shape = [OUT, IN]
    for arguments, message in (
        ((x[:, :4], [part], form, shape, None, lora_a, lora_b, 1.0), r"last dimension.* 5"),
        ((x, [part], form, [OUT, IN, 1], None, lora_a, lora_b, 1.0), r"shape is \[out, in\]"),
        ((x, [part], 99, shape, None, lora_a, lora_b, 1.0), r"99"),
        ((x, [], form, shape, None, lora_a, lora_b, 1.0), r"at least one part"),
        ((x, [part, part], form, shape, None, lora_a, lora_b, 1.0), r"1 part, found 2"),
        ((x, [part], form, shape, None, lora_a[:, :3], lora_b, 1.0), r"A is \[r, 5\]"),
        ((x, [part], form, shape, None, lora_a, lora_b[:, :1], 1.0), r"B is \[4, 2\]"),
        ((x, [part], form, shape, None, lora_a, lora_b.double(), 1.0), r"one dtype"),
        ((x, [part.long()], form, shape, None, lora_a, lora_b, 1.0), r"floating point"),
    ):
        with pytest.raises(RuntimeError, match=message):
            lora(*arguments)
    with pytest.raises(RuntimeError, match="base weight is frozen"):
        lora(x, [part.requires_grad_()], form, shape, None, lora_a, lora_b, 1.0)
