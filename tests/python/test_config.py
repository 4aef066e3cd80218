"""Configurations against HF PEFT's own."""

import copy
import enum
import json
import math
import pickle
import warnings
from pathlib import Path

import numpy as np
import peft
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key

from budwood._C import Error, LoraConfig, PeftConfig, known_peft_types, task_heads

NAMES = st.sampled_from(["q_proj", "k_proj", "v_proj", "self_attn.o_proj", "lm_head", "café"])
PATHS = st.lists(
    st.sampled_from(["model", "layers", "0", "1", "10", "self_attn", "q_proj", "v_proj", "x"]),
    min_size=1,
    max_size=6,
).map(".".join)
PATTERNS = st.sampled_from(
    [
        "q_proj",
        "layers.0.*q_proj",
        "^model.layers.1.self_attn.q_proj",
        ".*",
        "0.self_attn.v_proj",
        r"layers\.\d+\.self_attn\.[qv]_proj",
        "x|v_proj",
        "_proj",
        "model.q_proj",
        "(?P<n>x)",
    ]
)
OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "r": st.integers(1, 512),
        "lora_alpha": st.integers(0, 100) | st.floats(-1e30, 1e30).filter(lambda x: x % 1),
        "use_rslora": st.booleans(),
        "lora_dropout": st.floats(0, 1, exclude_max=True),
        "bias": st.sampled_from(["none", "all", "lora_only"]),
        "fan_in_fan_out": st.booleans(),
        "init_lora_weights": st.sampled_from([True, False, "gaussian"]),
        "target_modules": st.lists(NAMES, max_size=1) | st.just(r".*\.q_proj") | st.none(),
        "exclude_modules": st.lists(NAMES, max_size=1) | st.just(r".*\.q_proj") | st.none(),
        "modules_to_save": st.lists(NAMES, unique=True) | st.none(),
        "rank_pattern": st.dictionaries(PATTERNS, st.integers(1, 64)),
        "alpha_pattern": st.dictionaries(PATTERNS, st.integers(1, 64) | st.just(0.5)),
        "task_type": st.sampled_from([None, *(t.value for t in peft.TaskType)]),
        "base_model_name_or_path": st.none() | st.text(st.characters(codec="utf-8")),
        "revision": st.none() | st.text(st.characters(codec="utf-8")),
        "qalora_group_size": st.integers(1, 64),
        "megatron_core": st.none() | st.just("megatron.core"),
        "auto_mapping": st.none() | st.just({"parent_library": "p", "base_model_class": "B"}),
        "inference_mode": st.booleans(),
    },
)


def quiet(function, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args, **kwargs)


def plain(config):
    """A PEFT config as values that JSON has, sets sorted."""
    return {
        k: sorted(v) if isinstance(v, set) else getattr(v, "value", v)
        for k, v in config.to_dict().items()
    }


def refusal(**options):
    with pytest.raises(Error) as caught:
        LoraConfig(**options)
    return str(caught.value)


def test_every_option_of_peft_has_pefts_name_and_default():
    assert plain(LoraConfig()) == plain(peft.LoraConfig())


def test_types_are_registered():
    assert "LORA" in known_peft_types()


@given(OPTIONS)
@settings(deadline=None, max_examples=300)
def test_the_file_is_byte_for_byte_what_peft_writes(tmp_path_factory, options):
    folder = tmp_path_factory.mktemp("c")
    quiet(peft.LoraConfig, **options).save_pretrained(str(folder / "theirs"))
    LoraConfig(**options).save_pretrained(folder / "ours")
    ours, theirs = (folder / n / "adapter_config.json" for n in ("ours", "theirs"))
    assert ours.read_bytes() == theirs.read_bytes()
    assert PeftConfig.from_pretrained(folder / "theirs") == LoraConfig(**options)
    assert plain(quiet(peft.PeftConfig.from_pretrained, str(folder / "ours"))) == plain(
        quiet(peft.LoraConfig, **options)
    )


