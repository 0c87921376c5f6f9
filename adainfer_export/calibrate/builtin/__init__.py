"""Few-shot prompts of several kinds, generated from word tables of this project's own.

They let an export calibrate without a network and without the user's data. Prompts of one's own
traffic calibrate better: what matters is that they resemble what the engine will be asked.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from adainfer_runtime.tasks import TaskExample

from .words import ADJECTIVES, CATEGORIES, PAIRS, TOPICS, VERDICTS

__all__ = ["builtin_examples"]

_PER_TASK = 100
_SHOTS = (3, 7)
_FORMATS = (
    ("Q: {x}\nA:", " {y}", "\n\n"),
    ("Input: {x}\nOutput:", " {y}", "\n"),
    ("{x} ->", " {y}", "\n"),
    ("{x} =", " {y}", "\n"),
    ("Question: {x}\nAnswer:", " {y}", "\n\n"),
)

_Random = np.random.Generator
_Sampler = Callable[[_Random], tuple[str, str]]


def builtin_examples(seed: int = 0) -> list[TaskExample]:
    """About 1,500 prompts, the same for the same seed."""
    random = np.random.default_rng(seed)
    samplers = _samplers()
    return [
        _example(task, sampler, random)
        for task, sampler in samplers.items()
        for _ in range(_PER_TASK)
    ]


def _example(task: str, sample: _Sampler, random: _Random) -> TaskExample:
    question, answer, between = _FORMATS[random.integers(len(_FORMATS))]
    shots = int(random.integers(_SHOTS[0], _SHOTS[1] + 1))
    drawn: dict[str, str] = {}
    while len(drawn) <= shots:
        x, y = sample(random)
        drawn[x] = y
    (*examples, (last, expected)) = drawn.items()
    blocks = [question.format(x=x) + answer.format(y=y) for x, y in examples]
    prompt = between.join([*blocks, question.format(x=last)])
    return TaskExample(prompt=prompt, answer=answer.format(y=expected), task=task)


def _samplers() -> dict[str, _Sampler]:
    samplers: dict[str, _Sampler] = {name: _pair(pairs) for name, pairs in PAIRS.items()}
    samplers |= {
        "sentiment": _sentiment,
        "topic": _topic,
        "category": _category,
        "first of a list": _first_of_list,
        "capital letter": _capital_letter,
        "yes or no": _yes_or_no,
    }
    return samplers


def _pair(pairs: tuple[tuple[str, str], ...]) -> _Sampler:
    def sample(random: _Random) -> tuple[str, str]:
        return pairs[random.integers(len(pairs))]

    return sample


def _choice(random: _Random, items: tuple[str, ...]) -> str:
    return items[random.integers(len(items))]


def _labelled(random: _Random, table: dict[str, tuple[str, ...]]) -> tuple[str, str]:
    label = _choice(random, tuple(table))
    return _choice(random, table[label]), label


def _sentiment(random: _Random) -> tuple[str, str]:
    sentence, label = _labelled(random, VERDICTS)
    thing = _choice(random, ("film", "movie", "story", "comedy", "drama", "thriller"))
    return sentence.format(thing=thing, adjective=_choice(random, ADJECTIVES)), label


def _topic(random: _Random) -> tuple[str, str]:
    sentence, label = _labelled(random, TOPICS)
    return sentence.format(number=int(random.integers(2, 60))), label


def _category(random: _Random) -> tuple[str, str]:
    return _labelled(random, CATEGORIES)


def _first_of_list(random: _Random) -> tuple[str, str]:
    words = tuple(word for group in CATEGORIES.values() for word in group)
    chosen = [str(word) for word in random.choice(words, size=4, replace=False)]
    return ", ".join(chosen), chosen[0]


def _capital_letter(random: _Random) -> tuple[str, str]:
    word, _ = _labelled(random, CATEGORIES)
    return word, word.capitalize()


def _yes_or_no(random: _Random) -> tuple[str, str]:
    word, truth = _labelled(random, CATEGORIES)
    asked = truth if random.integers(2) else _choice(random, tuple(CATEGORIES))
    article = "an" if asked[0] in "aeiou" else "a"
    return f"Is the word '{word}' {article} {asked}?", "yes" if asked == truth else "no"
