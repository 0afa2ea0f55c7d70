# SPDX-License-Identifier: Apache-2.0
"""Everything an adapter may ask for that toppings refuses by name, in one place."""

from toppings.adapter.parsing import shown
from toppings.errors import AdapterFormatError, UnsupportedAdapterError

# Config key → what it stands for. Null, false, empty strings, lists and objects count as absent.
_KEYS = {
    "use_dora": "DoRA",
    "lora_bias": "a bias on lora_B",
    "modules_to_save": "full weights beside the adapter",
    "layer_replication": "replicated layers, another base model",
    "target_parameters": "LoRA on bare parameters (MoE experts)",
    "alora_invocation_tokens": "activated LoRA (aLoRA)",
    "trainable_token_indices": "trained token embeddings",
    "use_qalora": "QALoRA",
    "use_bdlora": "block-diagonal LoRA",
    "arrow_config": "Arrow routing",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "velora_config": "VeLoRA",
    "megatron_config": "Megatron parallel layers",
}

# These leave the base weight alone; the trained values are in A and B.
_INIT_ACCEPTED = {"gaussian", "eva", "orthogonal", "mica"}

# One component of a tensor's name → what it stands for.
_TENSOR_PARTS = {
    "lora_magnitude_vector": "DoRA",
    "lora_embedding_A": "embedding LoRA",
    "lora_embedding_B": "embedding LoRA",
    "experts": "a MoE expert adapter",
    "base_layer": "a copy of base weights",
    "modules_to_save": "full weights beside the adapter",
    "trainable_tokens_delta": "trained token embeddings",
    "token_adapter": "trained token embeddings",
    "lora_diag": "KaSA",
    "lora_E": "AdaLoRA",
    "lora_up": "kohya's LoRA format",
    "lora_down": "kohya's LoRA format",
    "alpha": "kohya's LoRA format",
}

_OUTPUT_LAYERS = ("lm_head", "embed_out")


def _absent(value: object) -> bool:
    # 0 is not absent: it is a layer index or a token id.
    return value is None or value is False or value in ("", [], {})


def refuse_config(raw: dict[str, object], where: str) -> None:
    """Raises for the first feature of an ``adapter_config.json`` that cannot be served."""

    def refuse(key: str, expected: str, got: str) -> None:
        raise UnsupportedAdapterError(f"{key}: expected {expected}, got {got} ({where})")

    peft_type = raw.get("peft_type")
    if not isinstance(peft_type, str):
        raise AdapterFormatError(
            f'peft_type: expected the string "LORA", got {shown(peft_type)} ({where})'
        )
    if peft_type != "LORA":
        refuse("peft_type", "LORA", shown(peft_type))
    for key, meaning in _KEYS.items():
        if not _absent(raw.get(key)):
            refuse(key, "it absent or empty", f"{meaning}, which is not supported")
    if raw.get("bias") not in (None, "none"):
        refuse("bias", '"none"', shown(raw["bias"]))
    init = raw.get("init_lora_weights")
    if not (init is None or isinstance(init, bool)) and (
        not isinstance(init, str) or init.lower() not in _INIT_ACCEPTED
    ):
        refuse(
            "init_lora_weights",
            "one that leaves the base weights alone (convert the adapter to plain LoRA)",
            shown(init),
        )
    targets = raw.get("target_modules")
    for name in targets if isinstance(targets, list) else [targets]:
        if isinstance(name, str) and name.rpartition(".")[2] in _OUTPUT_LAYERS:
            refuse("target_modules", "no output layer", shown(name))


def tensor_feature(name: str) -> str | None:
    """What the tensor ``name`` stands for if that is refused, None for an ordinary name."""
    parts = name.split(".")
    for part in parts:
        if part in _TENSOR_PARTS:
            return _TENSOR_PARTS[part]
    if name.endswith((".lora_A.bias", ".lora_B.bias")):
        return "a bias on lora_B"
    if any(part in _OUTPUT_LAYERS for part in parts):
        return "the output layer (lm_head)"
    return None
