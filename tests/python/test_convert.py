"""LoRA adapters in the files of other libraries, beside gguf, mlx-lm's layout and `adapters`."""

import copy
import json

import gguf
import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_adapterhub import AUTO, DATA, expected
from test_methods import peft_config, randomise
from test_methods import tiny as tiny_model
from test_save_gguf import config_of, interleaved, tensors_of

import budwood
from budwood import _C

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """(folder, model) of a tiny Llama with heads of 8."""
    torch.manual_seed(1)
    config = config_of("llama")
    config.tie_word_embeddings = False
    model = transformers.AutoModelForCausalLM.from_config(config)
    folder = tmp_path_factory.mktemp("base") / "model"
    model.save_pretrained(folder)
    return folder, model


def adapt(model, folder, **options):
    """A saved adapter of HF PEFT, and {path: its change of weights in fp64}."""
    settings = {"r": 4, "lora_alpha": 6, "target_modules": ALL, "task_type": "CAUSAL_LM"} | options
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**settings))
    torch.manual_seed(5)
    randomise(theirs)
    theirs.save_pretrained(folder)
    return changes_of(theirs)


def changes_of(theirs):
    changes = {}
    for path, module in theirs.named_modules():
        path = path.removeprefix("base_model.model.")
        if hasattr(module, "lora_A") and "default" in module.lora_A:
            a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
        elif hasattr(module, "lora_embedding_A") and "default" in module.lora_embedding_A:
            a, b = module.lora_embedding_A["default"], module.lora_embedding_B["default"]
        else:
            continue
        changes[path] = (module.scaling["default"] * (b.double() @ a.double())).detach()
    return changes


def opened(model, folder):
    """The same of a folder, as HF PEFT opens it."""
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), folder)
    return theirs, changes_of(theirs)


def same(found, wanted):
    assert found.keys() == wanted.keys()
    for path, change in wanted.items():
        assert torch.allclose(found[path], change, rtol=1e-6, atol=1e-7 * change.abs().max()), path


KINDS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.mlp.up_proj": 3}},
    "table": {"target_modules": [*ALL, "embed_tokens", "lm_head"]},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("to", ["mlx", "gguf"])
