from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from adainfer_runtime.dataset_tasks import DATASETS, build_dataset_tasks, load_from_hub
from adainfer_runtime.errors import DatasetUnavailableError, RequestError
from adainfer_runtime.few_shot import parse_prompt, recombine
from adainfer_runtime.tasks import TaskExample

ROWS = {
    "mmlu": (
        {"question": "Find  the\n\ndegree.", "subject": "abstract_algebra",
         "choices": ["0", "4 ", "2", "6"], "answer": 1},
        "Q: Find the degree.\na: 0\nb: 4\nc: 2\nd: 6\nA:", " b", (" a", " b", " c", " d"),
    ),
    "commonsense_qa": (
        {"id": "1", "question": "Where is rock?", "question_concept": "rock", "answerKey": "C",
         "choices": {"label": list("ABCDE"), "text": ["sea", "sky", "hill", "pan", "bee"]}},
        "Q: Where is rock?\na: sea\nb: sky\nc: hill\nd: pan\ne: bee\nA:", " c",
        (" a", " b", " c", " d", " e"),
    ),
    "squad": (
        {"id": "1", "title": "T", "context": "Ada wrote it.\n\nIn 1843.", "question": "Who wrote? ",
         "answers": {"text": ["Ada", "Ada Lovelace"], "answer_start": [0, 0]}},
        "Q: Ada wrote it. In 1843. Who wrote?\nA:", " Ada", None,
    ),
    "sst2": (
        {"idx": 0, "sentence": "a delight . ", "label": 1},
        "Q: a delight .\nA:", " positive", (" negative", " positive"),
    ),
    "ag_news": (
        {"text": "Probe lands on Titan", "label": 3},
        "Q: Probe lands on Titan\nA:", " Science", (" World", " Sports", " Business", " Science"),
    ),
}  # fmt: skip


def loader(**splits):
    """A hub that has SST-2's columns: sentences and labels by split."""
    asked = []

    def load(hub_id, config, split):
        asked.append((hub_id, config, split))
        return [{"sentence": sentence, "label": label} for sentence, label in splits[split]]

    load.asked = asked
    return load


def sentences(prefix, count):
    return [(f"{prefix} {n} .", n % 2) for n in range(count)]


@pytest.mark.parametrize("name", DATASETS)
def test_rows_become_prompts_of_the_task_files_form(name):
    row, query, answer, labels = ROWS[name]
    (made,) = build_dataset_tasks(name, shots=0, load=lambda *_: [row])
    assert made == TaskExample(prompt=query, answer=answer, labels=labels, task=name)


@pytest.mark.parametrize(
    ("name", "secret"), [("sst2", {"label": -1}), ("commonsense_qa", {"answerKey": ""})]
)
def test_secret_answers_are_none_and_no_shots(name, secret):
    hidden = {**ROWS[name][0], **secret}
    (made,) = build_dataset_tasks(name, shots=0, split="test", load=lambda *_: [hidden])
    assert made.answer is None
    assert made.labels == ROWS[name][3]
    other = {"sst2": {"sentence": "b"}, "commonsense_qa": {"question": "Where?"}}[name]
    with pytest.raises(RequestError, match="the pool holds 0 solved examples"):
        build_dataset_tasks(
            name, shots=1, split="test", load=lambda *_: [hidden, {**hidden, **other}]
        )


def test_shots_come_from_the_training_split():
    load = loader(train=sentences("old", 30), validation=sentences("new", 10))
    made = build_dataset_tasks("sst2", shots=4, load=load)
    assert load.asked == [
        ("stanfordnlp/sst2", None, "validation"),
        ("stanfordnlp/sst2", None, "train"),
    ]
    assert len(made) == 10
    assert len({parse_prompt(item).shots for item in made}) == 10  # of each query its own
    for item in made:
        parsed = parse_prompt(item)
        assert len(set(parsed.shots)) == 4
        assert all(shot.startswith("Q: old") for shot in parsed.shots)
        assert parsed.query.startswith("Q: new")
        number = int(parsed.query.split()[2])
        assert item.answer == (" negative", " positive")[number % 2]