@given(st.floats(allow_nan=False, allow_infinity=False))
@settings(deadline=None, max_examples=500)
def test_floats_are_written_as_python_writes_them(value):
    if value % 1 == 0 and abs(value) <= 2**53:
        value += 0.5
    text = LoraConfig(lora_alpha=value).to_json()
    written = next(line for line in text.split("\n") if '"lora_alpha"' in line)
    if value % 1 or abs(value) > 2**53:
        assert written == f'  "lora_alpha": {json.dumps(value)},'
    assert json.loads(text)["lora_alpha"] == value


def test_several_targets_are_written_sorted_whatever_the_set_order():
    config = LoraConfig(target_modules={"v", "q", "k"}, exclude_modules=["b", "a", "b"])
    assert json.loads(config.to_json())["target_modules"] == ["k", "q", "v"]
    assert json.loads(config.to_json())["exclude_modules"] == ["a", "b"]


def test_python_values_of_all_kinds_are_taken():
    class Task(enum.Enum):
        LM = "CAUSAL_LM"

    expected = LoraConfig(r=4, target_modules=["a", "b"], task_type="CAUSAL_LM")
    assert LoraConfig(r=np.int64(4), target_modules=("a", "b"), task_type=Task.LM) == expected
    assert (
        LoraConfig(r=4, target_modules=frozenset("ab"), task_type=peft.TaskType.CAUSAL_LM)
        == expected
    )
    assert LoraConfig(lora_alpha=np.float32(0.5)).lora_alpha == 0.5
    assert LoraConfig(layers_to_transform=(0, 1)).layers_to_transform == [0, 1]
    assert LoraConfig(peft_type="LORA", peft_version=None).peft_version == "0.21.0"


def test_values_come_back_as_pefts_do():
    config = LoraConfig(
        r=4,
        lora_alpha=16,
        target_modules=["a"],
        rank_pattern={"b": 2, "a": 1},
        modules_to_save=["h"],
    )
    assert config.peft_type == peft.PeftType.LORA
    assert config.task_type is None
    assert config.target_modules == {"a"}
    assert isinstance(config.target_modules, set)
    assert isinstance(config.lora_alpha, int)
    assert list(config.rank_pattern) == ["b", "a"]
    assert config.modules_to_save == ["h"]
    assert json.dumps(config.rank_pattern) == '{"b": 2, "a": 1}'
    assert not config.is_prompt_learning
    assert LoraConfig(target_modules="all-linear").target_modules == "all-linear"


def test_assignment_is_checked():
    config = LoraConfig()
    config.r = 16
    config.target_modules = ["x", "y"]
    config.init_lora_weights = "gaussian"
    assert (config.r, config.target_modules) == (16, {"x", "y"})
    with pytest.raises(Error, match=r"r is \"8\"; it must be an integer"):
        config.r = "8"
    with pytest.raises(AttributeError):
        config.rr = 3
    config.r = 0
    with pytest.raises(Error, match="r is 0"):
        config.validate()


def test_changes_inside_a_list_set_or_dict_reach_the_config():
    config = LoraConfig(target_modules=["a"], modules_to_save=["h"], rank_pattern={"a": 1})
    config.target_modules.add("b")
    config.modules_to_save.append("i")
    config.rank_pattern["b"] = 2
    config.rank_pattern.pop("a")
    config.target_modules |= {"c"}
    assert config.target_modules == {"a", "b", "c"}
    assert config.modules_to_save == ["h", "i"]
    assert config.rank_pattern == {"b": 2}
    loose = copy.deepcopy(config.target_modules)
    loose.add("d")
    assert type(loose) is set
    assert config.target_modules == {"a", "b", "c"}


