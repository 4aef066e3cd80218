"""GGUF files hold the bytes that the gguf package would write, and other readers take them."""

import os

import gguf
import numpy as np
import pytest
import torch
import transformers
from conftest import TINY, make_tiny, tiny_configs
from gguf.quants import quantize

from budwood import _C

IDS = torch.tensor([[5, 17, 3, 96, 41, 8, 22, 60, 13, 2, 71, 33]])
TYPES = ["f32", "f16", "bf16", "q8_0", "q4_1", "q4_0"]
FAMILIES = list(tiny_configs())
TEXTS = [
    "KING. What news from the north, my lord?",
    "Grüße, 東京! Ça va? \u00e9 e\u0301 \U0001f44d\U0001f3fd naïve",
    "  two  spaces\n\n\ttab 1234567 3.14 don't I'LL\r\n end ",
    "<|im_start|>user\nHi<|im_end|>\n<|endoftext|>",
]


def config_of(name):
    """A tiny configuration whose rows are whole blocks of 32."""
    config = tiny_configs()[name.removesuffix("-head-128")]
    if name.endswith("-head-128"):
        config.head_dim = 128
    config.hidden_size, config.intermediate_size, config.num_attention_heads = 64, 96, 8
    return config


@pytest.fixture(scope="session")
def wide(tmp_path_factory):
    """wide(name): (folder, transformers model)."""
    made = {}

    def model(name):
        if name not in made:
            torch.manual_seed(1)
            theirs = transformers.AutoModelForCausalLM.from_config(config_of(name)).eval()
            with torch.no_grad():
                for p in theirs.parameters():
                    p.add_(0.2 * torch.randn_like(p)) if p.dim() == 1 else p.mul_(4.0)
            folder = tmp_path_factory.mktemp("wide") / name
            theirs.save_pretrained(folder)
            made[name] = folder, theirs
        return made[name]

    return model


def tensors_of(path):
    return {t.name: t for t in gguf.GGUFReader(path).tensors}


def metadata_of(path):
    return {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items()}


def interleaved(values, head_dim):
    """Row 2i of a head is its row i, row 2i + 1 its row i + head_dim / 2."""
    half = head_dim // 2
    order = [
        h + i + half * j
        for h in range(0, len(values), head_dim)
        for i in range(half)
        for j in (0, 1)
    ]
    return values[order]


def wanted_tensors(theirs):
    """GGUF name -> fp32 values, from a transformers model."""
    config = theirs.config
    llama = config.model_type in ("llama", "mistral")
    arch = gguf.MODEL_ARCH.LLAMA if llama else gguf.MODEL_ARCH[config.model_type.upper()]
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    wanted = {}
    for name, p in theirs.named_parameters():
        values = p.detach().float().numpy()
        if llama and (".q_proj." in name or ".k_proj." in name):
            values = interleaved(values, head_dim)
        wanted[names.get_name(name, try_suffixes=(".weight", ".bias"))] = values
    return wanted


def check_tensors(path, wanted, type_of):
    found = tensors_of(path)
    assert set(found) - {"rope_freqs.weight"} == set(wanted)
    for name, values in wanted.items():
        kind = type_of(name, values)
        assert found[name].tensor_type == kind, name
        assert list(found[name].shape) == list(values.shape)[::-1], name
        assert found[name].data.tobytes() == quantize(values, kind).tobytes(), name


