# SPDX-License-Identifier: Apache-2.0
"""Tiny seeded decoders of several architectures, PEFT adapters on them, and PEFT's answers."""

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model

import toppings

VOCAB = 128
_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
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
    "llama": transformers.LlamaConfig(**_COMMON),
    "qwen2": transformers.Qwen2Config(**_COMMON),
    "qwen3": transformers.Qwen3Config(**_COMMON),
    "mistral": transformers.MistralConfig(**_COMMON, sliding_window=7),
    "gemma": transformers.GemmaConfig(**_COMMON),
    # The defaults, 50 and 30, would leave such small numbers as they are.
    "gemma2": transformers.Gemma2Config(
        **_COMMON, sliding_window=6, attn_logit_softcapping=0.5, final_logit_softcapping=0.2
    ),
    "gemma3": transformers.Gemma3TextConfig(**_COMMON, sliding_window=6),
    "phi3": transformers.Phi3Config(**_COMMON),
}
ARCHITECTURES = list(CONFIGS)

_SPLIT = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
_FUSED = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]  # Phi3


def linears(arch: str) -> list[str]:
    return _FUSED if arch == "phi3" else _SPLIT


def adapter_configs(arch: str) -> dict[str, LoraConfig]:
    every = linears(arch)
    options: dict[str, dict[str, Any]] = {
        "odd": {"r": 3, "lora_alpha": 6, "target_modules": every},
        "rslora": {"r": 16, "lora_alpha": 6, "use_rslora": True, "target_modules": every},
        "patterns": {
            "r": 8,
            "lora_alpha": 12,
            "target_modules": every,
            "rank_pattern": {"down_proj": 5, r"layers\.1\.self_attn\.o_proj": 2},
            "alpha_pattern": {"down_proj": 4},
        },
        "attention": {
            "r": 8,
            "lora_alpha": 16,
            "target_modules": ["qkv_proj"] if arch == "phi3" else ["q_proj", "v_proj"],
        },
        "layers": {
            "r": 5,
            "lora_alpha": 15,
            "target_modules": every,
            "layers_to_transform": [1],
        },
    }
    return {k: LoraConfig(init_lora_weights=False, **v) for k, v in options.items()}


ADAPTERS = list(adapter_configs("llama"))
TENANTS: list[str | None] = [None, *ADAPTERS]


@torch.no_grad()
def make_model(arch: str, dtype: torch.dtype = torch.float32) -> transformers.PreTrainedModel:
    """The same weights at every call, all of them exact in bf16."""
    config = copy.deepcopy(CONFIGS[arch])  # set_attn_implementation() writes to it
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(2)
    for key, parameter in model.named_parameters():
        # Large enough that attention isn't flat, and no bias is zero. Small embeddings: tied to the
        # head and scaled, Gemma's would only repeat the last token.
        if "norm" not in key:
            std = 0.02 if "embed" in key else 0.12
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
        parameter.copy_(parameter.bfloat16())
    return model.to(dtype)


def make_peft(arch: str, config: LoraConfig, seed: int) -> torch.nn.Module:
    peft = get_peft_model(make_model(arch), config).eval()
    generator = torch.Generator().manual_seed(seed)
    for key, parameter in peft.named_parameters():
        if "lora_" in key:
            noise = torch.randn(parameter.shape, generator=generator) * 0.12
            parameter.data = noise.bfloat16().float()
    return peft


@dataclass
class World:
    """A base model, its adapters as PEFT folders, and the PEFT models to compare with."""

    arch: str
    folder: Path
    peft: dict[str | None, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.peft[None] = make_model(self.arch)
        self.peft[None].generation_config.eos_token_id = None
        for seed, (name, config) in enumerate(adapter_configs(self.arch).items()):
            self.add(name, config, seed)
        self._answers: dict[tuple[str | None, tuple[int, ...], int], list[int]] = {}

    def add(self, name: str, config: LoraConfig, seed: int) -> Path:
        peft = make_peft(self.arch, config, seed)
        peft.generation_config.eos_token_id = None  # type: ignore[union-attr]
        peft.save_pretrained(str(self.path(name)))  # type: ignore[operator]
        self.peft[name] = peft
        return self.path(name)

    def path(self, name: str) -> Path:
        return self.folder / name

    def greedy(self, name: str | None, prompt: tuple[int, ...], count: int) -> list[int]:
        """What PEFT generates; it goes on after an end of sequence, as with ignore_eos."""
        key = name, prompt, count
        if key not in self._answers:
            ids = torch.tensor([prompt])
            output = self.peft[name].generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=count,
                do_sample=False,
            )
            self._answers[key] = output[0, len(prompt) :].tolist()
        return self._answers[key]

    @torch.inference_mode()
    def logits(self, name: str | None, prompt: tuple[int, ...]) -> torch.Tensor:
        return self.peft[name](input_ids=torch.tensor([prompt])).logits[0]

    def engine(self, dtype: torch.dtype = torch.float32, **options: Any) -> toppings.Engine:
        """With all adapters added."""
        engine = toppings.Engine(make_model(self.arch, dtype), **options)
        for name in ADAPTERS:
            engine.add_adapter(name, self.path(name))
        return engine


def prompt_of(length: int, seed: int = 0) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(1000 * seed + length)
    return tuple(torch.randint(3, VOCAB, (length,), generator=generator).tolist())


def greedy(count: int, **options: Any) -> toppings.SamplingParams:
    return toppings.SamplingParams(max_tokens=count, ignore_eos=True, **options)
