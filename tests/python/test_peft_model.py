"""The wrapper: what it freezes, switches, refuses, and what it writes and reads."""

import copy
import io
import json
import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import budwood
from budwood.version_check import check_torch_version


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(8, 12)
        self.norm = nn.LayerNorm(12)
        self.down = nn.Linear(12, 8)

    def forward(self, x):
        return x + self.down(torch.relu(self.norm(self.up(x))))


class Net(nn.Module):
    """No transformers model: budwood takes any torch module."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def net():
    torch.manual_seed(0)
    return Net()


def config(**fields):
    return budwood.LoraConfig(
        **{"r": 2, "lora_alpha": 4, "target_modules": ["up", "down"], **fields}
    )


def adapted(**fields):
    torch.manual_seed(1)
    model = budwood.get_peft_model(net(), config(**fields))
    return randomised(model)


def randomised(model, std=0.3):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=std)
    return model


X = torch.randn(5, 8, generator=torch.Generator().manual_seed(3))


def trainable(model):
    return {n for n, p in model.named_parameters() if p.requires_grad}


def test_only_adapters_are_trainable_and_every_one_gets_a_gradient():
    model = adapted()
    assert all("lora_" in n for n in trainable(model))
    assert len(trainable(model)) == 8
    model(X).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)


def test_training_leaves_the_base_bytes_alone():
    model = adapted()
    base = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    losses = []
    for _ in range(30):
        loss = (model(X) - 1).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    assert all(torch.equal(p, base[n]) for n, p in model.named_parameters() if n in base)


@pytest.mark.parametrize(
    ("bias", "wanted"),
    [
        ("lora_only", {"up.base_layer.bias", "down.base_layer.bias"}),
        ("all", {"up.base_layer.bias", "down.base_layer.bias", "norm.bias", "head.bias"}),
    ],
)
def test_base_biases_are_trained_saved_and_put_back_when_disabled(bias, wanted, tmp_path):
    base = net()
    model = adapted(bias=bias)
    found = {n for n in trainable(model) if "lora_" not in n}
    assert found
    assert all(any(n.endswith(w) for w in wanted) for n in found)
    y = model(X)
    with model.disable_adapter():
        assert torch.equal(model(X), base(X))
    assert torch.equal(model(X), y)
    model.save_pretrained(tmp_path)
    again = budwood.PeftModel.from_pretrained(net(), tmp_path)
    assert torch.equal(again(X), y)
    model.add_adapter("plain", config())
    model.set_adapter("plain")
    # An adapter that is still zero runs through our own product: torch's to rounding.
    torch.testing.assert_close(model(X), base(X), rtol=1e-6, atol=1e-6)
    model.save_pretrained(tmp_path / "both")
    again = budwood.PeftModel.from_pretrained(net(), tmp_path / "both")
    assert torch.equal(again(X), y)
    with pytest.raises(budwood.Error, match="trains base biases already"):
        model.add_adapter("third", config(bias=bias))
    model.set_adapter("default")
    assert torch.equal(model(X), y)
    assert torch.equal(model.unload()(X), base(X))


def test_modules_to_save_are_trained_as_copies(tmp_path):
    base = net()
    model = adapted(modules_to_save=["head"])
    names = model.state_dict()
    assert "base_model.model.head.original_module.weight" in names
    assert "base_model.model.head.modules_to_save.default.weight" in names
    assert torch.equal(model.get_base_model().head.original_module.weight, base.head.weight)
    y = model(X)
    with model.disable_adapter():
        assert torch.equal(model(X), base(X))
    assert model.modules_to_save == {"head"}
    model.save_pretrained(tmp_path)
    assert "base_model.model.head.weight" in load_file(tmp_path / "adapter_model.safetensors")
    again = budwood.PeftModel.from_pretrained(net(), tmp_path, is_trainable=True)
    assert torch.equal(again(X), y)
    assert trainable(again) == trainable(model)
    merged = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(merged(X), y)
    assert type(merged.head) is nn.Linear
    model.add_adapter("other", config(modules_to_save=["head"]))
    with pytest.raises(budwood.Error, match="one copy of a module can be active"):
        model.set_adapter(["default", "other"])
    assert model.active_adapter == "default"
    assert torch.equal(model.unload()(X), base(X))


def test_adapters_are_added_switched_and_deleted():
    model = adapted()
    first = model(X)
    model.add_adapter("second", config(r=3, target_modules=["down"]))
    assert model.active_adapters == ["default"]
    assert torch.equal(model(X), first)
    assert not any("second" in n for n in trainable(model))
    model.set_adapter("second")
    assert model.active_adapter == "second"
    assert {"second" in n for n in trainable(model)} == {True}
    randomised(model)
    second = model(X)
    model.set_adapter(["default", "second"], inference_mode=True)
    assert not trainable(model)
    assert not torch.equal(model(X), second)
    model.set_adapter("second")
    with pytest.warns(UserWarning, match="'default' is active now"):
        model.delete_adapter("second")
    assert torch.equal(model(X), first)
    assert list(model.peft_config) == ["default"]
    assert not any("second" in n for n in model.state_dict())


def test_disabling_nests():
    model = adapted()
    base, y = net()(X), model(X)
    with model.disable_adapter():
        with model.disable_adapter():
            assert torch.equal(model(X), base)
        assert torch.equal(model(X), base)
    assert torch.equal(model(X), y)


def test_unload_gives_the_base_back_and_a_second_injection_works():
    model = adapted()
    model.merge_adapter()
    plain = model.unload()
    assert list(plain.state_dict()) == list(net().state_dict())
    assert torch.equal(plain(X), net()(X))
    assert budwood.get_peft_model(plain, config()).active_adapter == "default"


def test_merge_and_unload_of_chosen_adapters():
    model = adapted()
    y = model(X)
    model.add_adapter("second", config())
    model.set_adapter("second")
    randomised(model)
    plain = model.merge_and_unload(adapter_names=["default"], safe_merge=True)
    torch.testing.assert_close(plain(X), y)
    assert not any("lora" in n for n in plain.state_dict())


def test_a_layer_that_stands_in_two_places_is_adapted_in_both():
    base = nn.ModuleDict({"a": nn.Linear(8, 8)})
    base["b"] = base["a"]
    model = budwood.get_peft_model(base, config(target_modules=["a"]))
    slots = model.get_base_model()
    assert slots["a"] is slots["b"]
    plain = model.unload()
    assert plain["a"] is plain["b"]
    assert type(plain["a"]) is nn.Linear


def test_the_printed_counts(capsys):
    adapted().print_trainable_parameters()
    text = capsys.readouterr().out
    assert text == "trainable params: 160 || all params: 659 || trainable%: 24.2792\n"


def test_the_report_names_every_place():
    report = adapted(modules_to_save=["head"], bias="all").reports["default"]
    places = {(p.path, p.kind): p for p in report.places}
    assert places["layers.0.up", "lora"].parameters == 2 * (8 + 12)
    assert places["head", "copy"].parameters == 27
    assert places["layers.1.norm.bias", "bias"].parameters == 12
    assert sum(p.parameters for p in report.places) == report.trainable
    assert "layers.1.down  lora  r=2  40" in str(report)


def test_attributes_of_the_model_are_reached():
    model = adapted()
    assert model.head is model.get_base_model().head
    assert model.base_model.model is model.get_base_model()
    with pytest.raises(AttributeError, match="nothing_like_this"):
        _ = model.nothing_like_this


def test_copies_and_pickles_are_independent():
    model = adapted()
    for other in (copy.deepcopy(model), torch.load(pickled(model), weights_only=False)):
        assert torch.equal(other(X), model(X))
        randomised(other)
        assert not torch.equal(other(X), model(X))


def pickled(model):
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    return stream


def test_all_tensor_faults_are_one_error_and_the_model_is_as_it_was(tmp_path):
    adapted().save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    prefix = "base_model.model.layers."
    del tensors[prefix + "0.up.lora_A.weight"]
    tensors[prefix + "0.down.lora_B.weight"] = torch.zeros(3, 3)
    tensors[prefix + "1.up.lora_B.weight"][0, 0] = float("nan")
    tensors[prefix + "7.up.lora_A.weight"] = torch.zeros(2, 8)
    tensors["budwood.note"] = torch.zeros(1)
    save_file(tensors, file)
    base = net()
    with pytest.raises(budwood.Error) as caught:
        budwood.PeftModel.from_pretrained(base, tmp_path)
    for fault in (
        "4 tensors do not fit",
        "missing layers.0.up.lora_A.weight [2, 8]",
        "layers.0.down.lora_B.weight has shape [3, 3], the model wants [8, 2]",
        "layers.1.up.lora_B.weight holds a value that is not finite",
        "unknown layers.7.up.lora_A.weight [2, 8]",
    ):
        assert fault in str(caught.value)
    assert "budwood.note" not in str(caught.value)
    assert list(base.state_dict()) == list(net().state_dict())
    assert all(p.requires_grad for p in base.parameters())
    model = adapted()
    y = model(X)
    with pytest.raises(budwood.Error, match="4 tensors do not fit adapter 'second'"):
        model.load_adapter(tmp_path, "second")
    assert list(model.peft_config) == ["default"]
    assert torch.equal(model(X), y)


def test_sixteen_bit_files_load_into_fp32_adapters(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({n: t.bfloat16() for n, t in load_file(file).items()}, file)
    again = budwood.PeftModel.from_pretrained(net(), tmp_path)
    assert all(p.dtype == torch.float32 for p in again.parameters())
    torch.testing.assert_close(again(X), model(X), rtol=0.02, atol=0.02)


def test_what_is_saved_is_a_folder_of_peft(tmp_path):
    model = adapted(task_type=None)
    model.save_pretrained(tmp_path / "new")
    fields = json.loads((tmp_path / "new" / "adapter_config.json").read_text())
    assert fields["peft_type"] == "LORA"
    assert fields["inference_mode"] is True
    assert sorted(fields["target_modules"]) == ["down", "up"]
    assert fields["auto_mapping"]["base_model_class"] == "Net"
    assert model.peft_config["default"].inference_mode is False
    assert sorted(os.listdir(tmp_path / "new")) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    card = (tmp_path / "new" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: peft\n")


def test_saving_again_replaces_the_adapter_and_keeps_other_files(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("mine")
    (tmp_path / "optimizer.pt").write_text("state")
    randomised(model)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"
    assert (tmp_path / "optimizer.pt").read_text() == "state"
    assert torch.equal(budwood.PeftModel.from_pretrained(net(), tmp_path)(X), model(X))
    model.save_pretrained(tmp_path, safe_serialization=False)
    assert sorted(p.name for p in tmp_path.glob("adapter_*")) == [
        "adapter_config.json",
        "adapter_model.bin",
    ]
    assert torch.equal(budwood.PeftModel.from_pretrained(net(), tmp_path)(X), model(X))


@pytest.mark.parametrize("point", range(1, 12, 2))
def test_a_killed_save_leaves_a_whole_adapter_or_none(tmp_path, point):
    program = textwrap.dedent(
        f"""
        import os, signal, sys
        sys.path.insert(0, {os.path.dirname(__file__)!r})
        from test_peft_model import adapted, randomised
        model = adapted()
        calls = 0
        def count(event, args):
            global calls
            if event in ("open", "os.rename", "os.remove", "os.mkdir"):
                calls += str(args[0]).startswith({str(tmp_path)!r})
                if calls == {point}:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(count)
        model.save_pretrained({str(tmp_path / "adapter")!r})
        """
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ended.returncode in (0, -signal.SIGKILL), ended.stderr
    if (tmp_path / "adapter").exists():
        budwood.PeftModel.from_pretrained(net(), tmp_path / "adapter")
    else:
        assert ended.returncode == -signal.SIGKILL


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda m: budwood.get_peft_model(m, config()), "is a PeftModel already"),
        (
            lambda m: budwood.get_peft_model(m.get_base_model(), config()),
            r"has adapters \['default'\]",
        ),
        (lambda m: m.add_adapter("default", config()), "'default' is already attached"),
        (lambda m: m.add_adapter("a.b", config()), "found 'a.b'"),
        (lambda m: m.add_adapter("../x", config()), "found '../x'"),
        (lambda m: m.add_adapter("b", config(target_modules=["nope"])), "nope"),
        (lambda m: m.add_adapter("b", config(target_modules=["up", "nope"])), "nope"),
        (
            lambda m: m.add_adapter("b", config(target_modules=["norm"])),
            r"layers\.0\.norm.*neither a Linear",
        ),
        (
            lambda m: m.add_adapter("b", config(modules_to_save=["nope"])),
            "'nope' matches no module",
        ),
        (lambda m: m.set_adapter("b"), r"no adapter named 'b' .*\['default'\]"),
        (lambda m: m.delete_adapter("b"), "no adapter named 'b'"),
        (lambda m: m.merge_adapter(["b"]), "no adapter named 'b'"),
        (lambda m: m.save_pretrained("x", selected_adapters=["b"]), "no adapter named 'b'"),
        (lambda m: m.save_pretrained(__file__), "is a file"),
        (lambda m: m.load_adapter("./missing", "b"), "no folder './missing'"),
        (lambda m: m.load_adapter(os.path.dirname(__file__), "b"), "no adapter_config.json"),
        (lambda m: m(X, adapter_names=["nope"] * len(X)), "no adapter named 'nope'"),
        (lambda m: m.push_to_hub("me/it"), "upload_folder"),
        (
            lambda m: m.gradient_checkpointing_enable(),
            "has no method gradient_checkpointing_enable",
        ),
        (lambda m: m.add_weighted_adapter(["default"], [1.0], "c", "ties"), "'ties' is not implem"),
        (lambda m: m.add_weighted_adapter(["default"], [1.0, 2.0], "c"), "2 weights"),
        (
            lambda m: m.add_weighted_adapter(["default", "z"], [1.0, 2.0], "c"),
            "no adapter named 'z'",
        ),
        (
            lambda m: budwood.get_peft_model(net(), {"r": 2}),
            "wants a configuration of budwood or peft, found builtins.dict",
        ),
    ],
)
def test_what_cannot_be_done_is_refused_by_name_and_changes_nothing(act, message):
    model = adapted()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(budwood.Error, match=message):
        act(model)
    after = model.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert model.active_adapters == ["default"]
    assert list(model.peft_config) == ["default"]


def test_combinations_that_would_lose_something_are_refused():
    for fields in ({"lora_bias": True}, {"bias": "all"}, {"modules_to_save": ["head"]}):
        with pytest.raises(budwood.Error, match=next(iter(fields))):
            adapted(**fields).add_weighted_adapter(["default"], [1.0], "c")
    model = adapted()
    model.add_adapter("b", config(r=3))
    with pytest.raises(budwood.Error, match="equal rank"):
        model.add_weighted_adapter(["default", "b"], [1.0, 1.0], "c", "linear")


def test_the_inner_layer_of_multihead_attention_is_refused():
    base = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2)})
    with pytest.raises(budwood.Error, match=r"attention\.out_proj.*neither a Linear"):
        budwood.get_peft_model(base, config(target_modules=["out_proj"]))


def test_deleting_or_merging_at_the_wrong_moment_is_refused():
    model = adapted()
    model.merge_adapter()
    with pytest.raises(budwood.Error, match="unmerge it first"):
        model.delete_adapter("default")
    model.unmerge_adapter()
    with model.disable_adapter(), pytest.raises(budwood.Error, match="disabled"):
        model.merge_adapter()


def test_a_config_of_peft_is_taken():
    peft = pytest.importorskip("peft")
    theirs = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["up", "down"])
    model = budwood.get_peft_model(net(), theirs)
    assert model.peft_config["default"].r == 2


def test_the_hub_is_asked_for_adapter_files_only(tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    model = adapted()
    model.save_pretrained(tmp_path)
    asked = {}

    def download(name, **arguments):
        asked.update(arguments, name=name)
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", download)
    again = budwood.PeftModel.from_pretrained(net(), "someone/adapter", revision="v2")
    assert torch.equal(again(X), model(X))
    assert asked["name"] == "someone/adapter"
    assert asked["revision"] == "v2"
    assert all("adapter_" in pattern for pattern in asked["allow_patterns"])


def test_a_pickle_that_is_no_dict_of_tensors_is_refused(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path, safe_serialization=False)
    torch.save([1, 2], tmp_path / "adapter_model.bin")
    with pytest.raises(budwood.Error, match="no dict of tensors"):
        budwood.PeftModel.from_pretrained(net(), tmp_path)
    torch.save({"x": net()}, tmp_path / "adapter_model.bin")
    with pytest.raises(budwood.Error, match="no pickle of tensors alone"):
        budwood.PeftModel.from_pretrained(net(), tmp_path)
    (tmp_path / "adapter_model.bin").unlink()
    with pytest.raises(budwood.Error, match=r"neither adapter_model\.safetensors nor"):
        budwood.PeftModel.from_pretrained(net(), tmp_path)


def test_another_torch_is_refused_in_one_line():
    check_torch_version("2.13.1+cpu", "2.13.0")
    with pytest.raises(ImportError, match=r"built against torch 2\.13\.0, but torch 2\.14\.1"):
        check_torch_version("2.14.1", "2.13.0")


def test_importing_budwood_imports_neither_peft_nor_transformers():
    program = "import sys, budwood; print({'peft', 'transformers'} & set(sys.modules))"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ended.stdout == "set()\n", ended.stderr


def test_the_model_is_pefts_for_whoever_imports_peft_later():
    program = textwrap.dedent(
        """
        import budwood, torch
        model = budwood.get_peft_model(
            torch.nn.Sequential(torch.nn.Linear(2, 2)),
            budwood.LoraConfig(target_modules=["0"], task_type="CAUSAL_LM"),
        )
        assert isinstance(model, budwood.PeftModelForCausalLM)
        import peft
        assert isinstance(model, peft.PeftModel) and isinstance(model, peft.PeftModelForCausalLM)
        assert isinstance(model, budwood.PeftModelForCausalLM)
        """
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
