"""Merges that are undone, killed and gone on with, and the base that an adapter remembers."""

import copy
import json
import os
import signal
import subprocess
import sys
import time

import peft
import pytest
import torch
import transformers
from safetensors import safe_open
from test_merge_files import make, weights_of
from test_methods import peft_config, randomise, tiny

import budwood
from budwood import _C


def folders(path):
    return path / "model", path / "adapter", path / "out"


@pytest.mark.parametrize("method", ["lora", "dora", "ia3", "saved_modules", "trained_tokens"])
@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_a_backup_restores_every_byte(method, dtype, tmp_path):
    make(tmp_path, "llama", peft_config(method, "llama"), torch.bfloat16)
    model, adapter, out = folders(tmp_path)
    budwood.merge_files(model, adapter, out, dtype=dtype, backup=True)
    opened = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert opened is not None
    report = budwood.unmerge_files(out, tmp_path / "back")
    assert report.source == "backup"
    assert report.restored
    assert (tmp_path / "back" / "config.json").read_bytes() == (model / "config.json").read_bytes()
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (
        model / "model.safetensors"
    ).read_bytes()
    assert not (tmp_path / "back" / "merge_backup.safetensors").exists()


def test_a_head_that_was_untied_is_tied_again(tmp_path):
    torch.manual_seed(0)
    base = tiny("llama")
    base.config.tie_word_embeddings = True
    base.tie_weights()
    base.save_pretrained(tmp_path / "model")
    config = peft.LoraConfig(r=2, target_modules=["lm_head"], task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    randomise(theirs)
    theirs.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    model, adapter, out = folders(tmp_path)
    budwood.merge_files(model, adapter, out, backup=True)
    assert "lm_head.weight" in weights_of(out) or (out / "model.safetensors").exists()
    for arguments in ({}, {"adapters": adapter, "base": model}):
        budwood.unmerge_files(out, tmp_path / "back", **arguments, overwrite=True)
        before, after = weights_of(model), weights_of(tmp_path / "back")
        assert before.keys() == after.keys()
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
        assert json.loads((tmp_path / "back" / "config.json").read_text())["tie_word_embeddings"]


def test_the_base_restores_every_bit_and_subtraction_almost(tmp_path):
    make(tmp_path, "llama", peft_config("lora", "llama"), torch.bfloat16)
    model, adapter, out = folders(tmp_path)
    budwood.merge_files(model, adapter, out, weights=[0.5])
    exact = budwood.unmerge_files(out, tmp_path / "exact", adapters=adapter, base=model)
    assert exact.source == "base"
    before = weights_of(model)
    for name, tensor in weights_of(tmp_path / "exact").items():
        assert torch.equal(tensor, before[name]), name
    close = budwood.unmerge_files(out, tmp_path / "close", adapters=adapter, weights=[0.5])
    assert close.source == "subtracted"
    assert 0 < close.error < 0.5
    for name, tensor in weights_of(tmp_path / "close").items():
        # Two roundings to bfloat16.
        merged = weights_of(out)[name].float().abs()
        bound = 2.0**-8 * (merged + before[name].float().abs()) + 1e-8
        assert ((tensor.float() - before[name].float()).abs() <= bound).all(), name
    with pytest.raises(budwood.Error, match="no backup: name the adapters"):
        budwood.unmerge_files(out, tmp_path / "no")
    make(tmp_path, "llama", peft_config("dora", "llama"), torch.bfloat16, name="dora")
    budwood.merge_files(model, tmp_path / "dora", tmp_path / "merged")
    with pytest.raises(budwood.Error, match="give the base, or merge with a backup"):
        budwood.unmerge_files(tmp_path / "merged", tmp_path / "no", adapters=tmp_path / "dora")
    assert not (tmp_path / "no").exists()


def test_a_thousand_cycles_leave_every_bit(tmp_path):
    make(tmp_path, "llama", peft_config("lora", "llama"), torch.bfloat16)
    base = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    before = {name: p.clone() for name, p in base.state_dict().items()}
    model = budwood.PeftModel.from_pretrained(base, tmp_path / "adapter")
    merged = None
    for _ in range(1000):
        model.merge_adapter()
        found = base.model.layers[0].self_attn.q_proj.weight
        assert merged is None or torch.equal(found, merged)
        merged = found.detach().clone()
        model.unmerge_adapter()
    after = base.state_dict()
    for name, tensor in before.items():
        key = name if name in after else name.replace(".weight", ".base_layer.weight")
        assert torch.equal(after[key], tensor), name
    loaded = _C.load_model(str(tmp_path / "model"), weights="dense", dtype="auto")
    _C.load_adapter(loaded, str(tmp_path / "adapter"))
    for _ in range(1000):
        _C.merge(loaded, ["default"])
        _C.unmerge(loaded)
    _C.detach(loaded, "default")
    _C.save_model(loaded, str(tmp_path / "cpp"), "auto", "", 10**9)
    stored = weights_of(tmp_path / "model")
    for name, tensor in weights_of(tmp_path / "cpp").items():
        assert torch.equal(tensor, stored[name]), name


def large(tmp_path):
    """A model whose merge takes a moment, in many shards."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
    )
    base = transformers.LlamaForCausalLM(config).bfloat16()
    base.save_pretrained(tmp_path / "model")
    settings = peft.LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(base, settings)
    randomise(theirs)
    theirs.save_pretrained(tmp_path / "adapter")


def test_a_killed_merge_goes_on_with_what_it_had(tmp_path):
    large(tmp_path)
    model, adapter, out = folders(tmp_path)
    shard = 6_000_000
    budwood.merge_files(model, adapter, tmp_path / "wanted", max_shard_size=shard)
    wanted = {f.name: f.read_bytes() for f in (tmp_path / "wanted").iterdir()}
    code = (
        "import sys, budwood; budwood.merge_files("
        "sys.argv[1], sys.argv[2], sys.argv[3], max_shard_size=int(sys.argv[4]), jobs=1)"
    )
    arguments = [sys.executable, "-c", code, *map(str, (model, adapter, out, shard))]
    process = subprocess.Popen(arguments)
    kept = []
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        kept = list(tmp_path.glob(".out.tmp-*/model-*.safetensors"))
        notes = list(tmp_path.glob(".out.tmp-*/merge_progress.json"))
        if len(kept) >= 5 and notes:
            os.kill(process.pid, signal.SIGKILL)
            break
    process.wait()
    assert not out.exists(), "the merge was over before it could be killed"
    (notes,) = tmp_path.glob(".out.tmp-*/merge_progress.json")
    done = json.loads(notes.read_text())["files"]
    inodes = {name: (notes.parent / name).stat().st_ino for name in done}
    assert len(done) >= 3
    report = budwood.merge_files(model, adapter, out, max_shard_size=shard, resume=True)
    found = {f.name: f.read_bytes() for f in out.iterdir()}
    assert found == wanted
    for name, inode in inodes.items():
        assert (out / name).stat().st_ino == inode, "a whole file was written again"
    assert len(report.merged) == 8 * 7
    assert not [f for f in tmp_path.iterdir() if f.name.startswith(".out")]


def test_other_inputs_begin_anew(tmp_path):
    make(tmp_path, "llama", peft_config("lora", "llama"), torch.bfloat16)
    model, adapter, out = folders(tmp_path)
    stale = tmp_path / f".out.tmp-{2**22 - 1}-1"
    stale.mkdir()
    notes = {"inputs": "others", "files": ["model.safetensors"], "merged": [], "replaced": []}
    (stale / "merge_progress.json").write_text(json.dumps(notes))
    (stale / "model.safetensors").write_bytes(b"nothing")
    budwood.merge_files(model, adapter, out, resume=True)
    budwood.merge_files(model, adapter, tmp_path / "wanted")
    name = "model.safetensors"
    assert (out / name).read_bytes() == (tmp_path / "wanted" / name).read_bytes()
    assert not [f for f in tmp_path.iterdir() if f.name.startswith(".out")]
    with pytest.raises(budwood.Error, match="exists already"):
        budwood.merge_files(model, adapter, out, resume=True)


def saved_by(side, model_folder, out, packed=None):
    """An adapter that Budwood saved, from C++ or from Python."""
    config = budwood.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    if side == "cpp":
        loaded = _C.load_model(str(packed or model_folder))
        _C.inject(loaded, config)
        _C.save_adapter(loaded, str(out))
    else:
        base = transformers.LlamaForCausalLM.from_pretrained(packed or model_folder)
        budwood.get_peft_model(base, config).save_pretrained(out)
    return out


@pytest.mark.parametrize("side", ["cpp", "python"])
def test_an_adapter_knows_its_base(side, tmp_path):
    config = tiny("llama").config
    for name in ("model", "other"):
        transformers.LlamaForCausalLM(config).bfloat16().save_pretrained(tmp_path / name)
    adapter = saved_by(side, tmp_path / "model", tmp_path / "adapter")
    with safe_open(adapter / "adapter_model.safetensors", "pt") as file:
        base = json.loads(file.metadata()["budwood.base"])
    assert len(base["weights"]) == 6
    assert base["weights"]["model.layers.0.mlp.down_proj"]["shape"] == [32, 48]
    report = budwood.merge_files(tmp_path / "model", adapter, tmp_path / "out")
    assert not report.warnings
    with pytest.raises(budwood.Error, match="trained on another model than"):
        budwood.merge_files(tmp_path / "other", adapter, tmp_path / "no")
    assert not (tmp_path / "no").exists()
    forced = budwood.merge_files(tmp_path / "other", adapter, tmp_path / "yes", force=True)
    assert any("another model" in warning for warning in forced.warnings)
    # fp32 of the same numbers is the same base; four bits of them are a form of it.
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    model.save_pretrained(tmp_path / "wide")
    assert not budwood.merge_files(tmp_path / "wide", adapter, tmp_path / "w").warnings
    _C.quantize_files(str(tmp_path / "model"), str(tmp_path / "packed"), format="nf4")
    for target in (tmp_path / "packed",):
        warnings = budwood.merge_files(target, adapter, tmp_path / "q").warnings
        assert any("holds the same weights as packed" in w for w in warnings)
    peft.PeftModel.from_pretrained(model, adapter)


@pytest.mark.parametrize("side", ["cpp", "python"])
def test_a_quantised_base_is_known_again_in_all_its_forms(side, tmp_path):
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(tiny("llama").config).bfloat16().save_pretrained(
        tmp_path / "model"
    )
    _C.quantize_files(str(tmp_path / "model"), str(tmp_path / "packed"), format="nf4")
    adapter = saved_by(side, tmp_path / "model", tmp_path / "adapter", tmp_path / "packed")
    assert not budwood.merge_files(tmp_path / "packed", adapter, tmp_path / "same").warnings
    warnings = budwood.merge_files(tmp_path / "model", adapter, tmp_path / "plain").warnings
    assert any("was trained on a nf4 model" in warning for warning in warnings), warnings


def test_a_damaged_memory_of_the_base_is_named(tmp_path):
    from safetensors.torch import load_file, save_file

    torch.manual_seed(0)
    transformers.LlamaForCausalLM(tiny("llama").config).save_pretrained(tmp_path / "model")
    adapter = saved_by("python", tmp_path / "model", tmp_path / "adapter")
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    for text, message in (
        ("{", "budwood.base"),
        ('{"version": 9, "weights": {}}', "version 9"),
        ('{"version": 1, "weights": {"a": {}}}', "budwood.base"),
    ):
        save_file(tensors, file, {"format": "pt", "budwood.base": text})
        with pytest.raises(budwood.Error, match=message):
            budwood.merge_files(tmp_path / "model", adapter, tmp_path / "out")
