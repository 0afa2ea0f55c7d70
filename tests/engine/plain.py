# SPDX-License-Identifier: Apache-2.0
"""A small seeded Llama, adapters on it, and the plain answer: the weights W + s·B·A in the model
itself. Needs no PEFT, which a machine with a GPU may lack.
"""

import copy
from dataclasses import dataclass, field

import torch
import transformers

import toppings

VOCAB = 256
LAYERS = 4
RANKS = {"r4": 4, "r16": 16, "r64": 64}  # and "part", of rank 8, in some projections
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def make_llama() -> transformers.PreTrainedModel:
    """4 layers, 10 MB in fp32: the same weights at every call, on the CPU."""
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        eos_token_id=None,
    )
    torch.manual_seed(1)
    model = transformers.LlamaForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "norm" not in key:
                std = 0.02 if "embed" in key else 0.06
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
            parameter.copy_(parameter.bfloat16())  # exact in bf16
    return model


def make_adapter(model: torch.nn.Module, rank: int, seed: int, part: bool = False):
    """On every linear of the layers; `part`: only q and down, and those not in every layer."""
    generator = torch.Generator().manual_seed(seed)
    modules = {}
    for path, linear in model.named_modules():
        name = path.rpartition(".")[2]
        if name not in LINEARS or (part and not _is_chosen(path, name)):
            continue
        a = torch.randn(rank, linear.in_features, generator=generator) * 0.08
        b = torch.randn(linear.out_features, rank, generator=generator) * 0.08
        modules[path] = a.bfloat16().float(), b.bfloat16().float(), 0.5
    return toppings.Adapter.from_tensors(modules)


def _is_chosen(path: str, name: str) -> bool:
    return (name == "q_proj" and ".0." not in path) or (name == "down_proj" and ".3." not in path)


@dataclass
class PlainWorld:
    """A model, adapters by name, and the merged models to compare with, all on one device."""

    device: str
    adapters: dict[str, toppings.Adapter] = field(default_factory=dict)

    def __post_init__(self) -> None:
        model = make_llama()
        for seed, (name, rank) in enumerate(RANKS.items()):
            self.adapters[name] = make_adapter(model, rank, seed)
        self.adapters["part"] = make_adapter(model, 8, 9, part=True)
        self.tenants: list[str | None] = [None, *self.adapters]
        self._merged: dict[str | None, torch.nn.Module] = {}
        self._answers: dict[tuple[str | None, tuple[int, ...], int], list[int]] = {}

    def model(self, dtype: torch.dtype = torch.float32) -> transformers.PreTrainedModel:
        return make_llama().to(self.device, dtype)

    @torch.no_grad()
    def merged(self, name: str | None) -> torch.nn.Module:
        if name not in self._merged:
            model = copy.deepcopy(make_llama())
            for path, module in self.adapters[name].modules.items() if name else ():
                weight = model.get_submodule(path).weight
                weight += module.scale * (module.b.double() @ module.a.double()).float()
            self._merged[name] = model.to(self.device)
        return self._merged[name]

    @torch.inference_mode()
    def logits(self, name: str | None, tokens: tuple[int, ...]) -> torch.Tensor:
        ids = torch.tensor([tokens], device=self.device)
        return self.merged(name)(input_ids=ids, use_cache=False).logits[0].cpu()

    def greedy(self, name: str | None, prompt: tuple[int, ...], count: int) -> list[int]:
        key = name, prompt, count
        if key not in self._answers:
            tokens = prompt
            for _ in range(count):
                tokens = *tokens, int(self.logits(name, tokens)[-1].argmax())
            self._answers[key] = list(tokens[len(prompt) :])
        return self._answers[key]


def prompt_of(length: int, seed: int = 0) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(1000 * seed + length)
    return tuple(torch.randint(0, VOCAB, (length,), generator=generator).tolist())


def greedy(count: int) -> toppings.SamplingParams:
    return toppings.SamplingParams(max_tokens=count, ignore_eos=True)
