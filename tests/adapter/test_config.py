# SPDX-License-Identifier: Apache-2.0
"""What adapter_config.json says of ranks, scales and targets, and what is wrong with it."""

import json
import math
import warnings

import pytest

from toppings.adapter.config import parse_config
from toppings.errors import AdapterFormatError, UnsupportedAdapterError

from .attacks import CONFIG

Q3 = "model.layers.3.self_attn.q_proj"
Q13 = "model.layers.13.self_attn.q_proj"


def parse(**changes):
    return parse_config(json.dumps({**CONFIG, **changes}).encode(), "here")


def test_rank_and_scale_of_every_module():
    config = parse(r=8, lora_alpha=16)
    assert (config.rank_of(Q3), config.scale_of(Q3)) == (8, 2.0)


def test_alpha_may_be_a_float_and_rslora_divides_by_the_root():
    config = parse(r=7, lora_alpha=2.5, use_rslora=True)
    assert config.scale_of(Q3) == 2.5 / math.sqrt(7)


@pytest.mark.parametrize(
    ("pattern", "module", "rank"),
    [
        ({"q_proj": 3}, Q3, 3),
        ({"proj": 3}, Q3, 8),  # a key begins at a dot
        ({".*proj": 3}, Q3, 3),
        ({"q_pro": 3}, Q3, 8),  # and ends at the end
        ({f"^{Q3}": 3}, Q3, 3),
        ({f"^{Q3}": 3}, Q13, 8),
        ({"^q_proj": 3}, Q3, 8),
        ({"3.self_attn.q_proj": 3}, Q13, 8),
        ({r"layers\.(3|4)\..*": 3}, Q3, 3),
        ({"q_proj|v_proj": 3}, Q3, 3),
        ({"selfxattn.q_proj": 3, "self.attn.q_proj": 4}, Q3, 4),  # a dot is any character
        ({"q_proj": 3, Q3: 4}, Q3, 3),  # the first one decides
        ({Q3: 4, "q_proj": 3}, Q3, 4),
    ],
)
def test_pattern_rule(pattern, module, rank):
    assert parse(r=8, rank_pattern=pattern).rank_of(module) == rank
    assert parse(r=1, lora_alpha=8, alpha_pattern=pattern).scale_of(module) == rank


def test_patterns_combine_per_module():
    config = parse(r=8, lora_alpha=8, rank_pattern={"q_proj": 4}, alpha_pattern={"q_proj": 6.0})
    assert config.scale_of(Q3) == 1.5
    assert config.scale_of("model.layers.3.self_attn.v_proj") == 1.0


