# SPDX-License-Identifier: Apache-2.0
"""Sampling parameters at the ends of their ranges: refused or served, and the engine goes on."""

import pytest
import torch

import toppings
from toppings.engine.sampling import SamplingParams, sample
from toppings.errors import InvalidRequestError

from .models import World, greedy, make_model, prompt_of

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1e-30},
        {"temperature": 1e-45},
        {"temperature": 1e-300},
        {"temperature": 5e-324},
        {"temperature": 1.0, "top_p": 1e-9},
        {"temperature": 1.0, "top_p": 1e-50},
        {"temperature": 1.0, "top_p": 5e-324},
        {"temperature": 1.0, "top_k": 1},
        {"temperature": 1e300, "top_k": 1},
    ],
    ids=str,
)
def test_the_narrowest_values_are_greedy(llama: World, options: dict) -> None:
    engine = llama.engine()
    prompt = prompt_of(6)
    asked = [(name, engine.submit(prompt, greedy(5, **options), name)) for name in ("odd", None)]
    engine.run()
    for name, request in asked:
        assert request.output == llama.greedy(name, prompt, 5)


@pytest.mark.parametrize("top_k", [128, 129, 10**9, 10**30])
def test_more_than_the_vocabulary_is_all_of_it(llama: World, top_k: int) -> None:
    engine = llama.engine()
    options = {"temperature": 1.0, "seed": 4}
    free = engine.submit(prompt_of(6), greedy(5, **options))
    wide = engine.submit(prompt_of(6), greedy(5, top_k=top_k, **options))
    assert list(wide) == list(free)


@pytest.mark.parametrize("temperature", [1e300, 10**308], ids=["float", "int"])
def test_a_huge_temperature_is_uniform(temperature: float) -> None:
    params = SamplingParams(temperature=temperature)
    generator = torch.Generator().manual_seed(1)
    logits = torch.tensor([[0.0, 50.0, -50.0]]).expand(3000, -1)
    counts = torch.tensor(sample(logits, [params] * 3000, [generator] * 3000)).bincount()
    assert bool(((counts - 1000).abs() < 4 * (3000 * 2 / 9) ** 0.5).all())


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 10**400},
        {"temperature": "1"},
        {"temperature": None},
        {"temperature": True},
        {"top_p": float("nan")},
        {"top_p": -0.0},
        {"top_p": "1"},
        {"top_k": 1.0},
        {"top_k": True},
        {"max_tokens": True},
        {"max_tokens": None},
        {"seed": 2**63},
        {"seed": 1.0},
        {"stop": 5},
        {"stop": None},
        {"stop": [None]},
        {"stop": [1.5]},
        {"stop": ["text"]},
        {"stop": [[1, "a"]]},
        {"stop": [True]},
    ],
    ids=lambda options: str(options)[:30],
)
def test_values_that_mean_nothing_are_named(options: dict) -> None:
    with pytest.raises(InvalidRequestError, match=next(iter(options))):
        SamplingParams(**options)


def test_logits_of_minus_infinity_are_never_drawn() -> None:
    logits = torch.tensor([[-torch.inf, 1.0, -torch.inf, 0.0]]).expand(200, -1)
    params = [SamplingParams(temperature=2.0, top_p=0.99)] * 200
    found = sample(logits, params, [torch.Generator().manual_seed(2)] * 200)
    assert set(found) <= {1, 3}


def test_preemption_does_not_change_a_seeds_draws(llama: World) -> None:
    def run(**options) -> list[list[int]]:
        engine = llama.engine(**options)
        asked = [
            engine.submit(prompt_of(5, i), greedy(12, temperature=1.0, seed=i), name)
            for i, name in enumerate((None, "odd", "rslora", "attention"))
        ]
        engine.run()
        assert (engine.stats().preemptions > 0) == bool(options)
        return [r.output for r in asked]

    assert run() == run(kv_blocks=9, block_size=2)


def test_stop_sequences_may_overlap_and_reach_no_prompt(llama: World) -> None:
    engine = llama.engine()
    prompt = prompt_of(6)
    free = llama.greedy("odd", prompt, 6)
    for stop, length in (
        ([[*prompt[-1:], free[0]]], 6),  # begins in the prompt
        ([free[:3], free[:2]], 2),
        ([free + [3]], 6),
        ([free], 6),
    ):
        request = engine.submit(prompt, greedy(6, stop=stop), "odd")
        assert list(request) == free[:length]
        assert request.finish_reason == ("stop" if stop[-1] == free[:length] else "length")


def test_eos_ends_a_request() -> None:
    engine = toppings.Engine(make_model("llama"))
    free = list(engine.submit(prompt_of(6), greedy(6)))
    engine._eos = frozenset(free[2:3])
    request = engine.submit(prompt_of(6), SamplingParams(max_tokens=6))
    end = free.index(free[2]) + 1
    assert list(request) == free[:end] and request.finish_reason == "stop"
