"""Target matching against HF PEFT's own."""

import re
import time
import warnings

import peft
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from peft.tuners.tuners_utils import _find_minimal_target_modules, check_target_module_exists
from peft.utils import constants
from torch import nn
from transformers.pytorch_utils import Conv1D

from budwood._C import (
    Error,
    LoraConfig,
    default_feedforward_modules,
    default_target_modules,
    match_targets,
    minimal_suffixes,
)

SEGMENTS = st.sampled_from(
    ["model", "layers", "h", "0", "1", "2", "10", "attn", "q_proj", "proj", "fc", "experts"]
)
PATHS = st.lists(SEGMENTS, min_size=1, max_size=6).map(".".join)
TREES = st.lists(PATHS, min_size=1, max_size=25, unique=True)
ENTRIES = st.lists(SEGMENTS, min_size=1, max_size=3).map(".".join)
REGEXES = st.sampled_from(
    [
        r".*\.q_proj",
        r"model\..*",
        r".*",
        r".*(q_proj|fc)",
        r"model\.layers\.[01]\..*proj",
        "x",
        r"(?i).*Q_PROJ",
        r".*\d+.*",
        r"^model.*proj$",
        r"(?!.*attn).*",
        r"\w+\Z",
    ]
)
LAYER_NAMES = st.sampled_from(["layers", "h", "experts", "layers|h", "(layers|h)", "l.yers", "a"])


def linear(paths):
    return [(path, "linear", False) for path in paths]


def quiet(function, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args, **kwargs)


def ours(options, modules, model_type="", strict=False):
    """Paths that are targeted; none when matching is refused for that reason alone."""
    try:
        return match_targets(LoraConfig(**options), modules, model_type, strict)["matched"]
    except Error as e:
        if "selects none" not in str(e):
            raise
        return []


@given(
    st.fixed_dictionaries(
        {"target_modules": st.lists(ENTRIES, max_size=6, unique=True) | REGEXES},
        optional={
            "exclude_modules": st.none() | st.lists(ENTRIES, max_size=3) | REGEXES | st.just(""),
            "modules_to_save": st.none() | st.lists(ENTRIES | st.just("f."), max_size=2),
            "layers_to_transform": st.none() | st.integers(-1, 11) | st.lists(st.integers(0, 11)),
            "layers_pattern": st.none()
            | st.just("")
            | LAYER_NAMES
            | st.lists(LAYER_NAMES, max_size=2),
        },
    ),
    TREES,
)
@settings(deadline=None, max_examples=400)
def test_the_modules_that_peft_picks_are_picked(options, paths):
    try:
        theirs = peft.LoraConfig(**options)
    except ValueError:
        with pytest.raises(Error):
            LoraConfig(**options)
        return
    expected = [path for path in paths if check_target_module_exists(theirs, path)]
    assert ours(options, linear(paths)) == expected


class Tree(nn.Module):
    """Modules under the paths given; what stands on the way to one is a container."""

    def __init__(self, leaves):
        super().__init__()
        for path, kind in leaves:
            node = self
            *way, name = path.split(".")
            for segment in way:
                if not hasattr(node, segment):
                    node.add_module(segment, nn.Module())
                node = getattr(node, segment)
            made = {"linear": nn.Linear, "conv1d": Conv1D, "embedding": nn.Embedding}
            node.add_module(name, made[kind](2, 2) if kind in made else nn.LayerNorm(2))


def kinds(model, head=None):
    def kind(module):
        table = {nn.Linear: "linear", Conv1D: "conv1d", nn.Embedding: "embedding"}
        return table.get(type(module), "other")

    return [(p, kind(m), m is head) for p, m in model.named_modules() if p]


@st.composite
def leaf_trees(draw):
    """Paths of leaves, none of which stands below another."""
    paths = draw(st.lists(PATHS, min_size=1, max_size=40, unique=True))
    leaves = [p for p in paths if not any(q.startswith(p + ".") for q in paths)]
    kind = st.sampled_from(["linear"] * 6 + ["conv1d", "embedding", "norm"])
    return [(p, draw(kind)) for p in leaves]


def inject_with_peft(options, model):
    """Paths that PEFT adapts and the target_modules that it ends up with."""
    config = quiet(peft.LoraConfig, **options)
    quiet(peft.inject_adapter_in_model, config, model)
    layer = peft.tuners.tuners_utils.BaseTunerLayer
    paths, inside = [], ()
    for path, module in model.named_modules():
        if path.startswith(inside) if inside else False:
            continue
        if isinstance(module, layer):
            paths.append(path)
            inside = (*inside, path + ".")
    return paths, config.target_modules