@given(OPTIONS)
@settings(deadline=None, max_examples=50)
def test_copies_are_equal_and_independent(options):
    config = LoraConfig(**options)
    order = list(config.rank_pattern)
    for twin in (copy.copy(config), copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert twin == config
        assert list(twin.rank_pattern) == order
        twin.r += 1
        assert twin != config
    assert eval(repr(config), {"LoraConfig": LoraConfig}) == config
    assert LoraConfig(**config.to_dict()) == config
    assert PeftConfig.from_json(config.to_json()) == config


def test_subclasses_survive_copies():
    twin = copy.deepcopy(Named(r=3))
    assert type(twin) is Named
    assert twin.r == 3


class Named(LoraConfig):
    pass


def test_private_keys_are_kept():
    text = '{"peft_type": "LORA", "budwood.base": {"z": 1, "a": [2]}}'
    config = PeftConfig.from_json(text)
    assert json.loads(config.to_json())["budwood.base"] == {"z": 1, "a": [2]}
    assert PeftConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("rr", "r"),
        ("alpha", "lora_alpha"),
        ("target_module", "target_modules"),
        ("dropout", "lora_dropout"),
        ("use_rs_lora", "use_rslora"),
    ],
)
def test_an_unknown_option_names_the_nearest(name, nearest):
    assert f"no option '{name}'; the nearest is '{nearest}'" in refusal(**{name: 1})
    with pytest.raises(Error, match=f"nearest is '{nearest}'"):
        PeftConfig.from_json(json.dumps({"peft_type": "LORA", name: 1}))


def test_an_unknown_key_of_a_saved_folder_is_a_warning(tmp_path):
    text = {"peft_type": "LORA", "r": 4, "from_the_future": [1], "runtime_config": {}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(text))
    with pytest.warns(UserWarning, match="is unknown and was ignored") as seen:
        config = PeftConfig.from_pretrained(tmp_path)
    assert "the key 'from_the_future' = [1] is unknown" in str(seen[0].message)
    assert config.r == 4
    assert len(config.warnings) == 2


def test_the_smallest_file_of_peft_is_enough():
    text = '{"peft_type":"LORA","r":4,"target_modules":["q_proj","v_proj"]}'
    assert PeftConfig.from_json(text) == LoraConfig(r=4, target_modules=["v_proj", "q_proj"])


def test_repeated_heads_are_read_once():
    config = LoraConfig(modules_to_save=["classifier", "score", "classifier", "score"])
    assert config.modules_to_save == ["classifier", "score"]
    assert task_heads("SEQ_CLS") == ["classifier", "score"]
    assert task_heads("QUESTION_ANS") == ["qa_outputs"]
    assert task_heads(None) == task_heads("CAUSAL_LM") == []


HOSTILE = [
    ({"r": 0}, "r is 0"),
    ({"r": -1}, "r is -1"),
    ({"r": 8.0}, "r is 8.0; it must be an integer"),
    ({"r": True}, "r is true"),
    ({"r": None}, "r is null"),
    ({"r": 10**30}, "r is 1e[+]30"),
    ({"r": 2**40}, "r is 1099511627776"),
    ({"lora_alpha": math.nan}, "lora_alpha is nan"),
    ({"lora_alpha": math.inf}, "lora_alpha is inf"),
    ({"lora_alpha": "16"}, 'lora_alpha is "16"; it must be a number'),
    ({"lora_dropout": 1.0}, "lora_dropout is 1"),
    ({"lora_dropout": -0.1}, "lora_dropout is -0.1"),
    ({"lora_dropout": math.nan}, "lora_dropout is nan"),
    ({"bias": "some"}, "bias is 'some'"),
    ({"use_rslora": 1}, "use_rslora is 1; it must be true or false"),
    ({"target_modules": ["a", 1]}, r'target_modules is \["a",1\]'),
    ({"target_modules": 3}, "target_modules is 3"),
    ({"target_modules": {"a": 1}}, "target_modules is"),
    ({"modules_to_save": "head"}, 'modules_to_save is "head"; it must be a list'),
    ({"layers_to_transform": ["0"]}, "layers_to_transform is"),
    ({"layers_to_transform": 1.5}, "layers_to_transform is 1.5"),
    ({"rank_pattern": {"a": 0}}, r"rank_pattern\['a'\] is 0"),
    ({"rank_pattern": {"a": 2.5}}, "rank_pattern is"),
    ({"rank_pattern": ["a"]}, "rank_pattern is"),
    ({"rank_pattern": {"(": 1}}, r"'\('"),
    ({"rank_pattern": {3: 1}}, "the key 3 is not a text"),
    ({"alpha_pattern": {"a": math.nan}}, r"alpha_pattern\['a'\] is nan"),
    ({"alpha_pattern": {"a)|(": 1}, "rank_pattern": {"a)(": 1, "*": 1}}, r"'\*'"),
    ({"target_modules": "(q"}, r"'\(q'"),
    ({"exclude_modules": "*"}, r"'\*'"),
    ({"target_modules": "a" * 10001}, "10001 bytes"),
    ({"task_type": "CAUSAL"}, "task_type is 'CAUSAL'"),
    ({"task_type": 3}, "task_type is 3"),
    ({"base_model_name_or_path": 3}, "base_model_name_or_path is 3"),
    ({"peft_type": "IA3"}, "peft_type is"),
    ({"init_lora_weights": None}, "init_lora_weights is null"),
    ({"r": object()}, "a value of type object cannot be used"),
]