def test_there_and_back_keeps_every_change(to, kind, base, tmp_path):
    folder, model = base
    wanted = adapt(model, tmp_path / "adapter", **KINDS[kind])
    there = tmp_path / ("there.gguf" if to == "gguf" else "there")
    report = budwood.convert(tmp_path / "adapter", there, to=to, model=folder)
    assert report.from_format == "peft"
    assert report.modules == len(wanted)
    back = budwood.convert(there, tmp_path / "back", model=folder)
    assert back.from_format == to
    same(opened(model, tmp_path / "back")[1], wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpp_finds_names_shapes_rows_and_alpha(kind, base, tmp_path):
    folder, model = base
    wanted = adapt(model, tmp_path / "adapter", **KINDS[kind])
    out = tmp_path / "a.gguf"
    budwood.convert(tmp_path / "adapter", out, to="gguf", model=folder)
    keys = {k: f.contents() for k, f in gguf.GGUFReader(out).fields.items()}
    assert keys["general.architecture"] == "llama"
    assert keys["general.type"] == "adapter"
    assert keys["adapter.type"] == "lora"
    alpha = keys["adapter.lora.alpha"]
    if kind == "plain":
        assert alpha == 6.0
    if kind == "rslora":
        assert alpha == pytest.approx(6 * 2.0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 3)
    tensors = tensors_of(out)
    assert len(tensors) == 2 * len(wanted)
    for path, change in wanted.items():
        name = names.get_name(path + ".weight", try_suffixes=(".weight",))
        a = torch.tensor(np.array(tensors[name + ".lora_a"].data)).double()
        b = torch.tensor(np.array(tensors[name + ".lora_b"].data)).double()
        if name == "token_embd.weight":
            a = a.t()  # stored as [vocabulary, r]
        rank = b.shape[1]
        assert a.shape[0] == rank
        found = alpha / rank * (b @ a)
        if "attn_q" in name or "attn_k" in name:
            change = torch.tensor(interleaved(change.numpy(), 8))
        assert torch.allclose(found, change, rtol=1e-5, atol=1e-7), path


def test_mlx_finds_its_layout_and_one_scale(base, tmp_path):
    _, model = base
    wanted = adapt(model, tmp_path / "adapter", **KINDS["patterns"])
    budwood.convert(tmp_path / "adapter", tmp_path / "mlx", to="mlx")
    config = json.loads((tmp_path / "mlx" / "adapter_config.json").read_text())
    assert config["fine_tune_type"] == "lora"
    assert config["num_layers"] == -1
    parameters = config["lora_parameters"]
    assert parameters["rank"] == 4
    assert sorted(wanted) == parameters["keys"]
    tensors = load_file(tmp_path / "mlx" / "adapters.safetensors")
    with safe_open(tmp_path / "mlx" / "adapters.safetensors", "pt") as file:
        assert not file.metadata()
    for path, change in wanted.items():
        a, b = tensors[f"{path}.lora_a"], tensors[f"{path}.lora_b"]
        assert list(a.shape) == [change.shape[1], 4]
        assert list(b.shape) == [4, change.shape[0]]
        found = parameters["scale"] * (b.double().t() @ a.double().t())
        assert torch.allclose(found, change, rtol=1e-6, atol=1e-7)


def test_the_golden_adapter_of_mlx(tmp_path):
    folder = tmp_path / "mlx"
    folder.mkdir()
    save_file(
        {
            "proj.lora_a": torch.tensor([[1.0], [0.0], [-1.0]]),
            "proj.lora_b": torch.tensor([[0.5, -1.0]]),
        },
        folder / "adapters.safetensors",
    )
    config = {"fine_tune_type": "lora", "num_layers": 16}
    config["lora_parameters"] = {"rank": 1, "scale": 2.0, "dropout": 0.0}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    model = tmp_path / "model"
    model.mkdir()
    save_file({"proj.weight": torch.tensor([[1.0, 2, 3], [4, 5, 6]])}, model / "model.safetensors")
    budwood.merge_files(model, folder, tmp_path / "out")
    merged = load_file(tmp_path / "out" / "model.safetensors")["proj.weight"]
    assert merged.tolist() == [[2, 2, 2], [2, 5, 8]]


def test_dora_goes_to_mlx_and_back_but_not_to_gguf(base, tmp_path):
    folder, model = base
    adapt(model, tmp_path / "adapter", use_dora=True)
    before, _ = opened(model, tmp_path / "adapter")
    budwood.convert(tmp_path / "adapter", tmp_path / "mlx", to="mlx")
    assert json.loads((tmp_path / "mlx" / "adapter_config.json").read_text())["fine_tune_type"] == (
        "dora"
    )
    budwood.convert(tmp_path / "mlx", tmp_path / "back")
    after, _ = opened(model, tmp_path / "back")
    ids = torch.arange(10).reshape(1, 10)
    with torch.no_grad():
        assert torch.allclose(before(ids).logits, after(ids).logits, rtol=1e-5, atol=1e-5)
    with pytest.raises(budwood.Error, match="DoRA's magnitude has no place"):
        budwood.convert(tmp_path / "adapter", tmp_path / "no.gguf", to="gguf", model=folder)
    assert not (tmp_path / "no.gguf").exists()


@pytest.mark.parametrize("to", ["mlx", "gguf"])
def test_adapters_of_other_libraries_are_merged(to, base, tmp_path):
    folder, model = base
    adapt(model, tmp_path / "adapter", lora_alpha=8)
    there = tmp_path / ("there.gguf" if to == "gguf" else "there")
    budwood.convert(tmp_path / "adapter", there, to=to, model=folder)
    budwood.merge_files(folder, tmp_path / "adapter", tmp_path / "wanted")
    budwood.merge_files(folder, there, tmp_path / "found")
    wanted = load_file(tmp_path / "wanted" / "model.safetensors")
    for name, tensor in load_file(tmp_path / "found" / "model.safetensors").items():
        assert torch.equal(tensor, wanted[name]), name


HUB = [
    (folder.parent.name, folder.name)
    for folder in sorted(DATA.glob("*/*"))
    if folder.name.startswith("lora")
    # With DoRA the library scales the biases of BERT along.
    and (folder.parent.name, folder.name) != ("bert", "lora_dora")
]


@pytest.mark.parametrize(("family", "method"), HUB)
def test_adapterhubs_lora_gives_its_logits_in_hf_peft(family, method, tmp_path):
    ids, logits = expected(family, method)
    report = budwood.convert(DATA / family / method, tmp_path / "peft")
    assert report.from_format == "adapterhub"
    model = AUTO[family].from_pretrained(DATA / family / "base").eval()
    with torch.no_grad():
        assert not torch.allclose(model(ids).logits, logits, atol=1e-3)
        theirs = peft.PeftModel.from_pretrained(model, tmp_path / "peft").eval()
        assert torch.allclose(theirs(ids).logits, logits, rtol=1e-4, atol=1e-5)
    budwood.merge_files(DATA / family / "base", DATA / family / method, tmp_path / "merged")
    merged = AUTO[family].from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        assert torch.allclose(merged(ids).logits, logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("family", "method"), HUB)
def test_and_back_with_its_own_keys(family, method, tmp_path):
    model = DATA / family / "base"
    budwood.convert(DATA / family / method, tmp_path / "peft")
    budwood.convert(tmp_path / "peft", tmp_path / "shoot", to="adapterhub", model=model)
    theirs = torch.load(DATA / family / method / "pytorch_adapter.bin", weights_only=True)
    ours = load_file(tmp_path / "shoot" / "adapter.safetensors")
    assert set(ours) == set(theirs)
    a = json.loads((DATA / family / method / "adapter_config.json").read_text())
    b = json.loads((tmp_path / "shoot" / "adapter_config.json").read_text())
    for key in ("selfattn_lora", "intermediate_lora", "output_lora", "use_dora", "leave_out"):
        assert a["config"][key] == b["config"][key], key
    if family != "gpt2":
        assert a["config"] == {**a["config"], **b["config"]}
        for name, tensor in theirs.items():
            assert torch.equal(ours[name], tensor), name
    budwood.convert(tmp_path / "shoot", tmp_path / "again")
    ids, logits = expected(family, method)
    plain = AUTO[family].from_pretrained(model)
    again = peft.PeftModel.from_pretrained(plain, tmp_path / "again").eval()
    with torch.no_grad():
        assert torch.allclose(again(ids).logits, logits, rtol=1e-4, atol=1e-5)


def test_adapterhubs_dora_on_layers_with_a_bias_is_another_function(tmp_path):
    folder, model = DATA / "bert" / "lora_dora", DATA / "bert" / "base"
    report = budwood.convert(folder, tmp_path / "unsure")
    assert any("bias" in warning for warning in report.warnings)
    with pytest.raises(budwood.Error, match="query: AdapterHub's DoRA scales the bias"):
        budwood.convert(folder, tmp_path / "out", model=model)
    with pytest.raises(budwood.Error, match="query: AdapterHub's DoRA scales the bias"):
        budwood.convert(tmp_path / "unsure", tmp_path / "out", to="adapterhub", model=model)
    assert not (tmp_path / "out").exists()


def test_what_a_format_cannot_hold_is_listed(base, tmp_path):
    folder, model = base
    adapt(model, tmp_path / "adapter")
    for method, message in (
        ("ia3", "pair of LoRA's factors.*\n.*IA3"),
        ("saved_modules", "trained whole"),
        ("trained_tokens", "single tokens"),
    ):
        theirs = peft.get_peft_model(tiny_model("llama"), peft_config(method, "llama"))
        theirs.save_pretrained(tmp_path / method)
        with pytest.raises(budwood.Error, match=message):
            budwood.convert(tmp_path / method, tmp_path / "out", to="mlx")
    with pytest.raises(budwood.Error, match="o_proj: the library has no LoRA at this place"):
        budwood.convert(tmp_path / "adapter", tmp_path / "out", to="adapterhub", model=folder)
    for wrong, message in (
        ({"to": "onnx"}, "unknown format 'onnx'; known: adapterhub, gguf, mlx, peft"),
        ({"to": "gguf"}, "needs the base model"),
        ({"to": "adapterhub"}, "needs the base model"),
    ):
        with pytest.raises(budwood.Error, match=message):
            budwood.convert(tmp_path / "adapter", tmp_path / "out", **wrong)
    with pytest.raises(budwood.Error, match="no adapter of a known format"):
        budwood.convert(folder, tmp_path / "out")
    with pytest.raises(budwood.Error, match="does not exist"):
        budwood.convert(tmp_path / "nothing", tmp_path / "out")
    other = tmp_path / "other"
    config = config_of("llama")
    config.intermediate_size = 128
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(other)
    with pytest.raises(budwood.Error, match=r"down_proj: the factors make \[64, 96\], the weight"):
        budwood.convert(tmp_path / "adapter", tmp_path / "out.gguf", to="gguf", model=other)
    assert not any(tmp_path.glob("out*"))
    (tmp_path / "out").mkdir()
    with pytest.raises(budwood.Error, match="exists already"):
        budwood.convert(tmp_path / "adapter", tmp_path / "out", to="mlx")
    budwood.convert(tmp_path / "adapter", tmp_path / "out", to="mlx", overwrite=True)


def test_damaged_files_are_named(base, tmp_path):
    folder, model = base
    adapt(model, tmp_path / "adapter")
    mlx = tmp_path / "mlx"
    budwood.convert(tmp_path / "adapter", mlx, to="mlx")
    tensors = load_file(mlx / "adapters.safetensors")
    first = sorted(tensors)[0]

    good = json.loads((mlx / "adapter_config.json").read_text())
    nan = {**tensors, first: torch.full_like(tensors[first], float("nan"))}
    for changed, config, message in (
        (tensors | {"x.weight": torch.ones(2)}, None, "x.weight.*no factor"),
        ({k: v for k, v in tensors.items() if k != first}, None, "do not make a pair"),
        (nan, None, "NaN"),
        (tensors, good | {"fine_tune_type": "full"}, "tuned whole"),
        (tensors, good | {"fine_tune_type": "dora"}, "fine_tune_type is dora, and m is missing"),
        (tensors, {"lora_parameters": {}}, "no number lora_parameters"),
    ):
        save_file(changed, mlx / "adapters.safetensors")
        (mlx / "adapter_config.json").write_text(json.dumps(config or good))
        with pytest.raises(budwood.Error, match=message):
            budwood.convert(mlx, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    good_gguf = tmp_path / "a.gguf"
    budwood.convert(tmp_path / "adapter", good_gguf, to="gguf", model=folder)
    whole = good_gguf.read_bytes()
    good_gguf.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(budwood.Error):
        budwood.convert(good_gguf, tmp_path / "out", model=folder)
    good_gguf.write_bytes(whole)
    with pytest.raises(budwood.Error, match="this adapter needs the base model"):
        budwood.convert(good_gguf, tmp_path / "out")
    loaded = _C.load_model(str(folder))
    _C.save_gguf(loaded, str(tmp_path / "model.gguf"), type="f32")
    with pytest.raises(budwood.Error, match="type is 'model', wanted 'adapter'"):
        budwood.convert(tmp_path / "model.gguf", tmp_path / "out", model=folder)
