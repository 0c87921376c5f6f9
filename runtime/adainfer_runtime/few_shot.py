"""Recombines the examples of few-shot prompts: as many shots as wanted, drawn anew.

A few-shot prompt is a row of blocks with blank lines between them: solved examples (shots), then
the query, which ends with a cue such as `A:` and has no answer yet.

Prompts that share a query or shots are not independent. Calibration keeps copies of a query in one
part of the data, and certifies with one of them; more queries make a certificate stronger, more
copies do not. Shots are shared even then, by all prompts that draw from the same small pool.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from random import Random

from .errors import RequestError, TaskFileError
from .tasks import TaskExample

__all__ = [
    "FewShotPrompt",
    "ShotPool",
    "few_shot_prompts",
    "parse_prompt",
    "question_of",
    "recombine",
    "solved_questions",
]

_BETWEEN = "\n\n"
_BLANK_LINES = re.compile(r"\r?\n\s*\n")
_SHOWN = 40
_MOST_LINES = 3  # of a block, where no blank lines part blocks


@dataclass(frozen=True)
class FewShotPrompt:
    """A prompt taken apart; every block is byte for byte what stood in the prompt.

    Attributes:
        shots: the solved blocks, in their order.
        query: the last block, without its answer.
    """

    shots: tuple[str, ...]
    query: str


@dataclass(frozen=True)
class ShotPool:
    """The solved examples of one task, each of them once.

    Attributes:
        blocks: sorted, so that all solutions of one query lie together.
    """

    task: str
    blocks: tuple[str, ...]

    @classmethod
    def of(cls, task: str, blocks: Iterable[str]) -> ShotPool:
        """A pool of these solved blocks, in any order and with repetitions."""
        return cls(task, tuple(sorted(set(blocks))))

    def draw(self, query: str, shots: int, random: Random) -> list[str]:
        """Different solved examples in random order, none of them a solution of the query.

        Raises:
            RequestError: the pool holds fewer than `shots` of them.
        """
        start, end = self._solutions(query)
        others = len(self.blocks) - (end - start)
        if shots > others:
            raise RequestError(
                f"task {self.task}: {shots} shots were asked for, and the pool holds {others} "
                "solved examples besides the query; ask for fewer shots, or give more examples"
            )
        picks = random.sample(range(others), shots)
        return [self.blocks[pick if pick < start else pick + end - start] for pick in picks]

    def _solutions(self, query: str) -> tuple[int, int]:
        """Where the blocks that begin with the query start and end."""
        prefix = query.rstrip()
        start = bisect_left(self.blocks, prefix)
        end = bisect_right(self.blocks, prefix, lo=start, key=lambda block: block[: len(prefix)])
        return start, end


def recombine(
    examples: Sequence[TaskExample],
    *,
    shots: int,
    copies: int = 1,
    seed: int = 0,
    shots_from: Sequence[TaskExample] | None = None,
) -> list[TaskExample]:
    """New few-shot prompts from the queries and solved examples of given ones.

    The shots of a task are drawn, all with the same chance, from the solved blocks of all its
    prompts and from its queries joined with their own answers. So examples that must stay apart,
    such as those for fitting and for testing, belong in different calls; or `shots_from` says
    whose blocks and answered queries may become shots.

    Args:
        shots: solved examples in each prompt, as many as wanted of the same task.
        copies: prompts per query, with different draws; see the module's note on what certificates
            make of them. Prompts that come out equal are dropped, so a small pool gives fewer.
        seed: the same seed and examples give the same prompts.
        shots_from: the examples that shots are drawn from; default: the given ones.

    Returns:
        the prompts in the order of their queries, with the queries' answer, labels and task.

    Raises:
        TaskFileError: a prompt does not consist of solved blocks and a query.
        RequestError: more shots than a task's pool holds, or a count that makes no sense.
    """
    queries = [
        example.model_copy(update={"prompt": parse_prompt(example).query}) for example in examples
    ]
    blocks: dict[str, list[str]] = defaultdict(list, {query.task: [] for query in queries})
    for example in examples if shots_from is None else shots_from:
        parsed = parse_prompt(example)
        blocks[example.task] += parsed.shots
        if example.answer is not None and example.answer.strip():
            blocks[example.task].append(parsed.query + example.answer)
    pools = {task: ShotPool.of(task, found) for task, found in blocks.items()}
    return few_shot_prompts(queries, pools, shots=shots, copies=copies, seed=seed)


def few_shot_prompts(
    queries: Iterable[TaskExample],
    pools: Mapping[str, ShotPool],
    *,
    shots: int,
    copies: int = 1,
    seed: int = 0,
) -> list[TaskExample]:
    """Puts shots before each query; arguments and errors as in `recombine`.

    Args:
        queries: examples whose prompt is the query's block alone.
        pools: by task.
    """
    if shots < 0 or copies < 1:
        raise RequestError(
            f"{shots} shots and {copies} copies were asked for: shots are 0 or more, "
            "copies 1 or more"
        )
    made: dict[tuple[str, str], TaskExample] = {}
    for query in queries:
        # Seeded by the query: what else is in the files moves no draw, and a query that comes
        # twice gives equal prompts, of which one stays.
        random = Random(f"{seed}\n{query.task}\n{query.prompt}")
        for _ in range(copies):
            drawn = pools[query.task].draw(query.prompt, shots, random)
            prompt = _BETWEEN.join([*drawn, query.prompt])
            made.setdefault((query.task, prompt), query.model_copy(update={"prompt": prompt}))
    return list(made.values())


def parse_prompt(example: TaskExample) -> FewShotPrompt:
    """Takes a few-shot prompt apart.

    Raises:
        TaskFileError: there are no blocks, the last one is no open query, an earlier one has no
            answer, or the example's own answer would not fit into one block.
    """
    *shots, query = _BLANK_LINES.split(example.prompt)
    if not shots:
        raise _unusable(example, "has no blank line, so it holds no solved examples")
    cue = _cue(query)
    if not cue.endswith(":"):
        raise _unusable(example, "does not end with an open question, such as one with `A:`")
    # A blank line within a question would cut it in two: each block must have the query's form.
    solved = _solved(cue)
    for number, shot in enumerate(shots, start=1):
        if not solved.search(shot):
            raise _unusable(example, f"has no answer after `{cue}` in its block {number}")
    if example.answer is not None and _BLANK_LINES.search(example.answer):
        raise _unusable(example, "has an answer with a blank line in it")
    return FewShotPrompt(tuple(shots), query)


def question_of(prompt: str) -> str:
    """What a prompt asks: the open block at its end, where solved blocks stand before it; else all
    of it. Prompts with equal questions ask the same, whatever their examples are.

    Blocks need not have blank lines between them, nor be all that there is: instructions may come
    first.
    """
    found = _take_apart(prompt)
    return _plain(prompt if found is None else found.query)


def solved_questions(prompt: str) -> tuple[str, ...]:
    """What a prompt's own examples answer, each as `question_of` has it."""
    found = _take_apart(prompt)
    if found is None:
        return ()
    cue = _solved(_cue(found.query))
    ends = [[match.end("cue") for match in cue.finditer(shot)][-1] for shot in found.shots]
    return tuple(_plain(shot[:end]) for shot, end in zip(found.shots, ends, strict=True))