@pytest.mark.parametrize(("options", "said"), HOSTILE, ids=lambda x: str(x)[:40])
def test_a_hostile_value_is_named(options, said):
    with pytest.raises(Error, match=said):
        LoraConfig(**options)


UNAVAILABLE = [
    *({"init_lora_weights": x} for x in ("loftq", "corda", "lora_ga", "eva", "orthogonal")),
    *({"init_lora_weights": x} for x in ("mica", "nonsense", "pissa_niter_x")),
    {"target_parameters": ["mlp.experts.gate_up_proj"]},
    {"layer_replication": [[0, 2], [1, 3]]},
    {"alora_invocation_tokens": [1]},
    {"ensure_weight_tying": True},
    *({x: {}} for x in ("use_bdlora", "arrow_config", "kasa_config", "velora_config")),
    {"monteclora_config": {}},
]


@pytest.mark.parametrize("options", UNAVAILABLE, ids=str)
def test_an_option_that_is_not_available_is_refused_by_name(options):
    said = refusal(**options)
    assert f"{next(iter(options))} is " in said
    assert "not available in this version" in said


@pytest.mark.parametrize("init", ["eva", "orthogonal", "mica"])
def test_a_saved_adapter_of_an_initialisation_that_keeps_the_base_is_read(init):
    text = json.dumps({"peft_type": "LORA", "init_lora_weights": init})
    assert PeftConfig.from_json(text, strict=False).init_lora_weights == init


@pytest.mark.parametrize("init", ["loftq", "corda", "lora_ga"])
def test_a_saved_adapter_of_a_changed_base_is_refused(init):
    with pytest.raises(Error, match="init_lora_weights"):
        PeftConfig.from_json(
            json.dumps({"peft_type": "LORA", "init_lora_weights": init}), strict=False
        )


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": "q.*", "layers_to_transform": 1},
        {"target_modules": "q.*", "layers_to_transform": []},
        {"target_modules": "all-linear", "layers_to_transform": [1]},
        {"target_modules": "q.*", "layers_pattern": "h"},
        {"target_modules": ["q"], "layers_pattern": "h"},
        {"target_modules": ["q"], "layers_pattern": ["h"]},
        {"lora_bias": True, "use_dora": True},
        {"lora_bias": True, "init_lora_weights": "gaussian"},
    ],
    ids=str,
)
def test_a_combination_that_peft_refuses_is_refused(options):
    with pytest.raises(ValueError):
        peft.LoraConfig(**options)
    assert "not available" not in refusal(**options)


@pytest.mark.parametrize("options", [{"layers_pattern": ""}, {"layers_pattern": []}], ids=str)
def test_an_empty_layers_pattern_is_none_at_all(options):
    peft.LoraConfig(target_modules=["q"], **options)
    LoraConfig(target_modules=["q"], **options)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "not valid JSON"),
        ("[]", "has no peft_type"),
        ("{}", "has no peft_type; it must be one of .*LORA"),
        ('{"peft_type": "SPELL"}', 'has peft_type "SPELL"; known are .*LORA'),
        ('{"peft_type": 3}', "has peft_type 3"),
        ('{"peft_type": "LORA", "r": 1, "r": 2}', "twice"),
        ('{"peft_type": "LORA", "lora_alpha": NaN}', "not valid JSON"),
        ('{"peft_type": "LORA", "lora_alpha": 1e999}', "not valid JSON"),
        ('{"peft_type": "LORA"', "not valid JSON"),
        ('{"config": {}, "version": "adapters.1.3.0", "name": "a"}', "AdapterHub"),
        ('{"lora_parameters": {"rank": 8}, "num_layers": 16}', "MLX"),
        ('{"fine_tune_type": "lora"}', "MLX"),
    ],
)
def test_a_text_that_is_no_peft_config_is_refused(tmp_path, text, said):
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(Error, match=said):
        PeftConfig.from_pretrained(tmp_path)
    with pytest.raises(Error, match=said):
        PeftConfig.from_json(text)


