"""LoRA on convolutions beside HF PEFT."""

import copy

import peft
import pytest
import torch
from safetensors.torch import load_file
from test_methods import randomise
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

import budwood


class Convs(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.second = nn.Conv2d(8, 6, 1, bias=False)
        self.line = nn.Conv1d(6, 10, 3, padding="same")
        self.head = nn.Linear(10, 4)

    def forward(self, x):
        y = self.second(self.first(x).relu()).relu().flatten(2)
        return self.head(self.line(y).mean(2))


CONFIG = {"r": 3, "lora_alpha": 5, "target_modules": ["first", "second", "line", "head"]}


def images(n=4, size=8):
    torch.manual_seed(1)
    return torch.randn(n, 3, size, size)


def test_files_results_and_gradients_are_hf_pefts(tmp_path):
    base, x = Convs(), images()
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**CONFIG))
    randomise(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = budwood.PeftModel.from_pretrained(
        copy.deepcopy(base), tmp_path / "theirs", is_trainable=True
    )
    a, b = theirs(x), ours(x)
    assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)
    a.square().sum().backward()
    b.square().sum().backward()
    wanted = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        if p.requires_grad:
            assert torch.allclose(p.grad, wanted[name].grad, rtol=1e-4, atol=1e-5), name
    ours.save_pretrained(tmp_path / "ours")
    first, second = (
        load_file(tmp_path / n / "adapter_model.safetensors") for n in ("theirs", "ours")
    )
    assert first.keys() == second.keys()
    for key in first:
        assert torch.equal(first[key], second[key]), key


def test_one_seed_gives_hf_pefts_adapter():
    states = []
    for library in (peft, budwood):
        base = Convs()
        torch.manual_seed(9)
        model = library.get_peft_model(base, library.LoraConfig(**CONFIG))
        states.append([p for p in model.parameters() if p.requires_grad])
    for a, b in zip(*states, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("lora_bias", [False, True])
def test_merge_and_exact_unmerge(lora_bias):
    base, x = Convs(), images()
    config = {**CONFIG, "target_modules": ["first", "line", "head"], "lora_bias": lora_bias}
    ours = budwood.get_peft_model(copy.deepcopy(base), budwood.LoraConfig(**config))
    randomise(ours)
    wanted = ours(x)
    ours.merge_adapter()
    assert torch.allclose(ours(x), wanted, rtol=1e-5, atol=1e-6)
    with ours.disable_adapter():
        assert torch.equal(ours(x), base(x))
    ours.unmerge_adapter()
    assert torch.allclose(ours(x), wanted)
    merged = ours.merge_and_unload()
    assert type(merged.first) is nn.Conv2d
    assert torch.allclose(merged(x), wanted, rtol=1e-5, atol=1e-6)


def test_dilation_and_other_paddings():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Conv2d(3, 4, 3, dilation=2, padding=2, padding_mode="reflect"))
    ours = budwood.get_peft_model(
        copy.deepcopy(base), budwood.LoraConfig(r=2, target_modules=["0"])
    )
    randomise(ours)
    x = images(size=10)
    wanted = ours(x)
    assert not torch.allclose(wanted, base(x))
    ours.merge_adapter()
    assert torch.allclose(ours(x), wanted, rtol=1e-5, atol=1e-6)


def test_rows_with_different_adapters():
    base, x = Convs(), images()
    ours = budwood.get_peft_model(base, budwood.LoraConfig(**CONFIG), adapter_name="a")
    ours.add_adapter("b", budwood.LoraConfig(**CONFIG))
    for p in ours.parameters():
        p.requires_grad_(True)
    randomise(ours)
    names = ["a", "b", "__base__", "b"]
    found = ours(x, adapter_names=names)
    for i, name in enumerate(names):
        if name == "__base__":
            with ours.disable_adapter():
                wanted = ours(x[i : i + 1])
        else:
            ours.set_adapter(name)
            wanted = ours(x[i : i + 1])
        assert torch.allclose(found[i : i + 1], wanted, rtol=1e-4, atol=1e-5)


class Grouped(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.flat = nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=2)
        self.deep = nn.Conv3d(8, 6, (1, 3, 3), padding=(0, 1, 1), groups=2, bias=False)

    def forward(self, x):
        return self.deep(self.flat(x).relu().unsqueeze(2)).flatten(1)


def test_grouped_convolutions_are_hf_pefts_and_not_merged(tmp_path):
    torch.manual_seed(1)
    base, x = Grouped(), torch.randn(2, 4, 6, 6)
    config = {"r": 4, "lora_alpha": 5, "target_modules": ["flat", "deep"]}
    with pytest.warns(UserWarning, match="groups"):
        theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**config))
    randomise(theirs)
    theirs.save_pretrained(tmp_path)
    ours = budwood.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, is_trainable=True)
    assert torch.allclose(theirs(x), ours(x), rtol=1e-5, atol=1e-6)
    ours(x).square().sum().backward()
    theirs(x).square().sum().backward()
    wanted = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        if p.requires_grad:
            assert torch.allclose(p.grad, wanted[name].grad, rtol=1e-4, atol=1e-5), name
    before = ours(x)
    with pytest.raises(budwood.Error, match="groups=2"):
        ours.merge_adapter()
    assert torch.equal(ours(x), before)
    with pytest.raises(budwood.Error, match="multiple of it, found r=3"):
        budwood.get_peft_model(Grouped(), budwood.LoraConfig(r=3, target_modules=["flat"]))


def test_a_deep_convolution_is_merged():
    torch.manual_seed(2)
    base, x = nn.Sequential(nn.Conv3d(3, 4, 3, padding=1)), torch.randn(2, 3, 4, 4, 4)
    ours = budwood.get_peft_model(base, budwood.LoraConfig(r=2, target_modules=["0"]))
    randomise(ours)
    wanted = ours(x)
    assert torch.allclose(ours.merge_and_unload()(x), wanted, rtol=1e-5, atol=1e-5)


def test_what_cannot_be_is_named():
    transposed = nn.Sequential(nn.ConvTranspose2d(2, 2, 3))
    with pytest.raises(budwood.Error, match="ConvTranspose2d"):
        budwood.get_peft_model(transposed, budwood.LoraConfig(target_modules=["0"]))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"use_dora": True}, "use_dora=True"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"target_modules": ["conv", "table"]}, "a token table among the targets"),
    ],
)
def test_what_is_not_plain_lora_is_refused_on_a_convolution(options, named):
    model = nn.ModuleDict({"conv": nn.Conv2d(4, 4, 3), "table": nn.Embedding(5, 4)})
    before = list(model.modules())
    with pytest.raises(budwood.Error, match=f"conv: a convolution takes plain LoRA.*{named}"):
        budwood.get_peft_model(model, budwood.LoraConfig(**{"target_modules": ["conv"], **options}))
    assert list(model.modules()) == before
    assert all(p.requires_grad for p in model.parameters())


def test_a_vision_transformer_with_its_patches():
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=8,
        patch_size=4,
        num_labels=3,
    )
    base = ViTForImageClassification(config).eval()
    targets = [
        name
        for name, module in base.named_modules()
        if isinstance(module, nn.Conv2d) or name.endswith("0.output.dense")
    ]
    config = {"r": 2, "target_modules": targets, "modules_to_save": ["classifier"]}
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**config))
    ours = budwood.get_peft_model(copy.deepcopy(base), budwood.LoraConfig(**config))
    randomise(theirs)
    randomise(ours)
    x = images(2)
    with torch.no_grad():
        assert torch.allclose(theirs(x).logits, ours(x).logits, rtol=1e-4, atol=1e-5)
