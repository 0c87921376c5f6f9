"""Few-shot prompts from datasets of the Hugging Face hub, in the form of the task files.

Adding a dataset is one entry in `DATASETS`. The library `datasets` (extra `datasets`) is needed by
`load_from_hub` alone; code from the hub is never run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, cast

from .errors import DatasetUnavailableError, RequestError, one_line
from .few_shot import ShotPool, few_shot_prompts
from .tasks import TaskExample

__all__ = [
    "DATASETS",
    "HubDataset",
    "Loader",
    "Question",
    "Row",
    "build_dataset_tasks",
    "load_from_hub",
]

Row = Mapping[str, Any]
Loader = Callable[[str, str | None, str], Sequence[Row]]
"""Hub id, configuration (None: the only one) and split → the split's rows."""

_LETTERS = "abcdefgh"
_AG_NEWS = ("World", "Sports", "Business", "Science")
_SST2 = ("negative", "positive")


@dataclass(frozen=True)
class Question:
    """What a row asks.

    Attributes:
        text: without a blank line, which would end its block.
        answer: without its leading space; None where the dataset keeps it secret.
        labels: the closed set of answers, where there is one.
    """

    text: str
    answer: str | None
    labels: tuple[str, ...] | None = None


@dataclass(frozen=True)
class HubDataset:
    """A dataset that prompts can be built from.

    Attributes:
        name: the task's name, and the one on the command line.
        config: None where there is one configuration only.
        shots_split: where shots are drawn from: the training split.
        query_splits: splits that questions may come from; the first is the default.
        to_question: reads a row.
    """

    name: str
    hub_id: str
    config: str | None
    shots_split: str
    query_splits: tuple[str, ...]
    to_question: Callable[[Row], Question]


def load_from_hub(hub_id: str, config: str | None, split: str) -> Sequence[Row]:
    """One split, from the local cache or the network.

    Raises:
        DatasetUnavailableError: the library is not installed, or the split is not to be had.
    """
    try:
        import datasets
    except ImportError as error:
        raise DatasetUnavailableError(
            f"{hub_id} cannot be loaded without the library `datasets`: "
            "pip install 'adainfer-export[datasets]'"
        ) from error
    try:
        return cast(Sequence[Row], datasets.load_dataset(hub_id, config, split=split))
    except Exception as error:  # besides the library's own errors, those of its HTTP client
        reason = one_line(error)[:200]
        raise DatasetUnavailableError(
            f"{hub_id}, configuration {config or 'default'}, split {split}, cannot be downloaded "
            f"and is not in the local cache ({reason}); check the network, or set HF_HOME to a "
            "cache that holds it"
        ) from error


def build_dataset_tasks(
    name: str,
    *,
    shots: int,
    split: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    load: Loader = load_from_hub,
) -> list[TaskExample]:
    """One few-shot prompt per question of a dataset, shots drawn from its training split.

    A question is never among its own shots, whichever split it comes from. Prompts share shots, so
    they are not quite independent; see `few_shot`.

    Args:
        name: a key of `DATASETS`.
        split: where the questions come from; default: the dataset's first query split.
        limit: questions at most, a seeded sample.
        seed: the same seed and rows give the same prompts.

    Raises:
        RequestError: unknown name or split, more shots than there are, or a senseless count.
        DatasetUnavailableError: the rows are not to be had, or lack the expected columns.
    """
    dataset = DATASETS.get(name)
    if dataset is None:
        raise RequestError(f"there is no dataset {name}; choose one of: {', '.join(DATASETS)}")
    split = split or dataset.query_splits[0]
    if split not in dataset.query_splits:
        known = ", ".join(dataset.query_splits)
        raise RequestError(f"dataset {name} has no questions in split {split}; choose: {known}")
    if limit is not None and limit < 1:
        raise RequestError(f"a limit of {limit} leaves no questions; give 1 or more")
    rows = _sample(load(dataset.hub_id, dataset.config, split), limit, seed)
    queries = [_as_query(dataset, question) for question in _questions(dataset, rows)]
    training = _questions(dataset, load(dataset.hub_id, dataset.config, dataset.shots_split))
    pool = ShotPool.of(name, _solved_blocks(training))
    return few_shot_prompts(queries, {name: pool}, shots=shots, seed=seed)