@pytest.mark.parametrize("type", TYPES)
@pytest.mark.parametrize("name", FAMILIES)
def test_tensors_have_the_bytes_of_the_gguf_package(name, type, wide, tmp_path):
    folder, theirs = wide(name)
    path = tmp_path / "model.gguf"
    report = _C.save_gguf(_C.load_model(str(folder)), str(path), type=type)
    matrices = gguf.GGMLQuantizationType[type.upper()]

    def type_of(name, values):
        if values.ndim == 1:
            return gguf.GGMLQuantizationType.F32
        if name in ("token_embd.weight", "output.weight") and type.startswith("q4"):
            return gguf.GGMLQuantizationType.Q8_0
        return matrices

    check_tensors(path, wanted_tensors(theirs), type_of)
    assert [t["name"] for t in report["tensors"]] == list(tensors_of(path))
    assert sum(report["types"].values()) == len(report["tensors"])
    assert all("window" in w for w in report["warnings"])
    assert bool(report["warnings"]) == ("window" in name)


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_of_partial_blocks_are_f16_and_named(name, tiny_folder, tmp_path):
    path = tmp_path / "model.gguf"
    model = _C.load_model(str(tiny_folder(name)))
    report = _C.save_gguf(model, str(path), type="q4_0", embedding_type="q4_0")
    fallen = set()

    def type_of(name, values):
        if values.ndim == 1:
            return gguf.GGMLQuantizationType.F32
        if values.shape[1] % 32:
            fallen.add(name)
            return gguf.GGMLQuantizationType.F16
        return gguf.GGMLQuantizationType.Q4_0

    check_tensors(path, wanted_tensors(make_tiny(name)), type_of)
    warned = {w.split()[0] for w in report["warnings"] if " is F16: " in w}
    assert warned == fallen
    assert fallen


@pytest.mark.parametrize("name", FAMILIES)
def test_metadata_describe_the_model(name, wide, tmp_path):
    folder, theirs = wide(name)
    config, path = theirs.config, tmp_path / "model.gguf"
    _C.save_gguf(_C.load_model(str(folder)), str(path), type="q4_1", name="Tiny")
    arch = "llama" if config.model_type == "mistral" else config.model_type
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    wanted = {
        "general.architecture": arch,
        "general.type": "model",
        "general.name": "Tiny",
        "general.file_type": gguf.LlamaFileType.MOSTLY_Q4_1,
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
        "tokenizer.ggml.model": "no_vocab",
        "tokenizer.ggml.bos_token_id": TINY["bos_token_id"],
        "tokenizer.ggml.eos_token_id": TINY["eos_token_id"],
        gguf.Keys.LLM.VOCAB_SIZE: config.vocab_size,
        gguf.Keys.LLM.BLOCK_COUNT: config.num_hidden_layers,
        gguf.Keys.LLM.CONTEXT_LENGTH: config.max_position_embeddings,
        gguf.Keys.LLM.EMBEDDING_LENGTH: config.hidden_size,
        gguf.Keys.LLM.FEED_FORWARD_LENGTH: config.intermediate_size,
        gguf.Keys.Attention.HEAD_COUNT: heads,
        gguf.Keys.Attention.HEAD_COUNT_KV: config.num_key_value_heads,
        gguf.Keys.Attention.KEY_LENGTH: head_dim,
        gguf.Keys.Attention.VALUE_LENGTH: head_dim,
        gguf.Keys.Rope.DIMENSION_COUNT: head_dim,
        gguf.Keys.Attention.LAYERNORM_RMS_EPS: np.float32(config.rms_norm_eps),
        gguf.Keys.Rope.FREQ_BASE: np.float32(config.rope_parameters["rope_theta"]),
    }
    rope = config.rope_parameters
    if rope["rope_type"] in ("linear", "yarn"):
        wanted[gguf.Keys.Rope.SCALING_TYPE] = rope["rope_type"]
        wanted[gguf.Keys.Rope.SCALING_FACTOR] = rope["factor"]
    else:
        wanted[gguf.Keys.Rope.SCALING_TYPE] = None
    if rope["rope_type"] == "yarn":
        key = gguf.Keys.Rope.SCALING_ORIG_CTX_LEN
        wanted[key] = rope["original_max_position_embeddings"]
    found = metadata_of(path)
    for key, expected in wanted.items():
        assert found.get(key.format(arch=arch)) == expected, key
    divisors = tensors_of(path).get("rope_freqs.weight")
    assert (divisors is not None) == (rope["rope_type"] == "llama3")
    if divisors is not None:
        plain = 1 / rope["rope_theta"] ** (np.arange(0, head_dim, 2) / head_dim)
        scaled = theirs.model.rotary_emb.inv_freq.double().numpy()
        np.testing.assert_allclose(divisors.data, plain / scaled, rtol=1e-6)


