# SPDX-License-Identifier: Apache-2.0
"""Tiny seeded decoders, PEFT adapters on them, and what PEFT answers."""

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model

COMMON = {
    "vocab_size": 128,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "tie_word_embeddings": False,  # tied, an untrained model repeats its last token
}
CONFIGS: dict[str, transformers.PreTrainedConfig] = {
    "llama": transformers.LlamaConfig(**COMMON),
    "qwen2": transformers.Qwen2Config(**COMMON),
    "qwen3": transformers.Qwen3Config(**COMMON),
    "mistral": transformers.MistralConfig(**COMMON, sliding_window=7),
    "gemma": transformers.GemmaConfig(**COMMON),
    "gemma2": transformers.Gemma2Config(**COMMON, sliding_window=6),
    "gemma3": transformers.Gemma3TextConfig(**COMMON, sliding_window=6),
    "phi3": transformers.Phi3Config(**COMMON),
}
ADAPTERS: dict[str, dict[str, Any]] = {
    "odd": {"r": 3, "lora_alpha": 6, "target_modules": "all-linear"},
    "rslora": {"r": 8, "lora_alpha": 4, "use_rslora": True, "target_modules": "all-linear"},
    "attention": {
        "r": 16,
        "lora_alpha": 16,
        "target_modules": r".*\.(q_proj|v_proj|qkv_proj)",
    },
    "patterns": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": "all-linear",
        "rank_pattern": {"down_proj": 7, r"layers\.1\.self_attn\.o_proj": 2},
        "alpha_pattern": {"down_proj": 3},
    },
}


def make_model(
    name: str, seed: int = 1, dtype: torch.dtype = torch.float32
) -> transformers.PreTrainedModel:
    # A copy: the attention implementation is a property of the config, which models would share.
    torch.manual_seed(seed)
    config = copy.deepcopy(CONFIGS[name])
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("bias"):
                parameter.normal_(0, 0.05)
            parameter.copy_(parameter.bfloat16())  # so that bf16 runs have the same weights
    return model.to(dtype)


@dataclass
class Tenants:
    """A base model, adapters saved as PEFT folders, and PEFT models to compare with."""

    name: str
    folder: Path
    references: dict[str | None, torch.nn.Module] = field(default_factory=dict)

    @classmethod
    def make(cls, name: str, folder: Path, seed: int = 0) -> "Tenants":
        tenants = cls(name, folder, {None: make_model(name)})
        for i, (adapter, options) in enumerate(ADAPTERS.items()):
            peft = get_peft_model(make_model(name), LoraConfig(**options)).eval()
            generator = torch.Generator().manual_seed(100 * seed + i)
            for key, parameter in peft.named_parameters():
                if "lora_" in key:
                    noise = torch.randn(parameter.shape, generator=generator) * 0.1
                    parameter.data = noise.bfloat16().float()
            peft.save_pretrained(str(folder / adapter))
            tenants.references[adapter] = peft
        return tenants

    def path(self, adapter: str) -> Path:
        return self.folder / adapter

    def greedy(self, adapter: str | None, prompt: tuple[int, ...], count: int) -> list[int]:
        """What PEFT generates."""
        ids = torch.tensor([prompt])
        output = self.references[adapter].generate(  # type: ignore[operator]
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            do_sample=False,
        )
        return output[0, len(prompt) :].tolist()

    @torch.inference_mode()
    def logits(self, adapter: str | None, prompt: tuple[int, ...]) -> torch.Tensor:
        return self.references[adapter](input_ids=torch.tensor([prompt])).logits[0]


def random_prompt(length: int, seed: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(3, 128, (length,), generator=generator).tolist())