def test_questions_of_the_training_split_are_not_their_own_shots():
    load = loader(train=sentences("old", 6))
    for item in build_dataset_tasks("sst2", shots=5, split="train", load=load):
        *shots, query = item.prompt.split("\n\n")
        assert len(shots) == 5
        assert not any(shot.startswith(query) for shot in shots)


def test_seed_and_limit():
    load = loader(train=sentences("old", 30), validation=sentences("new", 50))
    made = build_dataset_tasks("sst2", shots=2, limit=12, seed=3, load=load)
    assert len(made) == 12
    assert made == build_dataset_tasks("sst2", shots=2, limit=12, seed=3, load=load)
    other = build_dataset_tasks("sst2", shots=2, limit=12, seed=4, load=load)
    queries, others = ({parse_prompt(item).query for item in some} for some in (made, other))
    assert len(queries) == len(others) == 12
    assert queries != others
    assert len(build_dataset_tasks("sst2", shots=2, limit=99, load=load)) == 50


def test_prompts_can_be_recombined():
    load = loader(train=sentences("old", 30), validation=sentences("new", 10))
    made = recombine(build_dataset_tasks("sst2", shots=3, load=load), shots=8)
    assert {len(parse_prompt(item).shots) for item in made} == {8}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"name": "sst3"},
            "there is no dataset sst3; choose one of: mmlu, commonsense_qa, squad, sst2, ag_news",
        ),
        (
            {"name": "mmlu", "split": "train"},
            "dataset mmlu has no questions in split train; choose: test, validation",
        ),
        ({"name": "sst2", "limit": 0}, "a limit of 0 leaves no questions; give 1 or more"),
    ],
)
def test_senseless_requests_load_nothing(arguments, message):
    load = loader()
    with pytest.raises(RequestError) as caught:
        build_dataset_tasks(**arguments, shots=1, load=load)
    assert str(caught.value) == message
    assert not load.asked


def test_more_shots_than_the_training_split_has():
    load = loader(train=sentences("old", 3), validation=sentences("new", 1))
    with pytest.raises(RequestError, match=r"task sst2: 4 shots .* the pool holds 3"):
        build_dataset_tasks("sst2", shots=4, load=load)


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("sst2", {"review": "x", "label": 1}),
        ("sst2", {"sentence": "x", "label": 2}),
        ("sst2", {"sentence": None, "label": 1}),
        ("commonsense_qa", {**ROWS["commonsense_qa"][0], "answerKey": "Z"}),
    ],
)
def test_rows_of_another_form(name, row):
    with pytest.raises(DatasetUnavailableError) as caught:
        build_dataset_tasks(name, shots=1, load=lambda *_: [row])
    message = str(caught.value)
    assert message.startswith(f"{DATASETS[name].hub_id} has a row that is not of the expected form")
    assert ", ".join(row) in message
    assert "\n" not in message


def test_library_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)  # as if it were not installed
    with pytest.raises(DatasetUnavailableError, match=r"pip install 'adainfer-export\[datasets\]'"):
        load_from_hub("stanfordnlp/sst2", None, "train")


def test_hub_cannot_be_reached(monkeypatch):
    asked = []

    def load_dataset(*arguments, **options):
        asked.append((arguments, options))
        raise ConnectionError("Couldn't reach the hub\n(offline)")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(DatasetUnavailableError) as caught:
        build_dataset_tasks("mmlu", shots=5)
    assert str(caught.value) == (
        "cais/mmlu, configuration all, split test, cannot be downloaded and is not in the local "
        "cache (Couldn't reach the hub (offline)); check the network, or set HF_HOME to a cache "
        "that holds it"
    )
    assert asked == [(("cais/mmlu", "all"), {"split": "test"})]  # and no remote code
