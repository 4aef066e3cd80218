"""Packed weights give the numbers of the matrices that they stand for."""

import pytest
import torch
import transformers
from conftest import make_tiny
from torch.nn.functional import linear

import budwood
from budwood import _C

FORMATS = ("nf4", "fp4", "int8", "int4", "affine8")
OUT, IN = 24, 64
IDS = torch.tensor([[5, 17, 3, 96, 41, 8, 22, 60, 13, 2, 71, 33]])


def relative(found, wanted):
    return ((found - wanted).norm() / wanted.norm()).item()


def packed(format, out=OUT, cols=IN, **options):
    torch.manual_seed(0)
    parts, number, shape = _C.quantize(torch.randn(out, cols), format, **options)
    return parts, number, shape, _C.dequantize(parts, number, shape)


def lora(model, names=("q_proj", "v_proj", "down_proj")):
    _C.inject(model, _C.LoraConfig(r=4, target_modules=list(names)), seed=3)


@pytest.mark.parametrize("format", FORMATS)
def test_operators_and_gradients_equal_the_dequantised_weight(format):
    parts, number, shape, w = packed(format)
    x = torch.randn(3, 5, IN, requires_grad=True)
    bias = torch.randn(OUT, requires_grad=True)
    a, b = torch.randn(2, IN, requires_grad=True), torch.randn(OUT, 2, requires_grad=True)
    ours = torch.ops.budwood.lora_linear(x, parts, number, shape, bias, a, b, 0.5)
    wanted = linear(x, w, bias) + 0.5 * linear(linear(x, a), b)
    torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-5)
    grad = torch.randn_like(wanted)
    for mine, other in zip(
        torch.autograd.grad(ours, (x, bias, a, b), grad),
        torch.autograd.grad(wanted, (x, bias, a, b), grad),
        strict=True,
    ):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("format", FORMATS)
def test_linear_over_packed_parts_is_a_sound_operator(format):
    parts, number, shape, _ = packed(format)
    x = torch.randn(3, IN, requires_grad=True)
    torch.library.opcheck(torch.ops.budwood.linear.default, (x, parts, number, shape, None))


def test_the_4bit_operators_are_sound_and_agree_with_linear():
    torch.manual_seed(0)
    w, x = torch.randn(OUT, IN), torch.randn(3, IN, requires_grad=True)
    for quant_type in ("nf4", "fp4"):
        for cols in (IN, IN - 1):
            part = w[:, :cols]
            codes, absmax = torch.ops.budwood.quantize_4bit(part, quant_type, 32)
            plain = torch.ops.budwood.dequantize_4bit(codes, absmax, quant_type, 32, [OUT, cols])
            y = torch.ops.budwood.linear_4bit(
                x[:, :cols], codes, absmax, quant_type, 32, [OUT, cols]
            )
            torch.testing.assert_close(y, linear(x[:, :cols], plain), rtol=1e-5, atol=1e-5)
            ops = torch.ops.budwood
            torch.library.opcheck(ops.quantize_4bit.default, (part, quant_type, 32))
            torch.library.opcheck(
                ops.dequantize_4bit.default, (codes, absmax, quant_type, 32, [OUT, cols])
            )
            torch.library.opcheck(
                ops.linear_4bit.default,
                (x[:, :cols].detach().requires_grad_(), codes, absmax, quant_type, 32, [OUT, cols]),
            )
    with pytest.raises(budwood.Error, match="nf5"):
        torch.ops.budwood.quantize_4bit(w, "nf5", 64)


def test_the_4bit_codes_are_those_of_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional")
    torch.manual_seed(0)
    w = torch.randn(OUT, IN)
    for quant_type in ("nf4", "fp4"):
        codes, state = functional.quantize_4bit(w, blocksize=64, quant_type=quant_type)
        ours, absmax = torch.ops.budwood.quantize_4bit(w, quant_type, 64)
        assert torch.equal(ours.view(-1), codes.view(-1))
        assert torch.equal(absmax, state.absmax.view(-1))


@pytest.mark.parametrize("format", ["nf4", "int4"])
def test_a_compiled_function_has_no_graph_break(format):
    parts, number, shape, _w = packed(format)
    a, b = torch.randn(2, IN), torch.randn(OUT, 2)

    def step(x, a, b):
        y = torch.ops.budwood.lora_linear(x, parts, number, shape, None, a, b, 0.5)
        return y + torch.ops.budwood.linear(x, parts, number, shape)

    torch._dynamo.reset()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for rows in (3, 11):
        x = torch.randn(rows, IN, requires_grad=True)
        y = compiled(x, a, b)
        torch.testing.assert_close(y, step(x, a, b))
        wanted = torch.autograd.grad(step(x, a, b).sum(), x)
        torch.testing.assert_close(torch.autograd.grad(y.sum(), x), wanted)


