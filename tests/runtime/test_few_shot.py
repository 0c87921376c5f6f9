from __future__ import annotations

from collections import Counter, defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adainfer_runtime.errors import RequestError, TaskFileError
from adainfer_runtime.few_shot import parse_prompt, question_of, recombine, solved_questions
from adainfer_runtime.tasks import TaskExample, read_tasks, write_tasks

# Text as it stands in prompts: no blank line, and no cue of its own.
TEXT = st.from_regex(r"[a-zé!] ?[a-z,'\u2028]{0,6}", fullmatch=True)


def example(solved, query, answer=None, **fields):
    blocks = [f"Q: {question}\nA: {reply}" for question, reply in solved]
    return TaskExample(prompt="\n\n".join([*blocks, f"Q: {query}\nA:"]), answer=answer, **fields)


@st.composite
def tasks(draw):
    """Some examples of up to two tasks, over few questions, so that they meet again as shots."""
    questions = draw(st.lists(TEXT, min_size=3, max_size=6, unique=True))
    pair = st.tuples(st.sampled_from(questions), TEXT)
    made = st.builds(
        example,
        st.lists(pair, min_size=1, max_size=4),
        st.sampled_from(questions),
        st.none() | TEXT.map(" {}".format),
        task=st.sampled_from(["one", "two"]),
        labels=st.none() | st.just((" x", " y")),
    )
    return draw(st.lists(made, min_size=1, max_size=6))


def pools(examples):
    found = defaultdict(set)
    for item in examples:
        *solved, query = item.prompt.split("\n\n")
        found[item.task] |= {*solved, *([query + item.answer] if item.answer else [])}
    return found


@given(
    examples=tasks(),
    shots=st.integers(0, 4),
    copies=st.integers(1, 3),
    seed=st.integers(0, 5),
)
def test_prompts_hold_what_was_asked_for(examples, shots, copies, seed):
    by_task = pools(examples)
    queries = {(item.task, item.prompt.split("\n\n")[-1]) for item in examples}
    others = min(
        sum(not block.startswith(query) for block in by_task[task]) for task, query in queries
    )
    if shots > others:
        with pytest.raises(RequestError, match=f"{shots} shots were asked for"):
            recombine(examples, shots=shots, copies=copies, seed=seed)
        return
    made = recombine(examples, shots=shots, copies=copies, seed=seed)
    assert made == recombine(examples, shots=shots, copies=copies, seed=seed)
    for item in made:
        *drawn, query = item.prompt.split("\n\n")
        assert len(drawn) == len(set(drawn)) == shots
        assert set(drawn) <= by_task[item.task]  # of this task, byte for byte
        assert not any(block.startswith(query) for block in drawn)
        # Answer, labels and task are those of an example with this query.
        fields = {"prompt": query, **item.model_dump(exclude={"prompt"})}
        assert fields in [
            {**given.model_dump(), "prompt": given.prompt.split("\n\n")[-1]} for given in examples
        ]
    counts = Counter((item.task, item.prompt.split("\n\n")[-1]) for item in made)
    assert set(counts) == queries
    assert max(counts.values()) <= copies
    assert len({(item.task, item.prompt) for item in made}) == len(made)


@given(examples=tasks())
def test_written_prompts_are_read_as_they_were(examples, tmp_path_factory):
    path = tmp_path_factory.mktemp("tasks") / "written.jsonl"
    write_tasks(path, examples)
    assert read_tasks([path]) == examples
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def colours(count, **fields):
    """`count` examples, each with a query of its own and one shot."""
    return [
        example([(f"shot {n}", "red")], f"query {n}", " blue", task="colours", **fields)
        for n in range(count)
    ]


def test_the_pool_holds_solved_blocks_and_answered_queries():
    (first, *_) = recombine(colours(3), shots=5)
    assert set(first.prompt.split("\n\n")) == {
        "Q: query 0\nA:",
        "Q: query 1\nA: blue", "Q: query 2\nA: blue",
        "Q: shot 0\nA: red", "Q: shot 1\nA: red", "Q: shot 2\nA: red",
    }  # fmt: skip


