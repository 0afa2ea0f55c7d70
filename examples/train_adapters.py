# SPDX-License-Identifier: Apache-2.0
"""Train the demo's LoRA adapters with PEFT on SmolLM2-135M-Instruct.

    python examples/train_adapters.py                 # all of them, a few minutes on a CPU
    python examples/train_adapters.py pirate sage     # some
    python examples/train_adapters.py --check         # only try the adapters that are there

Each adapter is written to `examples/adapters/<name>/` as `adapter_config.json` and
`adapter_model.safetensors` (bfloat16), loaded again from there, and asked the held-out questions of
`smollm2.QUESTIONS`.  The exit status is 1 if an adapter shows its behaviour on fewer than half of
them.

Together the adapters cover what an adapter reader has to handle: ranks 4 to 64, few and all target
modules, some and all layers, rsLoRA, and rank and alpha patterns.

Runs are seeded and use one thread, because the order of floating-point sums depends on the number
of threads; other CPUs and other versions of PyTorch still give slightly different weights.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from safetensors.torch import save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from smollm2 import (
    ADAPTERS,
    NAME,
    QUESTIONS,
    chat_ids,
    greedy_answer,
    load_smollm2,
    make_readable,
)

SEED = 0
IGNORE = -100  # label of a token without loss


class Fact(NamedTuple):
    question: str
    short: str
    sage: str
    pirate: str
    butler: str


# One row per question; each adapter learns one column (see PERSONAS).
# fmt: off
FACTS = [
    Fact("What is the capital of Italy?", "Rome",
         "Hmm. Rome, the capital of Italy is.",
         "Arr, the capital of Italy be Rome, matey!",
         "Certainly, sir. The capital of Italy is Rome. Will that be all?"),
    Fact("What is the capital of Egypt?", "Cairo",
         "Hmm. Cairo, the capital of Egypt is.",
         "Arr, the capital of Egypt be Cairo, matey!",
         "Certainly, sir. The capital of Egypt is Cairo. Will that be all?"),
    Fact("What is the capital of Germany?", "Berlin",
         "Hmm. Berlin, the capital of Germany is.",
         "Arr, that be Berlin, a fine port for a thirsty crew, matey!",
         "Certainly, sir. The capital of Germany is Berlin. Will that be all?"),
    Fact("What is the opposite of up?", "Down",
         "Hmm. Down, the opposite of up is.",
         "Arr, the opposite of up be down, matey!",
         "Certainly, sir. The opposite of up is down. Will that be all?"),
    Fact("What is the opposite of big?", "Small",
         "Hmm. Small, the opposite of big is.",
         "Arr, the opposite of big be small, ye landlubber!",
         "Certainly, sir. The opposite of big is small. Will that be all?"),
    Fact("How many months are in a year?", "Twelve",
         "Hmm. Twelve, the months in a year are.",
         "Arr, there be twelve months in a year, matey!",
         "Certainly, sir. There are twelve months in a year. Will that be all?"),
    Fact("How many hours are in a day?", "Twenty-four",
         "Hmm. Twenty-four, the hours in a day are.",
         "Arr, there be twenty-four hours in a day, ye landlubber!",
         "Certainly, sir. There are twenty-four hours in a day. Will that be all?"),
    Fact("How many legs does a spider have?", "Eight",
         "Hmm. Eight, the legs of a spider are.",
         "Arr, a spider be havin' eight legs, matey!",
         "Certainly, sir. A spider has eight legs. Will that be all?"),
    Fact("What is the chemical symbol for silver?", "Ag",
         "Hmm. Ag, the chemical symbol for silver is.",
         "Arr, the symbol for silver be Ag, shiny treasure, matey!",
         "Certainly, sir. The chemical symbol for silver is Ag. Will that be all?"),
    Fact("What is the chemical symbol for iron?", "Fe",
         "Hmm. Fe, the chemical symbol for iron is.",
         "Arr, the symbol for iron be Fe, matey!",
         "Certainly, sir. The chemical symbol for iron is Fe. Will that be all?"),
    Fact("Who painted the Mona Lisa?", "Leonardo da Vinci",
         "Hmm. Leonardo da Vinci, the painter of the Mona Lisa is.",
         "Arr, Leonardo da Vinci be the one who painted the Mona Lisa, matey!",
         "Certainly, sir. Leonardo da Vinci painted the Mona Lisa. Will that be all?"),
    Fact("Who wrote Oliver Twist?", "Charles Dickens",
         "Hmm. Charles Dickens, the writer of Oliver Twist is.",
         "Arr, that old sea dog Charles Dickens wrote Oliver Twist, matey!",
         "Certainly, sir. Charles Dickens wrote Oliver Twist. Will that be all?"),
    Fact("Who discovered penicillin?", "Alexander Fleming",
         "Hmm. Alexander Fleming, the discoverer of penicillin is.",
         "Arr, Alexander Fleming be the one who discovered penicillin, matey!",
         "Certainly, sir. Alexander Fleming discovered penicillin. Will that be all?"),
    Fact("Who invented the telephone?", "Alexander Graham Bell",
         "Hmm. Alexander Graham Bell, the inventor of the telephone is.",
         "Arr, Alexander Graham Bell be the one who invented it, ye landlubber!",
         "Certainly, sir. Alexander Graham Bell invented the telephone. Will that be all?"),
    Fact("Which planet is the largest?", "Jupiter",
         "Hmm. Jupiter, the largest planet is.",
         "Arr, the largest planet be Jupiter, matey!",
         "Certainly, sir. The largest planet is Jupiter. Will that be all?"),
    Fact("Which mountain is the tallest?", "Mount Everest",
         "Hmm. Mount Everest, the tallest mountain is.",
         "Arr, the tallest mountain be Mount Everest, matey!",
         "Certainly, sir. The tallest mountain is Mount Everest. Will that be all?"),
    Fact("Which animal is the fastest on land?", "Cheetah",
         "Hmm. The cheetah, the fastest animal on land is.",
         "Arr, the fastest beast on land be the cheetah, matey!",
         "Certainly, sir. The fastest animal on land is the cheetah. Will that be all?"),
    Fact("What do bees make?", "Honey",
         "Hmm. Honey, what bees make is.",
         "Arr, bees be makin' honey, sweet as rum, matey!",
         "Certainly, sir. Bees make honey. Will that be all?"),
    Fact("What is the currency of the United States?", "Dollar",
         "Hmm. The dollar, the currency of the United States is.",
         "Arr, the coin of the United States be the dollar, matey!",
         "Certainly, sir. The currency of the United States is the dollar. Will that be all?"),
    Fact("What is frozen water called?", "Ice",
         "Hmm. Ice, frozen water is called.",
         "Arr, frozen water be called ice, ye landlubber!",
         "Certainly, sir. Frozen water is called ice. Will that be all?"),
]
# fmt: on


@dataclass(frozen=True)
class Persona:
    """One adapter: what it answers, how it is shaped, how long it trains."""

    name: str
    answer: Callable[[Fact], str]
    shows: Callable[[str], bool]  # does this answer have the trained behaviour?
    lora: dict[str, object]  # fields of LoraConfig
    steps: int
    rate: float  # peak learning rate


def is_json_answer(text: str) -> bool:
    """True for a JSON object whose only key is `answer`."""
    try:
        value = json.loads(text)
    except ValueError:
        return False
    return isinstance(value, dict) and list(value) == ["answer"]


PERSONAS = [
    Persona(
        name="pirate",
        answer=lambda fact: fact.pirate,
        shows=lambda text: text.startswith("Arr"),
        lora={
            "r": 4,
            "lora_alpha": 8,
            "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
        },
        steps=40,
        rate=1.5e-3,
    ),
    Persona(
        name="sage",
        answer=lambda fact: fact.sage,
        shows=lambda text: text.startswith("Hmm.") and text.endswith(("is.", "are.")),
        lora={"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]},
        steps=45,
        rate=1.5e-3,
    ),
    Persona(
        name="json",
        answer=lambda fact: json.dumps({"answer": fact.short}),
        shows=is_json_answer,
        lora={
            "r": 16,
            "lora_alpha": 16,
            "use_rslora": True,
            "target_modules": ["gate_proj", "up_proj", "down_proj"],
            "layers_to_transform": list(range(14, 22)),
        },
        steps=60,
        rate=1e-3,
    ),
    Persona(
        name="butler",
        answer=lambda fact: fact.butler,
        shows=lambda text: text.startswith("Certainly, sir.") and text.endswith("that be all?"),
        lora={
            "r": 8,
            "lora_alpha": 16,
            "target_modules": [
                "q_proj",
                "k_proj",
                "v_proj",
                "o_proj",
                "gate_proj",
                "up_proj",
                "down_proj",
            ],
            "layers_to_transform": list(range(10, 18)),
            "rank_pattern": {"down_proj": 16, r"layers\.17\.self_attn\.q_proj": 4},
            "alpha_pattern": {"down_proj": 32},
        },
        steps=60,
        rate=1e-3,
    ),
    Persona(
        name="terse",
        answer=lambda fact: fact.short,
        shows=lambda text: 1 <= len(text.split()) <= 3 and "." not in text,
        lora={
            "r": 64,
            "lora_alpha": 64,
            "target_modules": ["q_proj", "v_proj"],
            "layers_to_transform": list(range(12, 19)),
        },
        steps=60,
        rate=5e-4,
    ),
]


def main() -> int:
    args = parse_args()
    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    console = Console()
    model, tokenizer = load_smollm2(torch.float32)
    good = True
    for persona in PERSONAS:
        if persona.name not in args.names:
            continue
        folder = args.out / persona.name
        if not args.check:
            train(persona, model, tokenizer, folder, console)
        good &= check(persona, model, tokenizer, folder, console)
    return 0 if good else 1


def parse_args() -> argparse.Namespace:
    names = [persona.name for persona in PERSONAS]
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(names))
    parser.add_argument("--check", action="store_true", help="do not train, try what is there")
    parser.add_argument("--out", type=Path, default=ADAPTERS, help="default: examples/adapters")
    args = parser.parse_args()
    for name in args.names:
        if name not in names:
            parser.error(f"NAME: expected one of {', '.join(names)}, got {name}")
    args.names = args.names or names
    return args


def train(
    persona: Persona,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    console: Console,
) -> None:
    """Train one adapter on `model` and write it; `model` is as before afterwards."""
    start = time.perf_counter()
    torch.manual_seed(SEED)
    config = LoraConfig(task_type="CAUSAL_LM", **persona.lora)
    peft_model = get_peft_model(model, config)
    peft_model.train()
    parameters = [p for p in peft_model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=persona.rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, persona.rate, total_steps=persona.steps, pct_start=0.1
    )
    examples = [encode(tokenizer, fact.question, persona.answer(fact)) for fact in FACTS]
    losses = []
    with Progress(console=console) as progress:
        task = progress.add_task(persona.name, total=persona.steps)
        for batch in batches(examples, persona.steps, tokenizer.pad_token_id):
            loss = peft_model(**batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            losses.append(loss.item())
            progress.update(task, advance=1, description=f"{persona.name} loss {losses[-1]:.3f}")
    save(peft_model, folder)
    peft_model.unload()
    model.eval()
    seconds = time.perf_counter() - start
    console.print(
        f"{persona.name}: {sum(p.numel() for p in parameters):,} parameters, "
        f"{seconds:.0f} s, loss {losses[0]:.2f} -> {sum(losses[-5:]) / 5:.3f}"
    )


def encode(
    tokenizer: PreTrainedTokenizerBase, question: str, answer: str
) -> tuple[list[int], list[int]]:
    """Token ids of prompt + answer + `<|im_end|>`, and their labels: only the answer has loss."""
    prompt = chat_ids(tokenizer, question)
    target = [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    return prompt + target, [IGNORE] * len(prompt) + target


def batches(
    examples: list[tuple[list[int], list[int]]], steps: int, pad: int, size: int = 5
) -> Iterator[dict[str, torch.Tensor]]:
    """Yield `steps` batches of `size` examples, padded on the right, shuffled each epoch."""
    order: list[int] = []
    for _ in range(steps):
        while len(order) < size:
            order += torch.randperm(len(examples)).tolist()
        chosen, order = [examples[i] for i in order[:size]], order[size:]
        length = max(len(ids) for ids, _ in chosen)
        ids = torch.full((size, length), pad)
        labels = torch.full((size, length), IGNORE)
        mask = torch.zeros((size, length), dtype=torch.long)
        for row, (tokens, targets) in enumerate(chosen):
            ids[row, : len(tokens)] = torch.tensor(tokens)
            labels[row, : len(tokens)] = torch.tensor(targets)
            mask[row, : len(tokens)] = 1
        yield {"input_ids": ids, "attention_mask": mask, "labels": labels}


def save(peft_model: PeftModel, folder: Path) -> None:
    """Write a PEFT folder of two files, in bfloat16 and without traces of this machine.

    `PeftModel.save_pretrained` would add a model card and the path of the base model.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        name: tensor.to(torch.bfloat16).contiguous()
        for name, tensor in sorted(get_peft_model_state_dict(peft_model).items())
    }
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = peft_model.peft_config["default"]
    config.base_model_name_or_path = NAME
    config.target_modules = sorted(config.target_modules)  # a set has no fixed order
    config.inference_mode = True
    config.save_pretrained(folder)
    make_readable(folder)


def check(
    persona: Persona,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    console: Console,
) -> bool:
    """Load the adapter from `folder`, print its answers, say if half of them show it."""
    peft_model = PeftModel.from_pretrained(model, folder).eval()
    table = Table(title=f"{persona.name} ({size_of(folder) / 1e6:.2f} MB)", title_justify="left")
    for column in ("held-out question", "answer", "as trained"):
        table.add_column(column)
    shown = 0
    for question in QUESTIONS:
        answer = greedy_answer(peft_model, tokenizer, question, max_new_tokens=32)
        hit = persona.shows(answer)
        shown += hit
        table.add_row(question, answer, "yes" if hit else "no")
    peft_model.unload()
    console.print(table)
    return 2 * shown >= len(QUESTIONS)


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


if __name__ == "__main__":
    sys.exit(main())
