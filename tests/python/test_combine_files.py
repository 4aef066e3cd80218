"""Several adapter folders into one, beside HF PEFT and float64 sums."""

import copy

import peft
import pytest
import torch
from safetensors.torch import load_file
from test_methods import batch, peft_config, randomise, tiny

import budwood

ONE = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]}
TWO = {"r": 2, "lora_alpha": 3, "use_rslora": True, "target_modules": ["v_proj", "down_proj"]}
SAME = {"r": 4, "lora_alpha": 2, "target_modules": ["q_proj", "v_proj"]}


def save(folder, base, **config):
    model = peft.get_peft_model(
        copy.deepcopy(base), peft.LoraConfig(task_type="CAUSAL_LM", **config)
    )
    randomise(model, seed=len(str(folder)))
    model.save_pretrained(folder)
    return model


def deltas(model):
    return {
        name.removeprefix("base_model.model."): module.get_delta_weight("default").double()
        for name, module in model.named_modules()
        if hasattr(module, "lora_A")
    }


def wanted_of(models, weights):
    total = {}
    for model, weight in zip(models, weights, strict=True):
        for path, delta in deltas(model).items():
            total[path] = total.get(path, 0) + weight * delta
    return total


def written(folder):
    tensors = load_file(folder / "adapter_model.safetensors")
    return {
        key.removeprefix("base_model.model.").removesuffix(".lora_A.weight"): (
            tensors[key.replace("lora_A", "lora_B")].double() @ tensors[key].double()
        )
        for key in tensors
        if "lora_A" in key
    }


@pytest.mark.parametrize("mode", ["cat", "svd"])
def test_exact_modes_are_the_weighted_sum(mode, tmp_path):
    base = tiny("llama")
    models = [save(tmp_path / "one", base, **ONE), save(tmp_path / "second", base, **TWO)]
    rank = {} if mode == "cat" else {"rank": 6}
    report = budwood.combine_files(
        [tmp_path / "one", tmp_path / "second"],
        tmp_path / "out",
        weights=[0.7, -1.2],
        mode=mode,
        **rank,
    )
    wanted = wanted_of(models, [0.7, -1.2])
    found = written(tmp_path / "out")
    assert found.keys() == wanted.keys()
    for path, delta in wanted.items():
        assert (found[path] - delta).norm() < 1e-6 * delta.norm(), path
    assert all(m.error < 1e-6 for m in report.modules)
    norms = {m.path: m.delta_norm for m in report.modules}
    assert norms == pytest.approx({p: d.norm().item() for p, d in wanted.items()}, rel=1e-6)
    # As a function, in HF PEFT and here.
    rows = batch("llama")
    with torch.no_grad():
        merged = copy.deepcopy(base)
        for path, delta in wanted.items():
            merged.get_submodule(path).weight += delta.float()
        a = merged(**rows).logits
        for library in (peft, budwood):
            model = library.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "out").eval()
            assert torch.allclose(model(**rows).logits, a, rtol=1e-4, atol=1e-5)


def test_svd_is_the_best_of_its_rank_and_linear_is_hf_pefts(tmp_path):
    base = tiny("llama")
    models = [save(tmp_path / "one", base, **ONE), save(tmp_path / "second", base, **SAME)]
    folders, weights = [tmp_path / "one", tmp_path / "second"], [0.7, -1.2]
    report = budwood.combine_files(folders, tmp_path / "svd", weights=weights, mode="svd", rank=3)
    for module in report.modules:
        s = torch.linalg.svdvals(wanted_of(models, weights)[module.path])
        best = (s[3:].square().sum() / s.square().sum()).sqrt().item()
        assert module.rank == 3
        assert module.error == pytest.approx(best, rel=1e-4)

    report = budwood.combine_files(folders, tmp_path / "linear", weights=weights, mode="linear")
    theirs = peft.PeftModel.from_pretrained(base, folders[0], adapter_name="a")
    theirs.load_adapter(folders[1], "b")
    theirs.add_weighted_adapter(["a", "b"], weights, "mixed", combination_type="linear")
    found = written(tmp_path / "linear")
    for name, module in theirs.named_modules():
        if hasattr(module, "lora_A"):
            path = name.removeprefix("base_model.model.")
            wanted = module.get_delta_weight("mixed").double()
            assert (found[path] - wanted).norm() < 1e-5 * wanted.norm()
    assert all(m.error > 0.1 for m in report.modules)  # cross terms, and it says so


