"""Calibrated quantisation disturbs a model less than rounding does, and says by how much."""

import math

import pytest
import torch
import transformers
from conftest import TINY, make_tiny, tiny_configs

import budwood
from budwood import _C
from budwood.tokenizer import load_tokenizer

IDS = [[5, 17, 3, 96, 41, 8, 22, 60, 13, 2, 71, 33], [9, 9, 1, 50, 6, 88, 7, 4, 19, 30]]
PROJECTIONS = 7
AFFINE4 = 5  # quant::Format
# What users would call plain English, of several kinds.
TEXT = """
The harbour was quiet when the first of the boats came in. Two men were mending a net on the wall,
and a boy was counting the fish in a basket, although he had counted them twice already. "There are
forty," he said, "and yesterday there were sixty." Nobody answered him. The older of the men looked
at the sky, which had been grey since the morning, and put his needle down.
To bake the bread you need five hundred grams of flour, three hundred of water, ten of salt and a
little yeast. Mix them, cover the bowl with a cloth and wait until the dough has doubled. Then fold
it four times, let it rest for half an hour and put it into a hot oven.
In 1869 two railways met in the desert of Utah. A journey that had taken months by wagon now took a
week, and within ten years the price of wheat in New York had fallen by a third. Historians do not
agree on what would have happened without the line, because canals were cheaper for most goods.
A function that calls itself needs a case in which it does not. If the list is empty, return zero;
otherwise add one to the length of the rest. Each call keeps its place on the stack until the last
has returned, so a list of a million elements may be more than the machine can hold.
What is the capital of Australia? Many people say Sydney, but it is Canberra, which was built
between the two largest cities because neither would give way to the other.
"""


def weight_of(model, path):
    """The matrix that a projection of 4 bits stands for."""
    parts = dict(model.named_parameters())
    flat = [parts[f"{path}.{name}"] for name in ("weight", "weight_1", "weight_2", "weight_3")]
    out, width = flat[0].shape
    return _C.dequantize(flat, AFFINE4, [out, 2 * width])


def relative(found, wanted):
    return ((found - wanted).norm() / wanted.norm()).item()


@pytest.fixture(scope="module")
def english(smollm2_gguf):
    ids = load_tokenizer(smollm2_gguf)(TEXT.strip())["input_ids"]
    return [ids[i : i + 128] for i in range(0, len(ids), 128)]


def mha_config():
    options = {**TINY, "num_key_value_heads": 6}
    return transformers.LlamaConfig(**options, head_dim=8, attention_bias=True, mlp_bias=True)


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory, tiny_folder):
    """As tiny_folder, and "mha": as many value heads as query heads, with biases."""

    def folder(name):
        if name != "mha":
            return tiny_folder(name)
        path = tmp_path_factory.mktemp("mha") / "model"
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(mha_config())
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.2 * torch.randn_like(p)) if p.dim() == 1 else p.mul_(4.0)
        model.save_pretrained(path)
        return path

    return folder


@pytest.mark.parametrize("name", ["mha", "llama", "llama-tied-bias", "qwen2", "qwen3"])
def test_awq_folds_each_scale_once(name, folder_of):
    ids = torch.tensor([IDS[0]])
    wanted = _C.load_model(str(folder_of(name)), dtype="float32")(ids)
    rounded = _C.load_model(str(folder_of(name)), dtype="float32")
    _C.calibrate(rounded, [], method="rtn", bits=8, group_size=8, skip=[])
    model = _C.load_model(str(folder_of(name)), dtype="float32")
    report = _C.calibrate(model, IDS, method="awq", bits=8, group_size=8, skip=[])
    folded = {layer["path"].rsplit(".", 1)[-1] for layer in report if layer["awq_ratio"] > 0}
    assert {"q_proj", "gate_proj", "down_proj"} <= folded
    assert ("o_proj" in folded) == (name == "mha")
    with torch.no_grad():
        # A factor that was folded twice, or not at all, would change everything.
        assert relative(model(ids), wanted) < 2 * relative(rounded(ids), wanted)