def _take_apart(prompt: str) -> FewShotPrompt | None:
    """The open block at the end and the solved ones before it; None where there are none."""
    blocks = _BLANK_LINES.split(prompt)
    found = _solved_before(blocks)
    if found.shots:
        return found
    lines = blocks[-1].splitlines()
    for height in range(1, _MOST_LINES + 1):
        first = len(lines) % height
        groups = ["\n".join(lines[n : n + height]) for n in range(first, len(lines), height)]
        found = _solved_before(groups)
        if len(found.shots) > 1:  # one line alone may look solved by chance
            return found
    return None


def _solved_before(blocks: Sequence[str]) -> FewShotPrompt:
    *before, query = blocks or [""]
    cue = _cue(query)
    shots: list[str] = []
    if cue and not cue[-1].isalnum():
        solved = _solved(cue)
        while before and solved.search(before[-1]):
            shots.append(before.pop())
    return FewShotPrompt(tuple(reversed(shots)), query)


def _cue(query: str) -> str:
    """The last word of an open block, such as `A:`; empty where it has none."""
    return query.rsplit(maxsplit=1)[-1] if query.strip() else ""


def _solved(cue: str) -> re.Pattern[str]:
    """Finds the cue with an answer behind it."""
    return re.compile(rf"(?:^|\s)(?P<cue>{re.escape(cue)})\s*\S")


def _plain(text: str) -> str:
    return " ".join(text.split())


def _unusable(example: TaskExample, why: str) -> TaskFileError:
    start = example.prompt[:_SHOWN]
    return TaskFileError(
        f"task {example.task}: the prompt that starts with {start!r} {why}; expected: solved "
        "examples, then a question without its answer, with blank lines between them"
    )