def test_shots_can_come_from_other_examples_alone():
    test = [example([("a", "1")], f"q{n}", " t", task="one") for n in range(3)]
    pool = [example([(f"c{n}", "2")], f"d{n}", " 3", task="one") for n in range(4)]
    for made in recombine(test, shots=5, shots_from=pool):
        *solved, query = made.prompt.split("\n\n")
        assert query[3] == "q"
        assert {block[3] for block in solved} <= {"c", "d"}
    with pytest.raises(RequestError, match="pool holds 0"):
        recombine(test, shots=1, shots_from=[example([("a", "b")], "c", task="other")])


def test_unanswered_queries_are_no_shots():
    examples = [item.model_copy(update={"answer": None}) for item in colours(3)]
    assert all("query" not in shot for item in recombine(examples, shots=3)
               for shot in item.prompt.split("\n\n")[:-1])  # fmt: skip


def test_shots_stay_in_their_task():
    animals = [example([("cat", "miaow")], "dog", " woof", task="animals")]
    made = recombine([*colours(2), *animals], shots=1)
    assert ["miaow" in item.prompt for item in made] == [False, False, True]


def test_seeds_and_copies_differ():
    examples = colours(20)
    prompts = {item.prompt for item in recombine(examples, shots=4, seed=0)}
    assert len(prompts & {item.prompt for item in recombine(examples, shots=4, seed=1)}) < 3
    assert len({item.prompt for item in recombine(examples, shots=4, copies=3)}) == 60


def test_one_copy_is_the_first_of_several():
    examples = colours(8)
    assert recombine(examples, shots=3, copies=3)[::3] == recombine(examples, shots=3)


def test_order_of_examples_moves_no_draw():
    examples = colours(8)
    forward, backward = recombine(examples, shots=3), recombine(examples[::-1], shots=3)
    assert forward == backward[::-1]


def test_every_solved_example_is_drawn_and_in_every_place():
    examples = colours(4)
    drawn = Counter(
        (place, block)
        for item in recombine(examples, shots=2, copies=400)
        for place, block in enumerate(item.prompt.split("\n\n")[:-1])
    )
    assert set(drawn) == {
        (place, block) for place in (0, 1) for block in pools(examples)["colours"]
    }


def test_equal_prompts_are_made_once():
    assert len(recombine(colours(1), shots=1, copies=5)) == 1
    assert len(recombine(colours(2) * 3, shots=1)) == 2


def test_form_is_kept():
    """As many shots as before give blocks of the same form, whatever that is."""
    prompt = "Text:  fine .\n  Mood: good\n\nText: bad\n  Mood: poor\n\nText: so so\n  Mood:"
    (made,) = recombine([TaskExample(prompt=prompt, task="mood")], shots=2)
    assert sorted(made.prompt.split("\n\n")) == sorted(prompt.split("\n\n"))
    assert made.prompt.endswith("\n\nText: so so\n  Mood:")


def test_a_query_that_starts_like_another_is_another():
    examples = [example([("a b", "x"), ("a", "y")], "a", " z", task="t")]
    (made,) = recombine(examples, shots=1)
    assert made.prompt == "Q: a b\nA: x\n\nQ: a\nA:"


def test_too_many_shots():
    message = (
        "task colours: 6 shots were asked for, and the pool holds 5 solved examples besides the "
        "query; ask for fewer shots, or give more examples"
    )
    assert len(recombine(colours(3), shots=5)) == 3
    with pytest.raises(RequestError) as caught:
        recombine(colours(3), shots=6)
    assert str(caught.value) == message


@pytest.mark.parametrize("counts", [{"shots": -1}, {"shots": 1, "copies": 0}])
def test_senseless_counts(counts):
    with pytest.raises(RequestError, match="shots are 0 or more, copies 1 or more"):
        recombine(colours(3), **counts)


