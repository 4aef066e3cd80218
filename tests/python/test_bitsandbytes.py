"""Folders of bitsandbytes' models, both ways, with bitsandbytes and transformers as judges.

Row lengths are multiples of the block size where bitsandbytes itself dequantises: its CPU path is
known to be wrong elsewhere.
"""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig

import budwood
from budwood import _C

bnb = pytest.importorskip("bitsandbytes")
functional = pytest.importorskip("bitsandbytes.functional")

IDS = torch.tensor([[5, 17, 3, 96, 41, 8, 22, 60]])
FORMS = [("nf4", False), ("nf4", True), ("fp4", False), ("fp4", True), ("int8", False)]
DTYPES = ("float32", "bfloat16", "float16")


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """plain(dtype): a folder of a small Llama whose rows are whole blocks of 64."""
    made = {}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(
            vocab_size=97,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            attention_bias=True,
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))

    def folder(dtype):
        if dtype not in made:
            made[dtype] = tmp_path_factory.mktemp("plain") / dtype
            model.to(getattr(torch, dtype)).save_pretrained(made[dtype])
        return made[dtype]

    for dtype in DTYPES:
        folder(dtype)
    return folder


def quantised_by_transformers(folder, form, double, dtype):
    options = {"load_in_8bit": True}
    if form != "int8":
        options = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": form,
            "bnb_4bit_use_double_quant": double,
            "bnb_4bit_compute_dtype": getattr(torch, dtype),
        }
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=BitsAndBytesConfig(**options), dtype=getattr(torch, dtype)
    )


def relative(found, wanted):
    return ((found.double() - wanted.double()).norm() / wanted.double().norm()).item()