@given(
    leaf_trees(), st.lists(ENTRIES, min_size=1, max_size=30, unique=True) | st.just("All-Linear")
)
@settings(deadline=None, max_examples=100)
def test_injection_into_random_models_is_pefts(leaves, targets):
    model = Tree(leaves)
    modules = kinds(model)
    config = LoraConfig(target_modules=targets)
    try:
        report = match_targets(config, modules, strict=False)
    except Error:
        with pytest.raises(ValueError):
            inject_with_peft({"target_modules": targets}, model)
        return
    paths, saved = inject_with_peft({"target_modules": targets}, model)
    assert report["matched"] == paths
    assert report["target_modules"] == saved


@given(st.lists(PATHS, min_size=20, max_size=40, unique=True), TREES)
@settings(deadline=None, max_examples=60)
def test_reduction_to_minimal_suffixes_is_pefts(targets, others):
    others = [path for path in others if path not in targets]
    assert set(minimal_suffixes(targets, others)) == _find_minimal_target_modules(targets, others)


def test_reduction_of_the_documented_example():
    targets = [f"model.decoder.layers.{i}.self_attn.{x}_proj" for i in range(100) for x in "qv"]
    others = [f"model.encoder.layers.{i}.self_attn.k_proj" for i in range(100)]
    assert minimal_suffixes(targets, others) == ["q_proj", "v_proj"]


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("LORA", constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING),
        ("IA3", constants.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING),
        ("ADALORA", constants.TRANSFORMERS_MODELS_TO_ADALORA_TARGET_MODULES_MAPPING),
    ],
)
def test_default_targets_of_every_model_type_are_pefts(option, expected):
    for model_type in constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING:
        theirs = expected.get(model_type)
        theirs = set(theirs) if isinstance(theirs, list) else theirs
        assert default_target_modules(option, model_type) == theirs
    for (
        model_type,
        names,
    ) in constants.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING.items():
        assert default_feedforward_modules(model_type) == names
    assert default_target_modules(option, "unheard_of") is None
    assert default_feedforward_modules("xlm-roberta") is None


def transformers_model(name):
    import transformers as tf

    small = {"hidden_size": 8, "num_hidden_layers": 4, "num_attention_heads": 2, "vocab_size": 11}
    if name == "llama":
        return tf.LlamaForCausalLM(tf.LlamaConfig(**small, intermediate_size=8))
    if name == "llama-2":
        small["num_hidden_layers"] = 2
        return tf.LlamaForCausalLM(tf.LlamaConfig(**small, intermediate_size=8))
    if name == "llama-cls":
        return tf.LlamaForSequenceClassification(tf.LlamaConfig(**small, intermediate_size=8))
    if name == "bert-cls":
        return tf.BertForSequenceClassification(tf.BertConfig(**small, intermediate_size=8))
    return tf.GPT2LMHeadModel(tf.GPT2Config(n_embd=8, n_layer=4, n_head=2, vocab_size=11))


@pytest.mark.parametrize("name", ["llama", "llama-2", "llama-cls", "bert-cls", "gpt2"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"target_modules": "all-linear"},
        {"target_modules": "all-linear", "task_type": "SEQ_CLS"},
        {"target_modules": "all-linear", "exclude_modules": ["lm_head", "down_proj"]},
        {"target_modules": "all-linear", "modules_to_save": ["classifier", "score"]},
        {"layers_to_transform": [1, 3]},
    ],
    ids=str,
)
def test_real_models_are_targeted_as_peft_does(name, options):
    model = transformers_model(name)
    modules = kinds(model, model.get_output_embeddings())
    report = match_targets(LoraConfig(**options), modules, model.config.model_type, strict=False)
    paths, saved = inject_with_peft(options, model)
    assert report["matched"] == paths
    assert report["target_modules"] == saved


def test_all_linear_of_llama_is_saved_short_when_that_is_shorter():
    def saved(name):
        model = transformers_model(name)
        modules = kinds(model, model.get_output_embeddings())
        return match_targets(LoraConfig(target_modules="all-linear"), modules, "llama")[
            "target_modules"
        ]

    names = {f"{x}_proj" for x in ("q", "k", "v", "o", "gate", "up", "down")}
    assert saved("llama") == names
    assert len(saved("llama-2")) == 14


LLAMA = [
    (f"model.layers.{i}.{name}", kind, False)
    for i in range(2)
    for name, kind in [
        ("self_attn", "other"),
        ("self_attn.q_proj", "linear"),
        ("self_attn.v_proj", "linear"),
        ("mlp.down_proj", "linear"),
        ("norm", "other"),
    ]
] + [("lm_head", "linear", True)]