def _sample(rows: Sequence[Row], limit: int | None, seed: int) -> Iterable[Row]:
    if limit is None or limit >= len(rows):
        return rows
    return [rows[index] for index in sorted(Random(seed).sample(range(len(rows)), limit))]


def _questions(dataset: HubDataset, rows: Iterable[Row]) -> Iterable[Question]:
    for row in rows:
        try:
            yield dataset.to_question(row)
        except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
            raise DatasetUnavailableError(
                f"{dataset.hub_id} has a row that is not of the expected form, with the columns "
                f"{', '.join(row)} ({error!r}); the hub's copy may have changed"
            ) from error


def _as_query(dataset: HubDataset, question: Question) -> TaskExample:
    return TaskExample(
        prompt=_block(question),
        answer=None if question.answer is None else _leading_space(question.answer),
        labels=question.labels and tuple(map(_leading_space, question.labels)),
        task=dataset.name,
    )


def _solved_blocks(questions: Iterable[Question]) -> Iterable[str]:
    for question in questions:
        if question.answer is not None:
            yield _block(question) + _leading_space(question.answer)


def _block(question: Question) -> str:
    return f"Q: {question.text}\nA:"


def _leading_space(answer: str) -> str:
    return f" {answer}"


def _mmlu(row: Row) -> Question:
    return _multiple_choice(row["question"], row["choices"], row["answer"])


def _commonsense_qa(row: Row) -> Question:
    labels, key = list(row["choices"]["label"]), row["answerKey"]
    # The test split's keys are secret: empty strings.
    right = labels.index(key) if key else None
    return _multiple_choice(row["question"], row["choices"]["text"], right)


def _squad(row: Row) -> Question:
    texts = row["answers"]["text"]
    answer = _one_line(texts[0]) if texts else None
    return Question(f"{_one_line(row['context'])} {_one_line(row['question'])}", answer)


def _sst2(row: Row) -> Question:
    return Question(_one_line(row["sentence"]), _label(_SST2, row["label"]), _SST2)


def _ag_news(row: Row) -> Question:
    return Question(_one_line(row["text"]), _label(_AG_NEWS, row["label"]), _AG_NEWS)


def _multiple_choice(question: str, choices: Sequence[str], right: int | None) -> Question:
    letters = tuple(_LETTERS[: len(choices)])
    options = [
        f"{letter}: {_one_line(text)}" for letter, text in zip(letters, choices, strict=True)
    ]
    text = "\n".join([_one_line(question), *options])
    return Question(text, None if right is None else _label(letters, right), letters)


def _label(labels: Sequence[str], index: int) -> str | None:
    # −1 stands for an answer that is kept secret.
    return None if index == -1 else labels[index]


def _one_line(text: str) -> str:
    return " ".join(text.split())


DATASETS: Mapping[str, HubDataset] = {
    dataset.name: dataset
    for dataset in (
        # `dev` is what MMLU made for shots, five questions of each subject; `auxiliary_train` holds
        # questions of other datasets. Shots are of mixed subjects here, so that there may be more
        # than five; published accuracies are with shots of the question's own subject.
        HubDataset("mmlu", "cais/mmlu", "all", "dev", ("test", "validation"), _mmlu),
        HubDataset(
            "commonsense_qa", "tau/commonsense_qa", None, "train",
            ("validation", "test", "train"), _commonsense_qa,
        ),
        HubDataset(
            "squad", "rajpurkar/squad", None, "train", ("validation", "train"), _squad
        ),
        HubDataset(
            "sst2", "stanfordnlp/sst2", None, "train", ("validation", "test", "train"), _sst2
        ),
        HubDataset("ag_news", "fancyzhx/ag_news", None, "train", ("test", "train"), _ag_news),
    )
}  # fmt: skip