def by_hand(parts, mode, density):
    if mode == "ties":
        kept = []
        for part in parts:
            bound = part.abs().flatten().sort(descending=True).values
            kept.append(part * (part.abs() >= bound[int(density * part.numel()) - 1]))
        parts = kept
    total = sum(parts)
    sign = torch.where(total >= 0, 1.0, -1.0).double()
    agree = [(p.sign() == sign).double() for p in parts]
    return sum(p * a for p, a in zip(parts, agree, strict=True)) / sum(agree).clamp(min=1)


def test_ties_is_its_formula_on_the_changes(tmp_path):
    base = tiny("llama")
    models = [save(tmp_path / "one", base, **ONE), save(tmp_path / "second", base, **SAME)]
    weights = [1.0, 0.5]
    budwood.combine_files(
        [tmp_path / "one", tmp_path / "second"], tmp_path / "out",
        weights=weights, mode="ties", density=0.3, rank=32,
    )  # fmt: skip
    found = written(tmp_path / "out")
    for path, delta in deltas(models[0]).items():
        parts = [delta * weights[0], deltas(models[1])[path] * weights[1]]
        wanted = by_hand(parts, "ties", 0.3)
        assert min(wanted.shape) <= 32  # nothing is cut off
        assert (found[path] - wanted).norm() < 1e-5 * wanted.norm(), path


def test_dare_is_right_on_average_and_by_seed(tmp_path):
    base = tiny("llama")
    models = [save(tmp_path / "one", base, **ONE), save(tmp_path / "second", base, **SAME)]
    folders = [tmp_path / "one", tmp_path / "second"]
    path = "model.layers.0.self_attn.v_proj"
    wanted = wanted_of(models, [1, 1])[path]
    total, count = 0, 60
    for seed in range(count):
        budwood.combine_files(
            folders, tmp_path / "out", mode="dare", density=0.5, rank=16, seed=seed, overwrite=True
        )
        total = total + written(tmp_path / "out")[path]
    # Each entry has the variance of its parts; the mean of 60 is near.
    assert (total / count - wanted).norm() < 0.25 * wanted.norm()
    first = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
    arguments = {"mode": "dare", "density": 0.5, "rank": 16, "overwrite": True}
    budwood.combine_files(folders, tmp_path / "out", seed=59, **arguments)
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == first
    budwood.combine_files(folders, tmp_path / "out", seed=1, **arguments)
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() != first
    budwood.combine_files(folders, tmp_path / "out", seed=1, **{**arguments, "mode": "dare_ties"})


def test_what_cannot_be_combined_is_named(tmp_path):
    base = tiny("llama")
    save(tmp_path / "one", base, **ONE)
    for name, method in (("dora", "dora"), ("ia3", "ia3"), ("rows", "trained_tokens"),
                         ("head", "saved_modules")):  # fmt: skip
        model = peft.get_peft_model(copy.deepcopy(base), peft_config(method, "llama"))
        model.save_pretrained(tmp_path / name)
    save(tmp_path / "less", base, **{**ONE, "r": 3})
    one, out = tmp_path / "one", tmp_path / "out"
    for folders, options, wanted in (
        (["one", "dora"], {}, "DoRA"),
        (["one", "ia3"], {}, "is IA3"),
        (["one", "rows"], {}, "rows of tokens"),
        (["one", "head"], {}, "lm_head.weight whole"),
        (["one", "less"], {"mode": "linear"}, "found 4 and 3 at"),
        (["one"], {"mode": "sum"}, "found 'sum'"),
        (["one"], {"mode": "cat", "rank": 3}, "svd takes a rank"),
        (["one"], {"mode": "ties", "density": 0.0}, "found 0"),
        ([], {}, "no adapter"),
        (["one", "one"], {"weights": [1.0]}, "2 adapters and 1 weights"),
        (["one", "none"], {}, r"adapter_config\.json"),
    ):
        with pytest.raises(budwood.Error, match=wanted):
            budwood.combine_files([tmp_path / f for f in folders], out, **options)
    assert not out.exists()
    with pytest.raises(budwood.Error, match="one"):
        budwood.combine_files([one], one)
