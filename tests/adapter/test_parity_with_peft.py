# SPDX-License-Identifier: Apache-2.0
"""Adapters written by PEFT: the same modules and the same deltas as PEFT itself reads from them."""

import json
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from toppings.adapter import read_adapter  # noqa: E402
from toppings.adapter.config import parse_config  # noqa: E402
from toppings.errors import AdapterFormatError, UnsupportedAdapterError  # noqa: E402

LAYERS = 11  # so that layers 1 and 10 are there to be confused
ALL_NAMES = [
    f"model.layers.{i}.{name}"
    for i in range(LAYERS)
    for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj")
]


def llama():
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=11,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )


def phi3():
    return transformers.Phi3ForCausalLM(
        transformers.Phi3Config(
            vocab_size=11,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            pad_token_id=0,
        )
    )


def gpt2():
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=11, n_positions=8, n_embd=16, n_layer=2, n_head=2)
    )


CASES = {
    "plain": (llama, {"target_modules": ["q_proj", "v_proj"]}),
    "odd rank, float alpha": (llama, {"target_modules": ["o_proj"], "r": 5, "lora_alpha": 2.5}),
    "rslora": (llama, {"target_modules": ["q_proj"], "use_rslora": True, "r": 6}),
    "all-linear": (llama, {"target_modules": "all-linear", "r": 1}),
    "regex": (llama, {"target_modules": r".*\.layers\.(1|10)\.(self_attn|mlp)\.(q|up)_proj"}),
    "one full path": (llama, {"target_modules": ["model.layers.1.mlp.up_proj"]}),
    "all full paths": (llama, {"target_modules": ALL_NAMES}),
    "last components": (llama, {"target_modules": ["1.self_attn.q_proj", "mlp.down_proj"]}),
    "exclude list": (
        llama,
        {"target_modules": "all-linear", "exclude_modules": ["k_proj", "1.mlp.up_proj"]},
    ),
    "exclude regex": (
        llama,
        {"target_modules": ["q_proj", "up_proj"], "exclude_modules": r".*\.[3-9]\..*"},
    ),
    "layers": (llama, {"target_modules": ["q_proj", "k_proj"], "layers_to_transform": [0, 10]}),
    "one layer": (llama, {"target_modules": ["q_proj"], "layers_to_transform": 0}),
    "layers with pattern": (
        llama,
        {"target_modules": ["up_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    ),
    "layers with patterns": (
        llama,
        {
            "target_modules": ["up_proj"],
            "layers_to_transform": [1, 2],
            "layers_pattern": ["h", "lay.rs"],
        },
    ),
    "patterns": (
        llama,
        {
            "target_modules": ["q_proj", "k_proj", "down_proj"],
            "rank_pattern": {"q_proj": 3, r"^model\.layers\.1\.mlp.*": 7, "10.mlp.down_proj": 2},
            "alpha_pattern": {r"layers\.[0-4]\.self_attn\.(q|k)_proj": 32, "down_proj": 1.5},
            "use_rslora": True,
        },
    ),
    # PEFT sorts the keys when it saves: both ranks agree, the alphas are read in file order.
    "overlapping patterns": (
        llama,
        {
            "target_modules": ["q_proj"],
            "rank_pattern": {"q_proj": 3, ".*proj": 3},
            "alpha_pattern": {"q_proj": 9, ".*proj": 5, r"model\.layers\.3\.self_attn\.q_proj": 2},
        },
    ),
    "fused": (phi3, {"target_modules": ["qkv_proj", "gate_up_proj"], "r": 3}),
    "conv1d": (gpt2, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "conv1d all-linear": (gpt2, {"target_modules": "all-linear", "fan_in_fan_out": True}),
}


def deltas(model):
    """PEFT's own delta [N, K] of every module that has an adapter."""
    layers = {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    found = {}
    for name, layer in layers.items():
        delta = layer.get_delta_weight("default").detach().float()
        found[name] = delta.T if layer.fan_in_fan_out else delta
    return found


def compare(model_class, changes, dtype, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(1)
        config = peft.LoraConfig(
            **{"r": 4, "lora_alpha": 8, "init_lora_weights": False, **changes},
            task_type="CAUSAL_LM",
        )
        peft.get_peft_model(model_class(), config).to(dtype).save_pretrained(folder)
        reloaded = peft.PeftModel.from_pretrained(model_class(), folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapter = read_adapter(folder)
    expected = deltas(reloaded)
    assert adapter.modules.keys() == expected.keys() and expected
    assert adapter.dtype == dtype
    for name, module in adapter.modules.items():
        delta = module.scale * (module.b.float() @ module.a.float())
        assert delta.shape == expected[name].shape
        torch.testing.assert_close(delta, expected[name], rtol=1e-6, atol=1e-6)
    return adapter


@pytest.mark.parametrize("case", CASES)
def test_same_deltas_as_peft(tmp_path, case):
    compare(*CASES[case], torch.float32, tmp_path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", ["patterns", "fused"])
def test_same_deltas_in_half_precision(tmp_path, case, dtype):
    compare(*CASES[case], dtype, tmp_path)


def test_merging_our_pairs_gives_pefts_merged_weights(tmp_path):
    adapter = compare(*CASES["patterns"], torch.float32, tmp_path)
    torch.manual_seed(2)
    ours, theirs = llama(), llama()
    theirs.load_state_dict(ours.state_dict())
    for name, module in adapter.modules.items():
        ours.get_submodule(name).weight.data += module.scale * module.b @ module.a
    merged = peft.PeftModel.from_pretrained(theirs, tmp_path).merge_and_unload().state_dict()
    for name, weight in ours.state_dict().items():
        torch.testing.assert_close(weight, merged[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "lora_only"}, "bias"),
        ({"modules_to_save": ["norm"]}, "modules_to_save"),
        ({"init_lora_weights": "olora"}, "olora"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"target_modules": ["q_proj", "lm_head"]}, "lm_head"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "embed"),
    ],
)
def test_what_peft_writes_and_we_refuse(tmp_path, changes, message):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(**{"r": 2, "target_modules": ["q_proj"], **changes})
        peft.get_peft_model(llama(), config).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedAdapterError, match=message):
        read_adapter(tmp_path)


# Fragments of paths and of regexes, so that random patterns match often and in odd ways.
PATHS = [
    "model.layers.1.self_attn.q_proj",
    "model.layers.11.mlp.up_proj",
    "h.1.h.2.c_attn",
    "q_proj",
]
PIECES = [
    "^",
    "q_proj",
    "up_proj",
    "layers",
    "h",
    "1",
    "11",
    ".",
    r"\.",
    ".*",
    "|",
    "(",
    ")",
    "[1-9]",
    "$",
]
REGEXES = st.lists(st.sampled_from(PIECES), max_size=5).map("".join)
NAMES = st.lists(REGEXES, max_size=3)


@settings(max_examples=300, deadline=None, database=None)
@given(
    st.fixed_dictionaries(
        {"target_modules": REGEXES | NAMES | st.just(["q_proj", "up_proj", "c_attn"])},
        optional={
            "exclude_modules": REGEXES | NAMES,
            "rank_pattern": st.dictionaries(REGEXES, st.integers(1, 9), max_size=4),
            "layers_to_transform": st.integers(0, 2) | st.lists(st.integers(0, 11), max_size=2),
            "layers_pattern": REGEXES | NAMES,
        },
    )
)
def test_random_patterns_select_and_rank_as_in_peft(changes):
    from peft.tuners.tuners_utils import check_target_module_exists
    from peft.utils.other import get_pattern_key

    data = json.dumps({"peft_type": "LORA", "r": 10, "lora_alpha": 1, **changes}).encode()
    try:
        config = parse_config(data, "here")
    except AdapterFormatError:
        return
    # Empty values are absent here; PEFT objects to some of them beside a regex.
    present = {name: value for name, value in changes.items() if value not in ("", [])}
    theirs = peft.LoraConfig(r=10, **present)
    for path in PATHS:
        targeted = check_target_module_exists(theirs, path)
        assert config.targets(path) == bool(targeted)
        matched = get_pattern_key(theirs.rank_pattern.keys(), path)
        assert config.rank_of(path) == theirs.rank_pattern.get(matched, 10)