def match(strict=True, **options):
    return match_targets(LoraConfig(**options), LLAMA, "llama", strict)


def test_a_name_matches_whole_segments_only():
    assert ours({"target_modules": ["proj"]}, LLAMA) == []
    assert len(match(target_modules=["self_attn.q_proj"])["matched"]) == 2


def test_hits_are_counted_for_every_entry():
    report = match(
        target_modules=["q_proj", "model.layers.0.mlp.down_proj"],
        rank_pattern={"q_proj": 2, "layers.1.*": 3},
        alpha_pattern={"down_proj": 1},
        layers_to_transform=[0, 1],
    )
    assert report["hits"] == {
        ("target_modules", "q_proj"): 2,
        ("target_modules", "model.layers.0.mlp.down_proj"): 1,
        ("rank_pattern", "q_proj"): 2,
        ("rank_pattern", "layers.1.*"): 1,
        ("alpha_pattern", "down_proj"): 1,
        ("layers_to_transform", "0"): 2,
        ("layers_to_transform", "1"): 1,
    }
    assert report["warnings"] == []
    assert match(target_modules=r".*\.q_proj")["hits"] == {("target_modules", r".*\.q_proj"): 2}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"target_modules": ["q_proj", "v_prj"]}, "'v_prj' matches none.*nearest name is 'v_proj'"),
        ({"target_modules": ["q_proj", "v_prj"]}, "end in down_proj, lm_head, q_proj, v_proj"),
        (
            {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["lm_head"]},
            "'lm_head' stands for 1 modules, but exclude_modules or modules_to_save",
        ),
        (
            {"target_modules": ["q_proj", "1.mlp.down_proj"], "layers_to_transform": 0},
            "none in the layers of layers_to_transform",
        ),
        (
            {"target_modules": ["q_proj"], "layers_to_transform": [1, 7]},
            "layers_to_transform has 7",
        ),
        (
            {"target_modules": ["q_proj"], "rank_pattern": {"v_proj": 2}},
            "rank_pattern entry 'v_proj'",
        ),
        ({"target_modules": ["q_proj"], "alpha_pattern": {"v_proj": 2}}, "alpha_pattern entry"),
    ],
)
def test_an_entry_without_effect_is_an_error_for_a_person_and_a_warning_for_a_file(options, said):
    with pytest.raises(Error, match=said):
        match(**options)
    report = match(strict=False, **options)
    assert any(re.search(said, text) for text in report["warnings"])
    assert report["matched"]


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["x"]},
        {"target_modules": []},
        {"target_modules": "x"},
        {"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]},
        {"target_modules": ["q_proj"], "layers_to_transform": 9},
        {"target_modules": ["self_attn"]},
        {"target_modules": ".*"},
    ],
    ids=str,
)
def test_no_match_and_a_match_that_cannot_be_adapted_are_errors(options, strict):
    with pytest.raises(Error):
        match(strict=strict, **options)


def test_a_match_that_cannot_be_adapted_is_named():
    with pytest.raises(Error, match=r"'model.layers.0.self_attn', which is neither"):
        match(target_modules=["self_attn"])


def test_entries_of_defaults_and_of_all_linear_need_not_all_hit():
    modules = [("a.q_proj", "linear", False)]
    assert match_targets(LoraConfig(), modules, "llama")["matched"] == ["a.q_proj"]
    assert match(target_modules="all-linear", exclude_modules=["q_proj"])["warnings"] == []


def test_an_exclusion_without_effect_is_told():
    said = match(target_modules=["q_proj"], exclude_modules=["nowhere"])["warnings"]
    assert said == ["exclude_modules [nowhere] matches no module"]


def test_an_unknown_model_type_asks_for_targets():
    with pytest.raises(Error, match="no default for the model type 'mamba'"):
        match_targets(LoraConfig(), LLAMA, "mamba")


def test_an_option_that_is_not_available_is_refused_before_matching():
    config = LoraConfig(target_modules=["q_proj"])
    config.ensure_weight_tying = True
    with pytest.raises(Error, match="ensure_weight_tying"):
        match_targets(config, LLAMA, "llama")


def test_an_unknown_kind_is_refused():
    with pytest.raises(Error, match="kind of a module is 'conv3d'"):
        match_targets(LoraConfig(), [("a", "conv3d", False)], "llama")