@pytest.mark.parametrize("name", FAMILIES)
def test_our_loader_gives_the_logits_of_the_model(name, wide, tmp_path):
    folder, theirs = wide(name)
    model, path = _C.load_model(str(folder), dtype="float32"), tmp_path / "model.gguf"
    _C.save_gguf(model, str(path), type="f32")
    again = _C.load_model(str(path))
    with torch.no_grad():
        found, wanted = again(IDS), model(IDS)
        assert (found - wanted).abs().max() <= 1e-6 * wanted.abs().max()
        assert (found - theirs(IDS).logits).abs().max() < 1e-4
    assert again.config["eos_token_id"] == TINY["eos_token_id"]
    _C.save_model(again, str(tmp_path / "folder"))
    if name != "llama-llama3":  # a folder has no divisors of frequencies
        with torch.no_grad():
            back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "folder")
            assert (back(IDS).logits - wanted).abs().max() < 1e-4


# transformers reads neither biases of Llama nor scaled frequencies from a GGUF file, and takes each
# head of Qwen3 to be 128 wide.
@pytest.mark.parametrize(
    "name",
    [
        "llama",
        "llama-wide-head",
        "mistral-window",
        "mistral-full",
        "qwen2",
        "qwen2-window",
        "qwen3-head-128",
    ],
)
def test_transformers_gives_the_same_logits(name, wide, tmp_path):
    folder, _ = wide(name)
    model = _C.load_model(str(folder), dtype="float32")
    _C.save_gguf(model, str(tmp_path / "model.gguf"), type="f32")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="model.gguf", dtype=torch.float32
    )
    ids = IDS[:, :5] if "window" in name else IDS
    with torch.no_grad():
        assert (theirs(ids).logits - model(ids)).abs().max() < 1e-4


def test_yarns_own_settings_survive(tmp_path):
    torch.manual_seed(0)
    config = config_of("llama-yarn")
    config.rope_parameters |= {"beta_fast": 16.0, "beta_slow": 2.0, "attention_factor": 1.3}
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "folder")
    model = _C.load_model(str(tmp_path / "folder"))
    path = tmp_path / "model.gguf"
    _C.save_gguf(model, str(path), type="f32")
    assert metadata_of(path)["llama.rope.scaling.yarn_beta_fast"] == 16.0
    again = _C.load_model(str(path))
    with torch.no_grad():
        assert (again(IDS) - model(IDS)).abs().max() < 1e-6


def test_packed_weights_of_other_forms_and_merged_adapters_are_written(wide, tmp_path):
    folder, theirs = wide("qwen3")
    packed = _C.load_model(str(folder), quantize="nf4")
    _C.save_gguf(packed, str(tmp_path / "nf4.gguf"), type="f32")
    with torch.no_grad():
        found = _C.load_model(str(tmp_path / "nf4.gguf"))(IDS)
        assert (found - packed(IDS)).abs().max() < 1e-4
    model = _C.load_model(str(folder), dtype="float32")
    _C.inject(model, _C.LoraConfig(r=4, target_modules=["q_proj", "down_proj", "lm_head"]))
    with torch.no_grad():
        for _, p in _C.trainable_parameters(model):
            p.add_(0.1)
    with pytest.raises(_C.Error, match=r"has the adapter 'default'.*merge or detach"):
        _C.save_gguf(model, str(tmp_path / "lora.gguf"))
    assert os.listdir(tmp_path) == ["nf4.gguf"]
    _C.merge(model)
    _C.save_gguf(model, str(tmp_path / "lora.gguf"), type="f32")
    with torch.no_grad():
        wanted, found = model(IDS), _C.load_model(str(tmp_path / "lora.gguf"))(IDS)
        assert (found - wanted).abs().max() <= 1e-6 * wanted.abs().max()
        assert (found - theirs(IDS).logits).abs().max() > 1e-2