@pytest.mark.parametrize(
    ("changes", "module", "expected"),
    [
        ({"target_modules": ["q_proj"]}, Q3, True),
        ({"target_modules": ["proj"]}, Q3, False),
        ({"target_modules": [Q3]}, Q3, True),
        ({"target_modules": ["3.self_attn.q_proj"]}, Q13, False),
        ({"target_modules": r".*\.q_proj"}, Q3, True),
        ({"target_modules": "q_proj"}, Q3, False),
        ({"target_modules": "all-linear"}, "model.layers.0.mlp.gate_up_proj", True),
        ({"target_modules": "All-Linear"}, Q3, True),
        ({"exclude_modules": ["q_proj"]}, Q3, False),
        ({"exclude_modules": ["3.self_attn.q_proj"]}, Q13, True),
        ({"exclude_modules": r".*layers\.3\..*"}, Q3, False),
        ({"exclude_modules": []}, Q3, True),
        ({"layers_to_transform": 3}, Q3, True),
        ({"layers_to_transform": 3}, Q13, False),
        ({"layers_to_transform": 0}, Q3, False),
        ({"layers_to_transform": 0, "target_modules": [Q3]}, Q3, True),  # a full path wins
        ({"layers_to_transform": 0, "target_modules": [Q3], "exclude_modules": [Q3]}, Q3, False),
        ({"layers_to_transform": []}, Q3, True),
        ({"layers_to_transform": [3, 13], "layers_pattern": "layers"}, Q13, True),
        ({"layers_to_transform": [3], "layers_pattern": ["h", "layers"]}, Q3, True),
        ({"layers_to_transform": [3], "layers_pattern": "h"}, Q3, False),
        ({"layers_to_transform": [3], "layers_pattern": "layer"}, Q3, False),
        ({"layers_to_transform": [3], "layers_pattern": ""}, Q3, True),
        ({"layers_to_transform": [3]}, "layers.3.q_proj", False),
        ({"layers_to_transform": [3], "layers_pattern": "layers"}, "layers.3.q_proj", True),
        ({"layers_to_transform": [3], "layers_pattern": "layers|h"}, Q3, False),
    ],
)
def test_targets(changes, module, expected):
    assert parse(**changes).targets(module) is expected


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"use_dora": True}, "use_dora.*DoRA"),
        ({"bias": "all"}, "bias.*'all'"),
        ({"bias": "lora_only"}, "bias.*'lora_only'"),
        ({"lora_bias": True}, "lora_bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights.*'pissa'"),
        ({"init_lora_weights": "pissa_niter_16"}, "pissa_niter_16"),
        ({"init_lora_weights": "OLoRA"}, "init_lora_weights.*'OLoRA'"),
        ({"init_lora_weights": "corda"}, "corda"),
        ({"init_lora_weights": "loftq"}, "loftq"),
        ({"init_lora_weights": "lora_ga"}, "lora_ga"),
        ({"init_lora_weights": "not yet invented"}, "not yet invented"),
        ({"init_lora_weights": ["pissa"]}, "init_lora_weights"),
        ({"layer_replication": [[0, 4], [2, 5]]}, "layer_replication"),
        ({"target_parameters": ["experts.gate_up_proj"]}, "target_parameters"),
        ({"alora_invocation_tokens": [5]}, "alora_invocation_tokens"),
        ({"trainable_token_indices": [0]}, "trainable_token_indices"),
        ({"use_qalora": True}, "use_qalora"),
        ({"use_bdlora": {"nblocks": 2}}, "use_bdlora"),
        ({"arrow_config": {"top_k": 3}}, "arrow_config"),
        ({"kasa_config": {"beta": 1e-4}}, "kasa_config"),
        ({"monteclora_config": {"num_samples": 8}}, "monteclora_config"),
        ({"velora_config": {"rank": 1}}, "velora_config"),
        ({"megatron_config": {"layers": 2}}, "megatron_config"),
        ({"peft_type": "IA3"}, "peft_type.*'IA3'"),
        ({"peft_type": "ADALORA"}, "peft_type.*'ADALORA'"),
        ({"target_modules": ["q_proj", "lm_head"]}, "target_modules.*'lm_head'"),
    ],
)
def test_refused_by_name(changes, name):
    with pytest.raises(UnsupportedAdapterError, match=name):
        parse(**changes)


def test_null_empty_and_false_mean_absent():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        parse(
            use_dora=False,
            bias=None,
            lora_bias=None,
            modules_to_save=[],
            init_lora_weights=None,
            layer_replication=None,
            target_parameters=[],
            trainable_token_indices=None,
            use_qalora=False,
            qalora_group_size=16,
            use_bdlora=None,
            loftq_config={},
            megatron_config=None,
            megatron_core="megatron.core",
            rank_pattern=None,
            exclude_modules=None,
            use_rslora=None,
            runtime_config={"ephemeral_gpu_offload": False},
        )


@pytest.mark.parametrize("init", [True, False, "gaussian", "eva", "orthogonal", "mica"])
def test_initialisations_that_leave_the_base_alone(init):
    assert parse(init_lora_weights=init).rank == 2


def test_unknown_keys_are_one_warning():
    with pytest.warns(UserWarning, match="'frobnicate', 'zz'.*here") as caught:
        parse(zz=1, frobnicate=[2])
    assert len(caught) == 1