def test_the_head_is_calibrated_when_it_is_not_skipped(tiny_folder):
    model = _C.load_model(str(tiny_folder("llama-tied-bias")), dtype="float32")
    table = dict(model.named_parameters())["model.embed_tokens.weight"].clone()
    report = _C.calibrate(model, IDS, method="gptq", bits=8, group_size=16, skip=["layers."])
    assert [layer["path"] for layer in report] == ["lm_head"]
    parameters = dict(model.named_parameters())
    assert parameters["lm_head.weight"].dtype == torch.uint8
    assert torch.equal(parameters["model.embed_tokens.weight"], table)


@pytest.mark.parametrize("method", ["rtn", "gptq", "hqq"])
def test_errors_are_those_of_the_layers_on_what_the_quantised_blocks_before_make(
    method, tiny_folder
):
    model = _C.load_model(str(tiny_folder("llama")), dtype="float32")
    report = _C.calibrate(model, IDS, method=method, bits=4, group_size=16)
    assert len(report) == TINY["num_hidden_layers"] * PROJECTIONS
    reference, plain = make_tiny("llama"), make_tiny("llama")
    inputs = {}
    modules = dict(reference.named_modules())

    def keep(path):
        return lambda module, args: inputs.setdefault(path, []).append(args[0].detach()[0])

    for block in range(TINY["num_hidden_layers"]):
        here = [layer for layer in report if f"layers.{block}." in layer["path"]]
        hooks = [
            modules[path].register_forward_pre_hook(keep(path))
            for path in (layer["path"] for layer in here)
        ]
        with torch.no_grad():
            for ids in IDS:
                reference(torch.tensor([ids]))
        for hook in hooks:
            hook.remove()
        for layer in here:
            path = layer["path"]
            x = torch.cat(inputs[path])
            w = plain.get_submodule(path).weight
            found = weight_of(model, path)
            rtn = _C.dequantize(*_C.quantize(w.detach(), "int4", block_size=16))
            assert layer["error"] == pytest.approx(relative(x @ found.T, x @ w.T), rel=2e-3)
            assert layer["rtn_error"] == pytest.approx(relative(x @ rtn.T, x @ w.T), rel=2e-3)
            assert layer["weight_error"] == pytest.approx(relative(found, w), rel=1e-4)
            if method == "rtn":
                assert torch.equal(found, rtn)
            with torch.no_grad():
                modules[path].weight.copy_(found)
    with torch.no_grad():
        assert relative(model(torch.tensor([IDS[0]])), reference(torch.tensor([IDS[0]])).logits) < (
            1e-5
        )


def test_batches_do_not_matter(tiny_folder):
    found = []
    for batch_tokens in (1, 15, 1000):
        model = _C.load_model(str(tiny_folder("llama")), dtype="float32")
        _C.calibrate(model, IDS, method="gptq", group_size=16, batch_tokens=batch_tokens)
        found.append(model(torch.tensor([IDS[0]])))
    assert relative(found[1], found[0]) < 1e-2
    assert relative(found[2], found[0]) < 1e-2


def geometric_mean(values):
    values = list(values)
    return math.exp(sum(map(math.log, values)) / len(values))


METHODS = {
    "gptq": {"method": "gptq"},
    "gptq act-order": {"method": "gptq", "act_order": True},
    "gptq static": {"method": "gptq", "act_order": True, "static_groups": True},
    "awq": {"method": "awq"},
}


def first_blocks(path, english, blocks, **options):
    model = _C.load_model(str(path), weights="dense")
    skip = ["lm_head", *(f"layers.{i}." for i in range(blocks, 30))]
    return _C.calibrate(model, english, group_size=64, skip=skip, **options)


@pytest.mark.parametrize("name", METHODS)
def test_methods_that_look_at_data_beat_rounding_on_real_activations(name, smollm2_gguf, english):
    for bits in (4, 8):
        report = first_blocks(smollm2_gguf, english, 2, bits=bits, **METHODS[name])
        assert len(report) == 2 * PROJECTIONS
        gains = {layer["path"]: layer["error"] / layer["rtn_error"] for layer in report}
        assert geometric_mean(gains.values()) < 0.95, gains
        if name.startswith("gptq"):
            assert max(gains.values()) < 1.0, gains