def test_the_layer_index_needs_two_names_before_it():
    paths = ["layers.1.q_proj", "h.1.q_proj", "model.layers.1.q_proj", "m.h.1.experts.0.q_proj"]
    options = {"target_modules": ["q_proj"], "layers_to_transform": 1}
    assert ours(options, linear(paths)) == paths[2:]
    assert ours({**options, "layers_pattern": "layers"}, linear(paths)) == [paths[0], paths[2]]
    # A path that is written out whole is taken whatever its layer.
    options = {"target_modules": paths[:1], "layers_to_transform": 5}
    assert ours(options, linear(paths)) == paths[:1]


def test_a_path_with_a_huge_index_matches_no_layer():
    paths = ["m.layers.99999999999999999999999.q_proj", "m.layers.0.q_proj"]
    assert (
        ours({"target_modules": ["q_proj"], "layers_to_transform": [0]}, linear(paths)) == paths[1:]
    )


ATOMS = st.sampled_from(
    [
        "a",
        "b",
        r"\.",
        ".",
        r"\d",
        r"\w",
        r"\W",
        "[ab]",
        "[^a]",
        "[]a]",
        r"[\w.]",
        "1",
        "_",
        "^",
        "$",
        r"\b",
        r"\B",
        r"\Z",
        r"\A",
        r"\x61",
        r"a{,2}",
        "a{1",
        "{",
        "}",
        "]",
        "-",
        r"\-",
        r"\_",
        " ",
        "[a-c]",
        "[[:alpha:]]",
        r"\s",
        "é",
        "(?i:B)",
        "(?=a)",
        "(?!b)",
        "(?<=a)",
        "(?<!a)",
        r"\1",
        "(?P<n>a)",
        "(?P=n)",
        "(?#no)",
        r"\t",
        r"\v",
        r"\0",
        r"\h",
        r"\K",
        "(?R)",
        r"\101",
        "\\",
    ]
)
REPEATS = st.sampled_from(
    ["", "", "", "*", "+", "?", "*?", "+?", "??", "{2}", "{1,}", "{,1}", "{0,2}?"]
)
GRAMMAR = st.recursive(
    st.tuples(ATOMS, REPEATS).map("".join),
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=4).map("".join),
        st.lists(inner, min_size=1, max_size=3).map("|".join),
        st.tuples(st.just("("), inner, st.just(")"), REPEATS).map("".join),
        st.tuples(st.just("(?:"), inner, st.just(")"), REPEATS).map("".join),
    ),
    max_leaves=10,
)
TEXTS = st.text("ab.1_é A\n-]{}", min_size=1, max_size=6)


@given(GRAMMAR, st.lists(TEXTS, min_size=1, max_size=12, unique=True))
@settings(deadline=None, max_examples=600)
@example(r"a{,2}", ["aa", "aaa"])
@example(r"a\Z", ["a", "a\n"])
@example(r"a$", ["a", "a\n"])
def test_regular_expressions_mean_what_they_mean_in_python(pattern, texts):
    assume(pattern.lower() != "all-linear")
    try:
        compiled = quiet(re.compile, pattern)
    except re.error:
        return
    try:
        config = LoraConfig(target_modules=pattern)
    except Error as e:
        if "lookbehind assertion is too" in str(e):  # a bound that Python does not have
            return
        raise
    expected = [text for text in texts if compiled.fullmatch(text)]
    try:
        matched = match_targets(config, linear(texts), strict=False)["matched"]
    except Error as e:
        if "too expensive" in str(e):
            return
        if "selects none" not in str(e):
            raise
        matched = []
    assert matched == expected


@pytest.mark.parametrize("option", ["target_modules", "exclude_modules"])
def test_a_pattern_that_backtracks_without_end_is_refused(option):
    options = {"target_modules": ".*", option: "(a+)+$"}
    with pytest.raises(Error, match="too expensive"):
        match_targets(LoraConfig(**options), linear(["a" * 40 + "!"]))


def test_a_rank_pattern_that_backtracks_without_end_is_refused():
    config = LoraConfig(rank_pattern={"(a+)+[bc]": 2})
    with pytest.raises(Error, match="too expensive"):
        config.rank("a" * 40)


def test_matching_a_large_model_is_quick():
    paths = [
        f"model.layers.{i}.mlp.experts.{e}.{x}" for i in range(40) for e in range(64) for x in "abc"
    ]
    begin = time.monotonic()
    report = match_targets(LoraConfig(target_modules=paths), linear(paths))
    assert len(report["matched"]) == len(paths)
    assert report["target_modules"] == {"a", "b", "c"}
    assert time.monotonic() - begin < 5