def test_a_merge_into_a_tied_head_is_written_as_a_head(wide, tmp_path):
    folder, _ = wide("llama-tied-bias")
    model = _C.load_model(str(folder), dtype="float32")
    _C.save_gguf(model, str(tmp_path / "tied.gguf"), type="f32")
    assert "output.weight" not in tensors_of(tmp_path / "tied.gguf")
    _C.inject(model, _C.LoraConfig(r=4, target_modules=["lm_head"]))
    with torch.no_grad():
        for _, p in _C.trainable_parameters(model):
            p.add_(0.1)
    _C.merge(model)
    _C.save_gguf(model, str(tmp_path / "own.gguf"), type="f32")
    assert "output.weight" in tensors_of(tmp_path / "own.gguf")
    with torch.no_grad():
        wanted, found = model(IDS), _C.load_model(str(tmp_path / "own.gguf"))(IDS)
    assert (found - wanted).abs().max() <= 1e-6 * wanted.abs().max()


def same_ids(a, b):
    for text in TEXTS:
        assert a(text).input_ids == b(text).input_ids
    chat = [{"role": "user", "content": "Hi 123"}, {"role": "assistant", "content": "Ça va"}]
    assert a.apply_chat_template(chat, tokenize=False) == b.apply_chat_template(
        chat, tokenize=False
    )
    assert a.eos_token_id == b.eos_token_id
    assert a.bos_token_id == b.bos_token_id


@pytest.mark.parametrize("type", ["f32", "q8_0"])
def test_smollm2_goes_to_a_folder_and_back(type, smollm2_gguf, tmp_path):
    model = _C.load_model(str(smollm2_gguf), dtype="float32")
    folder, path = tmp_path / "folder", tmp_path / "model.gguf"
    _C.save_model(model, str(folder), tokenizer_from=str(smollm2_gguf))
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "resaved")
    _C.save_gguf(
        _C.load_model(str(folder)), str(path), type=type, tokenizer_from=str(tmp_path / "resaved")
    )
    source, found = metadata_of(smollm2_gguf), metadata_of(path)
    for key in ("tokens", "token_type", "merges", "pre", "bos_token_id", "eos_token_id"):
        name = f"tokenizer.ggml.{key}"
        assert found[name] == source[name], key
    assert found["tokenizer.chat_template"] == source["tokenizer.chat_template"]
    again = _C.load_model(str(path))
    _C.save_model(again, str(tmp_path / "again"), tokenizer_from=str(path))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    same_ids(tokenizer, transformers.AutoTokenizer.from_pretrained(tmp_path / "again"))
    ids = tokenizer(TEXTS[0], return_tensors="pt").input_ids
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="model.gguf", dtype=torch.float32
    )
    with torch.no_grad():
        wanted, found = model(ids), again(ids)
        assert (found - theirs(ids).logits).abs().max() < 1e-4
    if type == "f32":
        assert (found - wanted).abs().max() <= 1e-6 * wanted.abs().max()


def test_blocks_of_the_wanted_type_are_copied(smollm2_gguf, tmp_path):
    packed = _C.load_model(str(smollm2_gguf), weights="packed")
    path = tmp_path / "model.gguf"
    report = _C.save_gguf(packed, str(path), type="q4_1", tokenizer_from=str(smollm2_gguf))
    assert report["types"] == {"F32": 61, "Q4_1": 210, "Q8_0": 1}
    assert sum(t["copied"] for t in report["tensors"]) == 211
    source, found = tensors_of(smollm2_gguf), tensors_of(path)
    assert set(source) == set(found)
    for name, tensor in source.items():
        assert found[name].tensor_type == tensor.tensor_type, name
        assert found[name].data.tobytes() == tensor.data.tobytes(), name
    described = metadata_of(path)
    for key, expected in metadata_of(smollm2_gguf).items():
        if key.startswith(("tokenizer.", "llama.")):
            assert described[key] == expected, key
    # The same blocks through float32: codes of another type, read by the gguf package.
    report = _C.save_gguf(packed, str(path), type="q4_0")
    assert not any(t["copied"] for t in report["tensors"] if t["type"] == "Q4_0")
    name = "blk.7.attn_q.weight"
    values = gguf.quants.dequantize(source[name].data, source[name].tensor_type)
    wanted = quantize(values, gguf.GGMLQuantizationType.Q4_0)
    assert tensors_of(path)[name].data.tobytes() == wanted.tobytes()