def test_a_folder_that_is_not_there_is_refused_without_a_download(tmp_path):
    with pytest.raises(Error, match="nothing is downloaded"):
        PeftConfig.from_pretrained("hub-user/some-adapter")
    LoraConfig(r=3).save_pretrained(tmp_path / "a" / "b")
    assert PeftConfig.from_pretrained(tmp_path, subfolder="a/b").r == 3
    with pytest.raises(Error):
        LoraConfig().save_pretrained(Path(tmp_path / "a" / "b" / "adapter_config.json"))


@given(
    st.dictionaries(PATTERNS, st.integers(1, 64)),
    st.dictionaries(PATTERNS, st.integers(1, 64)),
    st.booleans(),
    PATHS,
)
@settings(deadline=None, max_examples=500)
def test_rank_alpha_and_scaling_by_pattern_are_pefts(ranks, alphas, rslora, path):
    config = LoraConfig(
        r=7, lora_alpha=9, rank_pattern=ranks, alpha_pattern=alphas, use_rslora=rslora
    )
    r = ranks.get(get_pattern_key(ranks.keys(), path), 7)
    alpha = alphas.get(get_pattern_key(alphas.keys(), path), 9)
    assert config.rank(path) == r
    assert config.alpha(path) == alpha
    assert config.scaling(path) == (alpha / math.sqrt(r) if rslora else alpha / r)


def test_the_first_pattern_of_the_file_counts():
    text = '{"peft_type": "LORA", "rank_pattern": {"q_proj": 2, ".*q_proj": 3}}'
    assert PeftConfig.from_json(text).rank("m.q_proj") == 2
    text = '{"peft_type": "LORA", "rank_pattern": {".*q_proj": 3, "q_proj": 2}}'
    assert PeftConfig.from_json(text).rank("m.q_proj") == 3


@given(
    st.dictionaries(PATTERNS, st.integers(1, 64)),
    st.dictionaries(PATTERNS, st.integers(1, 64)),
    st.lists(PATHS, max_size=6, unique=True),
)
@settings(deadline=None, max_examples=200)
def test_pinned_patterns_mean_the_same_after_a_save(ranks, alphas, paths):
    config = LoraConfig(rank_pattern=ranks, alpha_pattern=alphas)
    before = [config.scaling(p) for p in paths]
    config.pin_patterns(paths)
    saved = PeftConfig.from_json(config.to_json())
    assert [saved.scaling(p) for p in paths] == before
    theirs = json.loads(config.to_json())
    for path in paths:
        key = get_pattern_key(theirs["rank_pattern"].keys(), path)
        assert theirs["rank_pattern"].get(key, 8) == config.rank(path)


def test_patterns_that_do_not_overlap_stay_as_written():
    config = LoraConfig(rank_pattern={"v_proj": 2, "q_proj": 3})
    config.pin_patterns(["a.q_proj", "a.v_proj"])
    assert config.rank_pattern == {"v_proj": 2, "q_proj": 3}


def test_scales_of_a_worked_example():
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        use_rslora=True,
        rank_pattern={"layers.0.*q_proj": 2, "down_proj": 6},
        alpha_pattern={"down_proj": 3},
    )
    scales = [
        config.scaling(f"model.layers.{p}")
        for p in ("0.self_attn.q_proj", "0.mlp.down_proj", "1.self_attn.q_proj")
    ]
    assert scales == pytest.approx([5.656854, 1.2247449, 4.0], abs=1e-6)
    assert LoraConfig(r=2, lora_alpha=3).scaling("x") == 1.5
    assert LoraConfig(r=2, lora_alpha=3, use_rslora=True).scaling("x") == pytest.approx(2.12132034)
