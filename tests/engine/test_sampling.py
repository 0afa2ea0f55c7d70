# SPDX-License-Identifier: Apache-2.0
"""What SamplingParams promise."""

import pytest
import torch

import toppings
from toppings.engine.sampling import SamplingParams, sample
from toppings.errors import InvalidRequestError

from .models import make_model, prompt_of

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    "bad",
    [
        {"max_tokens": 0},
        {"max_tokens": 1.5},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_k": -1},
        {"top_p": 0},
        {"top_p": 1.1},
        {"seed": -1},
        {"seed": True},
        {"stop": "text"},
        {"stop": [[]]},
        {"stop": [-1]},
    ],
    ids=str,
)
def test_values_out_of_range_are_named(bad: dict) -> None:
    with pytest.raises(InvalidRequestError, match=next(iter(bad))):
        SamplingParams(**bad)


def draw(logits: torch.Tensor, count: int, **options) -> torch.Tensor:
    """Frequencies of `count` draws."""
    params = SamplingParams(**options)
    generator = torch.Generator().manual_seed(5)
    rows = logits.expand(count, -1)
    tokens = sample(rows, [params] * count, [generator] * count)
    return torch.bincount(torch.tensor(tokens), minlength=logits.numel()) / count


LOGITS = torch.tensor([1.0, 3.0, 2.0, 3.0, -1.0])


def test_greedy_takes_the_first_maximum() -> None:
    assert draw(LOGITS, 3).tolist() == [0, 1, 0, 0, 0]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("top_k", [0, 3])
@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_frequencies_follow_the_softmax(temperature: float, top_k: int, top_p: float) -> None:
    p = torch.softmax(LOGITS.double() / temperature, -1)
    order = p.argsort(descending=True, stable=True)
    if top_k:
        p[order[top_k:]] = 0
        p /= p.sum()
    before = p[order].cumsum(-1) - p[order]
    p[order[before >= top_p]] = 0
    p /= p.sum()
    count = 4000
    found = draw(LOGITS, count, temperature=temperature, top_k=top_k, top_p=top_p)
    assert bool((found[p == 0] == 0).all())
    deviation = (p * (1 - p) / count).sqrt()
    assert bool(((found - p).abs() <= 4 * deviation + 1e-12).all())


@pytest.mark.parametrize(
    "options", [{"top_k": 1}, {"top_p": 1e-9}, {"temperature": 1e-45}], ids=str
)
def test_the_narrowest_filters_are_greedy(options: dict) -> None:
    unique = torch.tensor([1.0, 3.0, 2.0, 2.5])
    assert draw(unique, 50, **{"temperature": 1.0, **options}).tolist() == [0, 1, 0, 0]


def test_a_seed_repeats_whatever_runs_beside_it() -> None:
    engine = toppings.Engine(make_model("llama"), kv_blocks=40, block_size=4)
    params = SamplingParams(max_tokens=12, temperature=1.0, seed=3, ignore_eos=True)
    alone = list(engine.submit(prompt_of(6, 1), params))
    requests = [engine.submit(prompt_of(6 + i, 2 + i), SamplingParams(20)) for i in range(6)]
    beside = engine.submit(prompt_of(6, 1), params)
    assert list(beside) == alone
    engine.run()
    assert all(request.finished for request in requests)
    other = SamplingParams(max_tokens=12, temperature=1.0, ignore_eos=True)
    fresh = {tuple(engine.submit(prompt_of(6, 1), other)) for _ in range(3)}
    assert len(fresh) == 3


def test_what_ends_a_request() -> None:
    engine = toppings.Engine(make_model("llama"))
    prompt = prompt_of(6, 1)
    free = list(engine.submit(prompt, SamplingParams(max_tokens=8, ignore_eos=True)))
    assert len(free) == 8

    def ended(**options) -> tuple[list[int], str | None]:
        request = engine.submit(prompt, SamplingParams(max_tokens=8, **options))
        return list(request), request.finish_reason

    assert ended(ignore_eos=True) == (free, "length")
    first = free.index(free[3]) + 1
    assert ended(ignore_eos=True, stop=[free[3]]) == (free[:first], "stop")
    pair = next(i for i in range(1, 8) if free[i - 1 : i + 1] == free[2:4]) + 1
    assert ended(ignore_eos=True, stop=[free[2:4]]) == (free[:pair], "stop")
    engine._eos = frozenset([free[3]])
    assert ended() == (free[:first], "stop")
    assert ended(ignore_eos=True) == (free, "length")