@pytest.mark.parametrize(("form", "double"), FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_our_folder_holds_the_tensors_that_transformers_writes(
    plain, tmp_path, form, double, dtype
):
    _C.quantize_files(str(plain(dtype)), str(tmp_path / "ours"), form, double_quant=double)
    quantised_by_transformers(plain(dtype), form, double, dtype).save_pretrained(
        tmp_path / "theirs"
    )
    ours = load_file(tmp_path / "ours" / "model.safetensors")
    theirs = load_file(tmp_path / "theirs" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    different = total = 0
    for name, wanted in theirs.items():
        assert ours[name].shape == wanted.shape, name
        assert ours[name].dtype == wanted.dtype, name
        if double and name.endswith(".weight.absmax"):
            # Near-ties of the second quantisation.
            different += int((ours[name] != wanted).sum())
            total += wanted.numel()
        elif form == "int8" and dtype == "float32" and name.endswith((".weight", ".SCB")):
            # Linear8bitLt rounds a float32 weight to float16 first; we do not.
            assert relative(ours[name].float(), wanted.float()) < 1e-2
        else:
            assert torch.equal(ours[name], wanted), name
    assert different <= 0.005 * total
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    wanted = json.loads((tmp_path / "theirs" / "config.json").read_text())
    if form == "int8":  # what 8 bits do not use
        wanted["quantization_config"]["bnb_4bit_compute_dtype"] = dtype
    assert config == wanted


@pytest.mark.parametrize(("form", "double"), FORMS)
def test_transformers_and_we_read_each_others_folders(plain, tmp_path, form, double):
    for maker in ("ours", "theirs"):
        folder = tmp_path / maker
        if maker == "ours":
            _C.quantize_files(str(plain("float32")), str(folder), form, double_quant=double)
        else:
            model = quantised_by_transformers(plain("float32"), form, double, "float32")
            model.save_pretrained(folder)
        theirs = AutoModelForCausalLM.from_pretrained(folder).train()
        ours = _C.load_model(str(folder))
        assert {part["form"] for part in _C.base_weights(ours)} == {
            "int8_rows" if form == "int8" else form,
            "float32",
        }
        with torch.no_grad():
            # LLM.int8 rounds activations, too, where they are not fp16 already; we do not.
            bound = 2e-2 if form == "int8" else 1e-5
            assert relative(ours(IDS), theirs(IDS).logits) < bound


@pytest.mark.parametrize(("form", "double"), FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_saved_quantised_model_reads_back_to_the_same_bytes(plain, tmp_path, form, double, dtype):
    _C.quantize_files(str(plain(dtype)), str(tmp_path / "a"), form, double_quant=double)
    _C.save_model(_C.load_model(str(tmp_path / "a")), str(tmp_path / "b"), weights="packed")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    dense = _C.load_model(str(tmp_path / "a"))
    _C.save_model(dense, str(tmp_path / "c"))
    saved = load_file(tmp_path / "c" / "model.safetensors")
    assert {t.dtype for t in saved.values()} == {getattr(torch, dtype)}
    config = json.loads((tmp_path / "c" / "config.json").read_text())
    assert "quantization_config" not in config


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("block_size", [32, 64, 128, 256, 512, 1024, 2048, 4096])
def test_codes_scales_and_values_are_those_of_bitsandbytes(quant_type, block_size):
    torch.manual_seed(block_size)
    for shape in ((3, block_size), (5, 2 * block_size), (1, 4 * block_size)):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            w = torch.randn(shape).to(dtype)
            w[0, :32] = 0
            codes, state = functional.quantize_4bit(w, blocksize=block_size, quant_type=quant_type)
            (ours, absmax, *_), form, size = _C.quantize(w, quant_type, block_size)
            assert torch.equal(ours.view(-1), codes.view(-1))
            assert torch.equal(absmax.view(-1), state.absmax)
            wanted = functional.dequantize_4bit(codes, state)
            name = str(dtype).removeprefix("torch.")
            parts = [ours, absmax, torch.tensor([block_size])]
            assert torch.equal(_C.dequantize(parts, form, size, name), wanted)


def test_tails_and_blocks_that_cross_rows_follow_the_written_rule():
    # bitsandbytes' own table in torch; its native path is wrong for these shapes.
    table = functional.get_4bit_type("nf4", device="cpu")
    for shape in ((3, 40), (7, 72), (5, 33), (1, 1), (2, 63)):
        torch.manual_seed(shape[1])
        w = torch.randn(shape)
        codes, state = functional.quantize_4bit(w, blocksize=64, quant_type="nf4")
        (ours, absmax, block), form, size = _C.quantize(w, "nf4", 64)
        assert torch.equal(ours.view(-1), codes.view(-1)), shape
        assert torch.equal(absmax.view(-1), state.absmax), shape
        nibbles = torch.stack([ours.view(-1) >> 4, ours.view(-1) & 15], 1).view(-1)[: w.numel()]
        scale = absmax.view(-1).repeat_interleave(64)[: w.numel()]
        wanted = (table[nibbles.long()] * scale).view(shape)
        assert torch.equal(_C.dequantize([ours, absmax, block], form, size), wanted), shape


def test_int8_rows_are_those_of_bitsandbytes():
    torch.manual_seed(0)
    w = torch.randn(9, 130)
    w[4] = 0
    codes, scales, _ = functional.int8_vectorwise_quant(w)
    (ours, scb), form, shape = _C.quantize(w, "int8")
    assert torch.equal(ours, codes)
    assert torch.equal(scb, scales)
    wanted = functional.int8_vectorwise_dequant(codes, scales)
    assert torch.equal(_C.dequantize([ours, scb], form, shape), wanted)


def stored(plain, tmp_path, form="nf4", double=True):
    folder = tmp_path / "hurt"
    if folder.exists():
        shutil.rmtree(folder)
    _C.quantize_files(str(plain("float32")), str(folder), form, double_quant=double)
    return folder, load_file(folder / "model.safetensors")


UP = "model.layers.1.mlp.up_proj."
STATE = UP + "weight.quant_state.bitsandbytes__nf4"


def with_state(tensors, **changes):
    state = json.loads(bytes(tensors[STATE].tolist())) | changes
    tensors[STATE] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)


HURT = {
    "no settings": (lambda t: t.pop(STATE), "quant_state"),
    "no scales": (lambda t: t.pop(UP + "weight.absmax"), "weight.absmax' is missing"),
    "short scales": (
        lambda t: t.update({UP + "weight.absmax": t[UP + "weight.absmax"][:-1].clone()}),
        "127 elements of Byte, wanted 128",
    ),
    "scales of another dtype": (
        lambda t: t.update({UP + "weight.absmax": t[UP + "weight.absmax"].float()}),
        "128 elements of Float, wanted 128 of Byte",
    ),
    "short codes": (
        lambda t: t.update({UP + "weight": t[UP + "weight"][:-1].clone()}),
        "4095 bytes of codes, wanted 4096",
    ),
    "no codes": (lambda t: t.pop(UP + "weight"), "missing"),
    "another table": (
        lambda t: t[UP + "weight.quant_map"].mul_(1.01),
        "weight.quant_map",
    ),
    "scale not finite": (
        lambda t: t[UP + "weight.nested_absmax"].fill_(float("nan")),
        "not finite",
    ),
    "unknown part": (
        lambda t: t.update({UP + "weight.surprise": torch.zeros(1)}),
        "weight.surprise",
    ),
    "block size": (lambda t: with_state(t, blocksize=48), "blocksize is 48"),
    "block size of another weight": (lambda t: with_state(t, blocksize=128), "128"),
    "type": (lambda t: with_state(t, quant_type="fp4"), "fp4"),
    "shape": (lambda t: with_state(t, shape=[64, 128]), r"\[64,128\], wanted \[128, 64\]"),
    "offset": (lambda t: with_state(t, nested_offset="x"), "must be number"),
    "no JSON": (
        lambda t: t.update({STATE: torch.tensor([123, 1, 2], dtype=torch.uint8)}),
        "quant_state",
    ),
    "endless JSON": (
        lambda t: t.update({STATE: torch.full((5000,), 91, dtype=torch.uint8)}),
        "at most 4096",
    ),
}


@pytest.mark.parametrize("name", HURT)
def test_a_damaged_layer_is_refused_by_name(plain, tmp_path, name):
    folder, tensors = stored(plain, tmp_path)
    hurt, message = HURT[name]
    hurt(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(budwood.Error, match=message) as caught:
        _C.load_model(str(folder))
    assert "model.layers.1.mlp.up_proj" in str(caught.value)


def test_unknown_methods_and_settings_are_refused(plain, tmp_path):
    folder, _ = stored(plain, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    for change, message in (
        ({"quant_method": "aqlm"}, "'aqlm', which is not supported; supported: .*bitsandbytes"),
        ({"quant_method": None}, "quant_method"),
        ({"load_in_4bit": False, "_load_in_4bit": False}, "exactly one of load_in_4bit"),
    ):
        changed = config | {"quantization_config": config["quantization_config"] | change}
        (folder / "config.json").write_text(json.dumps(changed))
        with pytest.raises(budwood.Error, match=message):
            _C.load_model(str(folder))
    with pytest.raises(budwood.Error, match="is quantised already"):
        (folder / "config.json").write_text(json.dumps(config))
        _C.load_model(str(folder), quantize="nf4")


def test_a_weight_that_is_not_finite_is_refused_by_name(plain, tmp_path):
    folder = tmp_path / "nan"
    shutil.copytree(plain("float32"), folder)
    tensors = load_file(folder / "model.safetensors")
    tensors[UP + "weight"][3, 5] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(budwood.Error, match=r"up_proj.weight.*row 3, column 5"):
        _C.quantize_files(str(folder), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_codes_under_another_storage_dtype_are_the_same_bytes(plain, tmp_path):
    folder, tensors = stored(plain, tmp_path)
    wanted = _C.load_model(str(folder))(IDS)
    tensors[UP + "weight"] = tensors[UP + "weight"].view(-1).view(torch.bfloat16).view(-1, 1)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert torch.equal(_C.load_model(str(folder))(IDS), wanted)