def test_hqq_beats_rounding_on_real_weights_without_data(smollm2_gguf, english):
    for bits in (4, 8):
        report = first_blocks(smollm2_gguf, english, 2, bits=bits, method="hqq")
        for layer in report:
            assert layer["weight_error"] < layer["rtn_weight_error"], layer
        bare = first_blocks(smollm2_gguf, [], 2, bits=bits, method="hqq")
        assert all(layer["error"] is None for layer in bare)
        assert [b["weight_error"] for b in bare] == [r["weight_error"] for r in report]


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_a_whole_model_says_more_likely_text_than_after_rounding(name, smollm2_gguf, english):
    def loss(**options):
        model = _C.load_model(str(smollm2_gguf), weights="dense")
        if options:
            _C.calibrate(model, english, group_size=64, **options)
        sums = counts = 0
        for sequence in english:
            ids = torch.tensor(sequence)
            batch = _C.TokenBatch.from_rows(ids[None, :-1])
            with torch.no_grad():
                found = model.loss(batch, ids[1:])
            sums, counts = sums + found.sum.item(), counts + found.count
        return sums / counts

    # Fitted to this very text, a model may even become a little better on it than it was.
    plain, fitted, rounded = loss(), loss(**METHODS[name]), loss(method="rtn")
    assert abs(fitted - plain) < 0.7 * (rounded - plain), (plain, fitted, rounded)


def test_hqq_can_quantise_while_loading(tiny_folder):
    folder = str(tiny_folder("llama"))
    loaded = _C.load_model(folder, dtype="float32", quantize="int4", quantize_method="hqq")
    calibrated = _C.load_model(folder, dtype="float32")
    _C.calibrate(calibrated, [], method="hqq")
    ids = torch.tensor([IDS[0]])
    assert torch.equal(loaded(ids), calibrated(ids))
    with pytest.raises(budwood.Error, match="method 'hqq' for 'nf4'"):
        _C.load_model(folder, quantize="nf4", quantize_method="hqq")


def test_progress_is_told_and_can_end_the_calibration(tiny_folder):
    model = _C.load_model(str(tiny_folder("llama")), dtype="float32")
    told = []
    _C.calibrate(model, [], method="rtn", callback=lambda *call: told.append(call))
    assert told == [(i + 1, 3, f"model.layers.{i}") for i in range(3)]
    model = _C.load_model(str(tiny_folder("llama")), dtype="float32")

    def stop(done, total, path):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _C.calibrate(model, [], method="rtn", callback=stop)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "spqr"}, "unknown method 'spqr'"),
        ({"bits": 3}, "3 bits"),
        ({"group_size": 0}, "group size 0"),
        ({"method": "awq", "act_order": True}, "act_order and static_groups are for gptq"),
        ({"method": "hqq", "symmetric": True}, "symmetric is not for hqq"),
        ({"skip": [""]}, "every projection is skipped"),
        ({"sequences": []}, "gptq looks at data"),
        ({"sequences": [[1], []]}, "sequence 1 has no tokens"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message, tiny_folder):
    model = _C.load_model(str(tiny_folder("llama")), dtype="float32")
    options = dict(options)
    with pytest.raises(budwood.Error, match=message):
        _C.calibrate(model, options.pop("sequences", IDS), **options)


def test_models_that_are_not_plain_are_refused(tiny_folder):
    folder = str(tiny_folder("llama"))
    model = _C.load_model(folder, quantize="int4")
    with pytest.raises(budwood.Error, match=r"layers\.0.*q_proj' is affine4 already"):
        _C.calibrate(model, IDS)
    model = _C.load_model(folder)
    _C.inject(model, _C.LoraConfig(r=2, target_modules=["k_proj"]))
    with pytest.raises(budwood.Error, match="k_proj' has the adapter 'default'"):
        _C.calibrate(model, IDS)


def test_every_family_is_calibrated(tiny_folder):
    for name in tiny_configs():
        model = _C.load_model(str(tiny_folder(name)), dtype="bfloat16")
        report = _C.calibrate(model, IDS, method="awq", group_size=16)
        assert len(report) == TINY["num_hidden_layers"] * PROJECTIONS
        assert model(torch.tensor([IDS[0]])).isfinite().all()
