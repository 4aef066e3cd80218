"""Folders of AdapterHub's library (tests/references/adapterhub/make.py), with its logits."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

import budwood
from budwood import _C

DATA = Path(__file__).parent / "data" / "adapterhub"
CASES = [
    (folder.parent.name, folder.name)
    for folder in sorted(DATA.glob("*/*"))
    if folder.name != "base" and not folder.name.startswith("lora")  # see test_convert.py
]
AUTO = {
    "llama": transformers.AutoModelForCausalLM,
    "gpt2": transformers.AutoModelForCausalLM,
    "bert": transformers.AutoModelForSequenceClassification,
}


def expected(family, method):
    tensors = load_file(DATA / family / method / "expected.safetensors")
    return tensors["ids"], tensors["logits"]


def python_model(family):
    return AUTO[family].from_pretrained(DATA / family / "base").eval()


def cpp_model(family):
    load = _C.load_bert if family == "bert" else _C.load_model
    model = load(str(DATA / family / "base"))
    model.eval()
    return model


def cpp_logits(model, family, ids):
    tokens = _C.TokenBatch.from_rows(ids)
    with torch.no_grad():
        if family == "bert":
            return model.classify(tokens)
        return model.logits(model.hidden(tokens)).view(*ids.shape, -1)


def stored(folder):
    """Tensors of such a folder, in either of its files."""
    if (folder / "adapter.safetensors").exists():
        return load_file(folder / "adapter.safetensors")
    return torch.load(folder / "pytorch_adapter.bin", weights_only=True)


@pytest.mark.parametrize(("family", "method"), CASES)
def test_a_folder_loads_in_cpp_and_goes_back(family, method, tmp_path):
    ids, wanted = expected(family, method)
    model = cpp_model(family)
    _C.load_adapter(model, str(DATA / family / method))
    model.eval()
    assert torch.allclose(cpp_logits(model, family, ids), wanted, rtol=1e-4, atol=2e-5)
    _C.save_adapterhub(model, str(tmp_path / "back"), "default")
    assert_same_folder(tmp_path / "back", DATA / family / method)


@pytest.mark.parametrize(("family", "method"), CASES)
def test_a_folder_loads_in_python_and_goes_back(family, method, tmp_path):
    ids, wanted = expected(family, method)
    model = budwood.PeftModel.from_pretrained(python_model(family), DATA / family / method).eval()
    with torch.no_grad():
        found = model(input_ids=ids).logits
    assert torch.allclose(found, wanted, rtol=1e-4, atol=2e-5)
    model.save_adapterhub(tmp_path / "back")
    assert_same_folder(tmp_path / "back", DATA / family / method)


def assert_same_folder(ours, theirs):
    found = {k.replace(".default.", ".NAME."): t for k, t in stored(ours).items()}
    # The library writes the tables of a prefix once more below each layer.
    wanted = {
        k.replace(".shoot.", ".NAME."): t
        for k, t in stored(theirs).items()
        if ".prefix_tuning.pool." not in k
    }
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert torch.equal(found[key].reshape(tensor.shape), tensor), key
    a, b = (json.loads((f / "adapter_config.json").read_text()) for f in (ours, theirs))
    assert a["hidden_size"] == b["hidden_size"]
    for key, value in b["config"].items():
        assert a["config"].get(key) == value, key


def test_a_bin_that_would_execute_is_refused(tmp_path):
    import os
    import pickle
    import shutil
    import zipfile

    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "executed"),))

    folder = tmp_path / "bad"
    shutil.copytree(DATA / "llama" / "seq_bn", folder)
    with zipfile.ZipFile(folder / "pytorch_adapter.bin", "w") as z:
        z.writestr("archive/data.pkl", pickle.dumps({"a": Bomb()}, protocol=2))
        z.writestr("archive/version", "3\n")
    for load in (
        lambda: _C.load_adapter(cpp_model("llama"), str(folder)),
        lambda: budwood.PeftModel.from_pretrained(python_model("llama"), folder),
    ):
        with pytest.raises(budwood.Error, match=r"pytorch_adapter\.bin"):
            load()
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": {"cross_adapter": True}}, "cross_adapter"),
        ({"config": {"inv_adapter": "nice"}}, "inv_adapter"),
        ({"config": {"architecture": "lora", "r": 8}}, "lora"),
        ({"config": {"non_linearity": "no-such"}}, "no-such"),
        ({"config": {"reduction_factor": 3}}, "shape"),
    ],
)
def test_what_cannot_be_is_named(change, message, tmp_path):
    import shutil

    folder = tmp_path / "bad"
    shutil.copytree(DATA / "llama" / "seq_bn", folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    config["config"].update(change["config"])
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(budwood.Error, match=message):
        _C.load_adapter(cpp_model("llama"), str(folder))


def test_a_folder_for_another_model_is_refused_by_name():
    with pytest.raises(budwood.Error, match=r"bert|roberta|layer|tensor"):
        _C.load_adapter(cpp_model("gpt2"), str(DATA / "llama" / "seq_bn"))