def test_autocast_multiplies_packed_weights_in_bfloat16():
    parts, number, shape, w = packed("nf4")
    x = torch.randn(30, IN)
    with torch.autocast("cpu", torch.bfloat16):
        y = torch.ops.budwood.linear(x, parts, number, shape)
    assert y.dtype == torch.bfloat16
    assert relative(y.float(), linear(x, w)) < 1e-2


def test_a_packed_gguf_gives_the_logits_of_its_decoded_weights(smollm2_gguf):
    dense = _C.load_model(str(smollm2_gguf), weights="dense")
    packed = _C.load_model(str(smollm2_gguf), weights="packed")
    bytes_of = lambda model: sum(p.nbytes for _, p in model.named_parameters())  # noqa: E731
    assert bytes_of(packed) < 0.3 * bytes_of(dense)
    for tokens in (1, 7, 40):
        ids = torch.randint(0, 40_000, (1, tokens), generator=torch.Generator().manual_seed(tokens))
        with torch.no_grad():
            found, wanted = packed(ids), dense(ids)
        assert relative(found, wanted) < 1e-4
        assert (found - wanted).abs().max() < 2e-3
    prompt = [1, 504, 3575, 282]
    assert _C.generate(packed, prompt, max_new_tokens=8) == _C.generate(
        dense, prompt, max_new_tokens=8
    )


def test_lora_gradients_on_a_packed_base_equal_those_on_the_decoded_one(smollm2_gguf):
    ids = torch.randint(0, 40_000, (1, 33), generator=torch.Generator().manual_seed(0))
    batch, labels = _C.TokenBatch.from_rows(ids[:, :-1]), ids[0, 1:]
    grads = []
    for weights in ("dense", "packed"):
        model = _C.load_model(str(smollm2_gguf), weights=weights)
        lora(model)
        torch.manual_seed(1)
        trained = _C.trainable_parameters(model)
        with torch.no_grad():
            for _, p in trained:
                p.normal_(0, 0.02)
        loss = model.loss(batch, labels)
        (loss.sum / loss.count).backward()
        grads.append({name: p.grad for name, p in trained})
        assert all(p.grad is None for name, p in model.named_parameters() if name not in grads[-1])
    for name, wanted in grads[0].items():
        assert relative(grads[1][name], wanted) < 1e-3, name


@pytest.mark.parametrize("format", FORMATS)
def test_quantising_while_loading_gives_the_dequantised_model(format, tiny_folder):
    model = _C.load_model(str(tiny_folder("llama")), dtype="float32", quantize=format)
    reference = make_tiny("llama")
    names = dict(model.named_parameters())
    with torch.no_grad():
        for name, p in reference.named_parameters():
            if p.dim() == 2 and "lm_head" not in name and "embed" not in name:
                assert not names[name].is_floating_point()
                parts, number, shape = _C.quantize(p, format)
                p.copy_(_C.dequantize(parts, number, shape))
            else:
                assert torch.equal(names[name], p)
        assert relative(model(IDS), reference(IDS).logits) < 1e-5


@pytest.mark.parametrize("name", ["llama", "llama-tied-bias"])
def test_what_quantising_skips_can_stay_as_it_lies_in_a_16_bit_folder(name, tiny_folder, tmp_path):
    folder = tmp_path / "bf16"
    transformers.AutoModelForCausalLM.from_pretrained(
        tiny_folder(name), dtype=torch.bfloat16
    ).save_pretrained(folder)
    dense, packed = (
        _C.load_model(str(folder), "float32", quantize="nf4", weights=weights)
        for weights in ("auto", "packed")
    )
    held = [{w["form"]: w["bytes"] for w in _C.base_weights(model)} for model in (dense, packed)]
    assert held[0].keys() == {"float32", "nf4"}
    assert held[1] == {"bfloat16": held[0]["float32"] // 2, "nf4": held[0]["nf4"]}
    for model in (dense, packed):
        lora(model)
    assert relative(packed(IDS), dense(IDS)) < 1e-5


def test_a_merged_packed_model_is_saved_dense_and_opens_in_transformers(tiny_folder, tmp_path):
    model = _C.load_model(str(tiny_folder("llama")), dtype="float32", quantize="nf4")
    lora(model)
    with torch.no_grad():
        for _, p in _C.trainable_parameters(model):
            p.normal_(0, 0.1)
        wanted = model(IDS)
        _C.merge(model)
        _C.save_model(model, str(tmp_path / "merged"))
        saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        assert relative(saved(IDS).logits, wanted) < 1e-5


def test_options_that_do_not_fit_are_refused(tiny_folder, smollm2_gguf):
    folder = str(tiny_folder("llama"))
    with pytest.raises(budwood.Error, match="'auto', 'dense' or 'packed', found 'sparse'"):
        _C.load_model(folder, weights="sparse")
    with pytest.raises(budwood.Error, match="unknown format 'nf5'"):
        _C.load_model(folder, quantize="nf5")
    with pytest.raises(budwood.Error, match="quantised already"):
        _C.load_model(str(smollm2_gguf), weights="packed", quantize="nf4")