@pytest.mark.parametrize(
    ("prompt", "why"),
    [
        ("Q: a\nA: b\nQ: c\nA:", "has no blank line"),
        ("Q: a\nA: b\n\nQ: c\nA: d", "does not end with an open question"),
        ("Q: a\nA: b\n\n", "does not end with an open question"),
        ("Q: a\nA:\n\nQ: c\nA:", "has no answer after `A:` in its block 1"),
        ("Q: a\nA: b\n\nQ: c\n\nd\nA: e\n\nQ: f\nA:", "has no answer after `A:` in its block 2"),
        ("Q: Answer!\n\nQ: a\nA: b\n\nQ: c\nA:", "has no answer after `A:` in its block 1"),
    ],
)
def test_prompts_that_cannot_be_taken_apart(prompt, why):
    with pytest.raises(TaskFileError) as caught:
        recombine([TaskExample(prompt=prompt, task="odd")], shots=1)
    message = str(caught.value)
    assert message.startswith(f"task odd: the prompt that starts with {prompt[:40]!r} ")
    assert why in message
    assert "\n" not in message


def test_answers_with_a_blank_line_are_refused():
    with pytest.raises(TaskFileError, match="an answer with a blank line"):
        recombine([example([("a", "b")], "c", " d\n\ne", task="odd")], shots=1)


def test_shared_task_files_give_as_many_shots_as_they_have(shared_tasks):
    examples = read_tasks(sorted(shared_tasks.glob("*.test.jsonl")))
    by_task = defaultdict(list)
    for item in examples:
        by_task[item.task].append(item)
    for group in by_task.values():
        before = [parse_prompt(item) for item in group]
        shots = len(before[0].shots)
        made = recombine(group, shots=shots)
        after = [parse_prompt(item) for item in made]
        assert [item.query for item in after] == [item.query for item in before]
        assert {len(item.shots) for item in after} == {shots}
        assert [(item.answer, item.labels, item.task) for item in made] == [
            (item.answer, item.labels, item.task) for item in group
        ]
        assert {item.prompt for item in made}.isdisjoint(item.prompt for item in group)


@pytest.mark.parametrize(
    ("prompt", "question", "solved"),
    [
        ("Q: hot\nA: cold\n\nQ: big\nA:", "Q: big A:", ("Q: hot A:",)),
        ("Opposites.\n\nQ: hot\nA: cold\n\nQ: big\nA:", "Q: big A:", ("Q: hot A:",)),
        ("hot -> cold\nwet -> dry\nbig ->", "big ->", ("hot ->", "wet ->")),
        ("Say it:\nhot = cold\nwet = dry\nbig =", "big =", ("hot =", "wet =")),
        (
            "In: a: b\nOut: c\nIn: d\nOut: e\nIn: f\nOut:",
            "In: f Out:",
            ("In: a: b Out:", "In: d Out:"),
        ),
        ("Q: Is A: right?\nA: no\n\nQ: x\nA:", "Q: x A:", ("Q: Is A: right? A:",)),
        # Nothing is solved before it: all of it is asked.
        ("Read this:\n\nsome text\n\nSummary:", "Read this: some text Summary:", ()),
        ("one line ->", "one line ->", ()),
        ("hot -> cold\nbig ->", "hot -> cold big ->", ()),
        ("a b\nc d\ne d", "a b c d e d", ()),
        (" \n\n ", "", ()),
    ],
)
def test_questions(prompt, question, solved):
    assert question_of(prompt) == question
    assert solved_questions(prompt) == solved


def test_a_question_is_the_same_with_other_examples():
    one, other = ("Q: hot\nA: cold\n\nQ: wet\nA: dry", "Q: up\nA: down")
    query = "\n\nQ: big\nA:"
    assert question_of(one + query) == question_of(other + query)
    assert set(solved_questions(one + query)).isdisjoint(solved_questions(other + query))
