"""LoftQ, QPiSSA and EoRA against Eckart and Young's bound, numpy and the formulas in float64."""

import copy

import pytest
import torch
import transformers
from test_merge_quantised import config_of

import budwood
from budwood import _C

FORMS = ["nf4", "fp4", "int4", "affine8", "int8"]


def matrix(out=96, cols=128, decay=0.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(out, cols, generator=generator)
    if decay:
        u, s, vt = torch.linalg.svd(w, full_matrices=False)
        w = u * (s[0] * torch.arange(1, len(s) + 1) ** -decay) @ vt
    return w


def packed(w, form):
    if form.startswith("q"):
        return gguf_parts(w, form)
    parts, format = _C.quantize(w, form)[:2]
    return parts, format, list(w.shape)


def gguf_parts(w, form):
    import gguf
    import numpy as np

    kind = gguf.GGMLQuantizationType[form.upper()]
    blocks = gguf.quants.quantize(w.numpy().astype(np.float32), kind)
    return [torch.from_numpy(blocks.copy())], 16 + int(kind), list(w.shape)


def values(parts, format, shape):
    return _C.dequantize(parts, format, shape, "float32").double()


@pytest.mark.parametrize("form", [*FORMS, "q4_0", "q4_1", "q8_0"])
@pytest.mark.parametrize("scaling", [1.0, 0.5])
def test_loftq_is_the_best_approximation_of_what_is_missing(form, scaling):
    w = matrix()
    parts, format, shape = packed(w, form)
    rest = w.double() - values(parts, format, shape)
    singular = torch.linalg.svdvals(rest)
    before = (rest.norm() / w.norm()).item()
    last = before
    for rank in (1, 4, 16, 64):
        start = _C.residual_start(w, parts, format, shape, rank, scaling)
        assert start["parts"] is None
        assert start["before"] == pytest.approx(before, rel=1e-6)
        left = rest - scaling * start["b"].double() @ start["a"].double()
        bound = singular[rank:].square().sum().sqrt()
        assert left.norm() == pytest.approx(bound.item(), rel=1e-5)
        assert start["after"] == pytest.approx((left.norm() / w.norm()).item(), rel=1e-5)
        assert start["after"] < last
        last = start["after"]


@pytest.mark.parametrize("form", ["nf4", "fp4", "int4", "q4_0"])
@pytest.mark.parametrize("decay", [0.0, 0.7])
def test_more_iterations_of_loftq_never_get_worse(form, decay):
    w = matrix(decay=decay)
    parts, format, shape = packed(w, form)
    errors = []
    for iterations in (1, 2, 3, 5):
        start = _C.residual_start(w, parts, format, shape, 16, 2.0, "loftq", iterations)
        base = parts if start["parts"] is None else start["parts"]
        found = values(base, format, shape) + 2.0 * start["b"].double() @ start["a"].double()
        error = ((w.double() - found).norm() / w.norm()).item()
        assert start["after"] == pytest.approx(error, rel=1e-5)
        assert start["iteration"] <= iterations
        errors.append(error)
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0]


@pytest.mark.parametrize("form", ["nf4", "int4", "q4_1"])
def test_qpissa_quantises_what_the_factors_leave(form):
    w = matrix(decay=0.7)
    parts, format, shape = packed(w, form)
    start = _C.residual_start(w, parts, format, shape, 16, 0.25, "qpissa")
    product = 0.25 * start["b"].double() @ start["a"].double()
    u, s, vt = torch.linalg.svd(w.double(), full_matrices=False)
    torch.testing.assert_close(product, u[:, :16] * s[:16] @ vt[:16], atol=1e-4, rtol=1e-4)
    again, _, _ = packed((w.double() - product).float(), form)
    found, wanted = values(start["parts"], format, shape), values(again, format, shape)
    # The factors hold the product to rounding, which may tip a near-tie to the code beside it.
    error = (found - wanted).abs()
    tipped = error > 1e-6
    assert tipped.sum() <= 2
    assert error.max() < 0.005 * wanted.norm()
    assert start["after"] < 0.8 * start["before"]


