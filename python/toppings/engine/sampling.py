# SPDX-License-Identifier: Apache-2.0
"""How the next token is chosen from a row of logits."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from toppings.errors import InvalidRequestError

__all__ = ["SamplingParams", "sample"]


@dataclass(frozen=True)
class SamplingParams:
    """One request's sampling. The defaults are greedy.

    temperature: 0 is greedy (the first of equal maxima).
    top_k: only the k most likely tokens; 0 keeps all.
    top_p: the smallest set of most likely tokens whose probabilities, after temperature and top_k,
        reach p.
    seed: makes a request's choices repeatable, whatever runs beside it; None draws a fresh one.
    stop: token ids, or sequences of them, that end the request; they are part of its output.
    ignore_eos: goes on after the model's own end-of-sequence token.
    """

    max_tokens: int = 16
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    stop: Sequence[int | Sequence[int]] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        _require_int("max_tokens", self.max_tokens, 1)
        _require_int("top_k", self.top_k, 0)
        if self.seed is not None:
            _require_int("seed", self.seed, 0, 2**63)
        if not 0 <= _number(self.temperature) < math.inf:
            raise InvalidRequestError(
                f"temperature: expected a finite number >= 0, got {self.temperature!r}"
            )
        if not 0 < _number(self.top_p) <= 1:
            raise InvalidRequestError(f"top_p: expected a number in (0, 1], got {self.top_p!r}")
        object.__setattr__(self, "temperature", float(self.temperature))
        object.__setattr__(self, "top_p", float(self.top_p))
        object.__setattr__(self, "stop", _stop_sequences(self.stop))

    def stops(self, output: Sequence[int]) -> bool:
        """Does the output end with one of the stop sequences?"""
        return any(tuple(output[-len(s) :]) == s for s in self.stop)  # type: ignore[arg-type]


def sample(
    logits: torch.Tensor, params: Sequence[SamplingParams], generators: Sequence[torch.Generator]
) -> list[int]:
    """One token per row of logits [R, V]; row i uses params[i] and generators[i] alone."""
    greedy: list[int] = logits.argmax(dim=-1).tolist()
    return [
        greedy[i] if p.temperature == 0 else _draw(logits[i], p, generators[i])
        for i, p in enumerate(params)
    ]


def _draw(logits: torch.Tensor, params: SamplingParams, generator: torch.Generator) -> int:
    """A draw from the sorted and filtered distribution, in fp64: any temperature will do."""
    values, tokens = torch.sort(logits.float(), descending=True, stable=True)
    if 0 < params.top_k < len(values):
        values, tokens = values[: params.top_k], tokens[: params.top_k]
    # Relative to the largest, so that no temperature overflows; the first token is always kept.
    probabilities = torch.softmax((values.double() - values[0]) / params.temperature, dim=-1)
    if params.top_p < 1:
        before = probabilities.cumsum(-1) - probabilities
        before[0] = 0
        probabilities = torch.where(before < params.top_p, probabilities, 0)
    choice = torch.multinomial(probabilities, 1, generator=generator)
    return int(tokens[choice])


def _stop_sequences(stop: object) -> tuple[tuple[int, ...], ...]:
    if isinstance(stop, Sequence) and not isinstance(stop, (str, bytes)):
        found = tuple(tuple(s) if isinstance(s, Sequence) else (s,) for s in stop)
        if all(s and all(map(_is_token, s)) for s in found):
            return found
    raise InvalidRequestError(
        f"stop: expected a list of token ids or of non-empty sequences of them, got {stop!r}"
    )


def _is_token(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _require_int(name: str, value: object, low: int, high: int | None = None) -> None:
    if (
        not isinstance(value, int)
        or isinstance(value, bool)
        or value < low
        or (high is not None and value >= high)
    ):
        raise InvalidRequestError(f"{name}: expected an integer >= {low}, got {value!r}")


def _number(value: object) -> float:
    """NaN for what is none, which lies in no range."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.inf