def test_many_unknown_keys_are_clipped():
    with pytest.warns(UserWarning, match="and 92 more") as caught:
        parse(**{f"unknown_{i:03}": 1 for i in range(100)})
    assert len(str(caught[0].message)) < 400


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 0}, "r: expected a positive integer, got 0"),
        ({"r": -1}, "r: .*got -1"),
        ({"r": True}, "r: .*got true"),
        ({"r": 8.0}, "r: .*got 8.0"),
        ({"r": None}, "r: .*got null"),
        ({"r": 2**40}, "r: expected a positive integer"),
        ({"lora_alpha": "16"}, "lora_alpha: expected a finite number, got '16'"),
        ({"lora_alpha": None}, "lora_alpha: .*null"),
        ({"lora_alpha": False}, "lora_alpha: .*false"),
        ({"use_rslora": "yes"}, "use_rslora: expected true or false, got 'yes'"),
        ({"rank_pattern": [1]}, "rank_pattern: expected an object, got an array"),
        ({"rank_pattern": {"q_proj": 0}}, r"rank_pattern\['q_proj'\]: .*got 0"),
        ({"alpha_pattern": {"q_proj": None}}, r"alpha_pattern\['q_proj'\]: .*null"),
        ({"rank_pattern": {"(": 1}}, r"rank_pattern: expected a valid regex, got '\('"),
        ({"alpha_pattern": {"a{2,1}": 1}}, "alpha_pattern: expected a valid regex"),
        ({"rank_pattern": {"q" * 1025: 1}}, "rank_pattern: .*1024 characters, got 1025"),
        ({"target_modules": None}, "target_modules: .*got null"),
        ({"target_modules": []}, "target_modules"),
        ({"target_modules": ""}, "target_modules"),
        ({"target_modules": {"q": 1}}, "target_modules: expected a list of strings"),
        ({"target_modules": ["q_proj", 3]}, "target_modules: expected a list of strings"),
        ({"target_modules": "*q"}, r"target_modules: expected a valid regex, got '\*q'"),
        ({"target_modules": "(" * 900 + ")" * 100}, "target_modules: expected a valid regex"),
        ({"target_modules": "a{99999999999}"}, "target_modules: expected a valid regex"),
        ({"exclude_modules": "["}, "exclude_modules: expected a valid regex"),
        ({"exclude_modules": 3}, "exclude_modules: expected a list of strings, got 3"),
        ({"layers_to_transform": "3"}, "layers_to_transform: expected an integer.*'3'"),
        ({"layers_to_transform": [1, True]}, "layers_to_transform: .*true"),
        ({"layers_to_transform": [[1]]}, "layers_to_transform: .*an array"),
        ({"layers_pattern": "layers"}, "layers_pattern: expected layers_to_transform"),
        ({"layers_to_transform": 1, "layers_pattern": "("}, "layers_pattern: .*valid regex"),
        ({"layers_to_transform": 1, "layers_pattern": 7}, "layers_pattern: .*list of strings"),
        ({"layers_to_transform": 1, "target_modules": ".*q_proj"}, "layers_to_transform: .*string"),
        ({"peft_type": None}, "peft_type: .*null"),
        ({"peft_type": ["LORA"]}, "peft_type: .*an array"),
    ],
)
def test_wrong_values(changes, message):
    with pytest.raises(AdapterFormatError, match=message) as caught:
        parse(**changes)
    assert "(here)" in str(caught.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "invalid JSON"),
        (b"{", "invalid JSON at line 1"),
        (b"\xef\xbb\xbf{}", "invalid JSON"),
        (b'{"r": "\xff"}', "not UTF-8 at offset 7"),
        (b"[1]", "got an array"),
        (b"null", "got null"),
        (b'{"r": 1, "r": 2}', "the key 'r' twice"),
        (b'{"r": {"a": 1, "b": 2, "a": 3}}', "the key 'a' twice"),
        (b'{"lora_alpha": NaN}', "NaN"),
        (b'{"lora_alpha": -Infinity}', "-Infinity"),
        (b'{"r": ' + b"9" * 5000 + b"}", "a number of 5000 digits"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
    ],
)
def test_not_a_json_object(data, message):
    with pytest.raises(AdapterFormatError, match=f"adapter_config.json.*{message}.*here"):
        parse_config(data, "here")


def test_alpha_beyond_float_is_refused():
    data = json.dumps(CONFIG).replace('"lora_alpha": 4', '"lora_alpha": 1e999').encode()
    with pytest.raises(AdapterFormatError, match="lora_alpha: expected a finite number"):
        parse_config(data, "here")


def test_messages_stay_short_and_printable():
    with pytest.raises(UnsupportedAdapterError) as caught:
        parse(peft_type="\x1b[31m\u202e\ud800" + "x" * 100_000)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 300