def test_eora_is_best_for_the_outputs():
    w = matrix()
    parts, format, shape = packed(w, "nf4")
    x = torch.randn(400, 128) * torch.logspace(0, -2, 128)
    covariance = x.T @ x / 400
    rest = w.double() - values(parts, format, shape)
    start = _C.residual_start(w, parts, format, shape, 8, 2.0, "eora", 1, covariance)
    left = (rest - 2.0 * start["b"].double() @ start["a"].double()) @ x.double().T
    missing = rest @ x.double().T
    bound = torch.linalg.svdvals(missing)[8:].square().sum().sqrt()
    assert left.norm() == pytest.approx(bound.item(), rel=1e-4)
    total = (w.double() @ x.double().T).norm()
    assert start["before"] == pytest.approx((missing.norm() / total).item(), rel=1e-4)
    assert start["after"] == pytest.approx((left.norm() / total).item(), rel=1e-4)
    plain = _C.residual_start(w, parts, format, shape, 8, 2.0, "loftq")
    by_loftq = (rest - 2.0 * plain["b"].double() @ plain["a"].double()) @ x.double().T
    assert left.norm() < by_loftq.norm()
    # Directions in which nothing goes are left alone.
    narrow = torch.zeros(128, 128)
    narrow[:5, :5] = torch.eye(5)
    start = _C.residual_start(w, parts, format, shape, 8, 1.0, "eora", 1, narrow)
    assert start["a"].isfinite().all()
    assert start["after"] == pytest.approx(0, abs=1e-6)


def test_what_cannot_be_done_is_said():
    w = matrix()
    parts, format, shape = packed(w, "nf4")
    for changes, message in (
        ({"w": w[:5]}, r"the original is \[5, 128\]"),
        ({"rank": 97}, "rank 97 for a matrix"),
        ({"scaling": 0.0}, "the scaling is 0"),
        ({"method": "pissa"}, "method is 'pissa'"),
        ({"iterations": 0}, "iterations is 0"),
        ({"method": "qpissa", "iterations": 2}, "iterations is 2, wanted 1"),
        ({"method": "eora"}, "takes the covariance"),
        ({"w": w * float("nan")}, "not finite"),
    ):
        arguments = {"w": w, "rank": 4, "scaling": 1.0} | changes
        with pytest.raises(budwood.Error, match=message):
            _C.residual_start(
                arguments.pop("w"),
                parts,
                format,
                shape,
                arguments.pop("rank"),
                arguments.pop("scaling"),
                **arguments,
            )
    with pytest.raises(budwood.Error, match="nothing was taken"):
        _C.residual_start(w, [w], 0, shape, 4, 1.0)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain") / "model"
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config_of("llama"))
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("method", "iterations"), [("loftq", 1), ("loftq", 3), ("qpissa", 1), ("eora", 1)]
)
def test_a_cpp_model_comes_nearer_to_its_original(method, iterations, plain, tmp_path):
    ids = torch.arange(24).reshape(1, 24)
    original = _C.load_model(str(plain), "float32")
    model = _C.load_model(str(plain), "float32", quantize="nf4")
    with torch.no_grad():
        wanted, before = original(ids), model(ids)
    config = _C.LoraConfig(r=16, lora_alpha=8, target_modules="all-linear", use_rslora=True)
    _C.inject(model, config)
    sequences = [list(range(i, i + 20)) for i in range(30)]
    report = _C.start_from_original(
        model, plain, "default", method, iterations, sequences if method == "eora" else []
    )
    assert report["base_changed"] == (method == "qpissa" or iterations > 1)
    assert len(report["places"]) == 7 * 3
    assert all(place["after"] < place["before"] for place in report["places"])
    with torch.no_grad():
        after = model(ids)
    assert (after - wanted).norm() < 0.9 * (before - wanted).norm()
    _C.save_adapter(model, str(tmp_path / "adapter"))
    _C.detach(model, "default")
    # Base and adapter belong together, also as files.
    _C.save_model(model, str(tmp_path / "base"), weights="packed")
    again = _C.load_model(str(tmp_path / "base"), "float32")
    _C.load_adapter(again, str(tmp_path / "adapter"))
    with torch.no_grad():
        torch.testing.assert_close(again(ids), after, atol=1e-5, rtol=1e-5)