@pytest.mark.parametrize("type", TYPES)
def test_a_value_no_type_holds_is_named_and_leaves_no_file(type, wide, tmp_path):
    folder, _ = wide("qwen2")
    for bad in (float("nan"), float("inf"), 3e38):
        model = _C.load_model(str(folder), dtype="float32")
        weight = dict(model.named_parameters())["model.layers.1.mlp.up_proj.weight"]
        with torch.no_grad():
            weight[3, 40] = bad
        path = tmp_path / "model.gguf"
        if bad == 3e38 and type in ("f32", "bf16"):
            _C.save_gguf(model, str(path), type=type)
            path.unlink()
            continue
        with pytest.raises(_C.Error, match=r"blk\.1\.ffn_up\.weight: element 40 of row 3 is"):
            _C.save_gguf(model, str(path), type=type)
        assert os.listdir(tmp_path) == []


def test_bad_requests_leave_no_file(wide, tmp_path):
    model = _C.load_model(str(wide("llama")[0]))
    path = str(tmp_path / "model.gguf")
    for kwargs, message in [
        ({"type": "q4_k"}, "type is 'q4_k'; wanted one of F32, F16, Q4_0, Q4_1, Q8_0, BF16"),
        ({"type": "int3"}, "type is 'int3'"),
        ({"embedding_type": "q6_k"}, "embedding_type is 'q6_k'"),
        ({"tokenizer_from": str(tmp_path / "nowhere")}, "nowhere: no such folder or GGUF file"),
        ({"tokenizer_from": str(tmp_path)}, "found no tokeniser"),
    ]:
        with pytest.raises(_C.Error, match=message):
            _C.save_gguf(model, path, **kwargs)
    assert os.listdir(tmp_path) == []
    with pytest.raises(_C.Error, match="is a folder"):
        _C.save_gguf(model, str(tmp_path))
    with pytest.raises(_C.Error, match="missing"):
        _C.save_gguf(model, str(tmp_path / "missing" / "model.gguf"))
    # Nobody, not even root, makes files there.
    with pytest.raises(_C.Error, match=r"/proc/model\.gguf"):
        _C.save_gguf(model, "/proc/model.gguf")
    assert os.listdir(tmp_path) == []


def test_a_failed_save_keeps_the_file_that_was_there(wide, tmp_path):
    path = tmp_path / "model.gguf"
    model = _C.load_model(str(wide("llama")[0]), dtype="float32")
    _C.save_gguf(model, str(path), type="f32")
    before = path.read_bytes()
    with torch.no_grad():
        dict(model.named_parameters())["model.norm.weight"][0] = float("nan")
    with pytest.raises(_C.Error, match=r"output_norm\.weight"):
        _C.save_gguf(model, str(path), type="f16")
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["model.gguf"]


@pytest.mark.parametrize(("factor", "original", "low", "high"), [(32, 8192, 1, 4), (8, 4096, 2, 6)])
def test_the_blend_of_llama_3_comes_back_from_its_divisors(factor, original, low, high, tmp_path):
    config = tiny_configs()["llama"]
    config.head_dim = 64
    config.max_position_embeddings = 16 * original
    config.rope_parameters = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": factor}
    config.rope_parameters |= {"original_max_position_embeddings": original}
    config.rope_parameters |= {"low_freq_factor": low, "high_freq_factor": high}
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(tmp_path / "model")
    _C.save_gguf(_C.load_model(str(tmp_path / "model")), str(tmp_path / "x.gguf"), type="f32")
    _C.save_model(_C.load_model(str(tmp_path / "x.gguf")), str(tmp_path / "back"))
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
    found = back.config.rope_parameters
    assert found["rope_type"] == "llama3"
    # Only the limits original / low and original / high matter.
    assert found["factor"] == factor
    for limit, wanted in (("low_freq_factor", low), ("high_freq_factor", high)):
        ratio = found["original_max_position_embeddings"] / found[limit]
        assert ratio == pytest.approx(original / wanted, rel=1e-3)
    ids = torch.randint(0, config.vocab_size, (1, 40))
    positions = torch.arange(0, 40 * 300, 300)[None]
    with torch.no_grad():
        ours = back(ids, position_ids=positions).logits
        torch.testing.assert_close(
            ours, model(ids, position_ids=positions).logits, atol=1e-4, rtol=0
        )
