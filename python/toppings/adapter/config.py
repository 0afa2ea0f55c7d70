# SPDX-License-Identifier: Apache-2.0
"""``adapter_config.json``: which modules an adapter targets, their ranks and their scales."""

import math
import warnings
from dataclasses import dataclass

from toppings.adapter.features import refuse_config
from toppings.adapter.parsing import finite_number, parse_object, positive_int, shown
from toppings.adapter.patterns import LayerFilter, Overrides, Selector
from toppings.errors import AdapterFormatError

MAX_CONFIG_BYTES = 1 << 20

# Keys that PEFT writes and that change nothing at inference, or that refuse_config() has judged.
_KNOWN = """
    alora_invocation_tokens alpha_pattern arrow_config auto_mapping base_model_name_or_path bias
    corda_config ensure_weight_tying eva_config exclude_modules fan_in_fan_out inference_mode
    init_lora_weights kasa_config layer_replication layers_pattern layers_to_transform loftq_config
    lora_alpha lora_bias lora_dropout lora_ga_config megatron_config megatron_core modules_to_save
    monteclora_config peft_type peft_version qalora_group_size r rank_pattern revision
    runtime_config target_modules target_parameters task_type trainable_token_indices use_bdlora
    use_dora use_qalora use_rslora velora_config
"""
_MAX_LISTED = 8


@dataclass(frozen=True)
class LoraConfig:
    """What an adapter's config says of a module, given by its path in the base model."""

    rank: int
    alpha: float
    rslora: bool
    rank_pattern: Overrides[int]
    alpha_pattern: Overrides[float]
    target: Selector
    exclude: Selector
    layers: LayerFilter | None

    def rank_of(self, module: str) -> int:
        return self.rank_pattern.get(module, self.rank)

    def scale_of(self, module: str) -> float:
        """alpha / r, or alpha / sqrt(r) with rank-stabilised LoRA, both the module's own."""
        rank = self.rank_of(module)
        alpha = self.alpha_pattern.get(module, self.alpha)
        return alpha / (math.sqrt(rank) if self.rslora else rank)

    def targets(self, module: str) -> bool:
        """Whether PEFT would put an adapter on ``module``; exclusion wins."""
        if self.exclude.matches(module) or not self.target.matches(module):
            return False
        # In PEFT a full path in target_modules stands, whatever layers_to_transform says.
        return self.layers is None or self.target.names(module) or self.layers.keeps(module)


def parse_config(data: bytes, where: str) -> LoraConfig:
    """Parses the bytes of an ``adapter_config.json``.

    Raises UnsupportedAdapterError for features refused by name, AdapterFormatError for the rest.
    ``r``, ``lora_alpha`` and ``target_modules`` are required: PEFT's defaults for them depend on
    its version and on the model. Keys that nobody knows are listed in one warning and ignored.
    """
    raw = parse_object(data, "adapter_config.json", where)
    refuse_config(raw, where)
    _warn_unknown(raw, where)
    rslora = raw.get("use_rslora") or False
    if not isinstance(rslora, bool):
        raise AdapterFormatError(
            f"use_rslora: expected true or false, got {shown(rslora)} ({where})"
        )
    target = _parse_target(raw.get("target_modules"), where)
    ranks = {
        key: positive_int(value, f"rank_pattern[{shown(key)}]", where)
        for key, value in _table(raw, "rank_pattern", where).items()
    }
    alphas = {
        key: finite_number(value, f"alpha_pattern[{shown(key)}]", where)
        for key, value in _table(raw, "alpha_pattern", where).items()
    }
    return LoraConfig(
        rank=positive_int(raw.get("r"), "r", where),
        alpha=finite_number(raw.get("lora_alpha"), "lora_alpha", where),
        rslora=rslora,
        rank_pattern=Overrides.parse(ranks, "rank_pattern", where),
        alpha_pattern=Overrides.parse(alphas, "alpha_pattern", where),
        target=target,
        exclude=Selector.parse(raw.get("exclude_modules") or [], "exclude_modules", where),
        layers=_parse_layers(raw, where),
    )


def _parse_target(value: object, where: str) -> Selector:
    if not value:
        raise AdapterFormatError(
            'target_modules: expected a list of names, a regex or "all-linear", '
            f"got {shown(value)} ({where})"
        )
    # Output layers, which PEFT leaves out of all-linear, are refused by their tensors' names.
    if isinstance(value, str) and value.lower() == "all-linear":
        return Selector(everything=True)
    return Selector.parse(value, "target_modules", where)


def _parse_layers(raw: dict[str, object], where: str) -> LayerFilter | None:
    indices, names = raw.get("layers_to_transform"), raw.get("layers_pattern")
    if indices in (None, []) and names in (None, [], ""):
        return None
    if isinstance(raw.get("target_modules"), str):
        raise AdapterFormatError(
            "layers_to_transform: expected it absent where target_modules is a string, "
            f"got it set ({where})"
        )
    if indices in (None, []):
        raise AdapterFormatError(
            f"layers_pattern: expected layers_to_transform beside it, got none ({where})"
        )
    return LayerFilter.parse(indices, names, where)


def _table(raw: dict[str, object], key: str, where: str) -> dict[str, object]:
    value = raw.get(key) or {}
    if not isinstance(value, dict):
        raise AdapterFormatError(f"{key}: expected an object, got {shown(value)} ({where})")
    return value


def _warn_unknown(raw: dict[str, object], where: str) -> None:
    unknown = sorted(raw.keys() - set(_KNOWN.split()))
    if unknown:
        listed = ", ".join(shown(key) for key in unknown[:_MAX_LISTED])
        more = f" and {len(unknown) - _MAX_LISTED} more" if len(unknown) > _MAX_LISTED else ""
        warnings.warn(
            f"adapter_config.json: unknown keys ignored: {listed}{more} ({where})", stacklevel=3
        )