def test_a_gguf_base_takes_its_original_from_a_folder(plain, tmp_path):
    _C.save_gguf(_C.load_model(str(plain), "float32"), str(tmp_path / "x.gguf"), type="q4_0")
    model = _C.load_model(str(tmp_path / "x.gguf"))
    _C.inject(model, _C.LoraConfig(r=8, lora_alpha=8, target_modules=["q_proj", "down_proj"]))
    report = _C.start_from_original(model, plain, "default", "loftq", 2)
    assert all(place["after"] < place["before"] for place in report["places"])
    # The other way round: the original is the GGUF file itself, so nothing is missing.
    model = _C.load_model(str(tmp_path / "x.gguf"))
    _C.inject(model, _C.LoraConfig(r=8, target_modules=["q_proj"]))
    report = _C.start_from_original(model, tmp_path / "x.gguf")
    assert all(place["before"] == 0 for place in report["places"])


def test_a_model_that_does_not_fit_is_refused(plain, tmp_path):
    def start(config, quantize="nf4", **arguments):
        model = _C.load_model(str(plain), "float32", quantize=quantize)
        _C.inject(model, config)
        return _C.start_from_original(model, plain, **arguments)

    with pytest.raises(budwood.Error, match="is not quantised: nothing was taken"):
        start(_C.LoraConfig(target_modules=["q_proj"]), quantize="")
    for config in (
        _C.LoraConfig(target_modules=["q_proj"], use_dora=True),
        _C.LoraConfig(target_modules=["q_proj"], init_lora_weights="pissa"),
        _C.IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
    ):
        with pytest.raises(budwood.Error, match="is no plain LoRA that begins with 0"):
            start(config)
    with pytest.raises(budwood.Error, match="no LoRA adapter 'other'"):
        start(_C.LoraConfig(target_modules=["q_proj"]), adapter="other")
    with pytest.raises(budwood.Error, match="at least one sequence"):
        start(_C.LoraConfig(target_modules=["q_proj"]), method="eora")


def test_a_torch_model_starts_the_same(plain):
    model = transformers.AutoModelForCausalLM.from_pretrained(plain)
    original = copy.deepcopy(model)
    budwood.quantize_model(model, "nf4")
    base = copy.deepcopy(model)
    settings = budwood.LoraConfig(r=16, lora_alpha=16, target_modules="all-linear")
    model = budwood.get_peft_model(model, settings)
    ids = torch.arange(24).reshape(1, 24)
    with torch.no_grad():
        wanted, before = original(ids).logits, base(ids).logits
    report = budwood.start_from_original(model, plain)
    assert len(report) == 21
    ours = _C.load_model(str(plain), "float32", quantize="nf4")
    _C.inject(ours, _C.LoraConfig(r=16, lora_alpha=16, target_modules="all-linear"))
    theirs = _C.start_from_original(ours, plain)
    for one, two in zip(
        sorted(report, key=lambda p: p["path"]),
        sorted(theirs["places"], key=lambda p: p["path"]),
        strict=True,
    ):
        assert one["path"] == two["path"]
        assert one["after"] == pytest.approx(two["after"], rel=1e-6)
    with torch.no_grad():
        assert (model(ids).logits - wanted).norm() < (before - wanted).norm()
    with pytest.raises(budwood.Error, match="is not fresh"):
        budwood.start_from_original(model, plain)

    for method, iterations in (("qpissa", 1), ("loftq", 2), ("eora", 1)):
        model = budwood.get_peft_model(copy.deepcopy(base), settings)
        report = budwood.start_from_original(
            model, plain, method=method, iterations=iterations, calibrate=lambda m=model: m(ids)
        )
        assert all(place["after"] < place["before"] for place in report)
        with torch.no_grad():
            assert (model(ids).logits - wanted).norm() < (before - wanted).norm()
    with pytest.raises(budwood.Error, match="pass calibrate="):
        budwood.start_from_original(
            budwood.get_peft_model(copy.deepcopy(base), settings), plain, method="eora"
        )
    with pytest.raises(budwood.Error, match="is not quantised"):
        budwood.start_from_original(budwood.get_peft_model(original, settings), plain)
