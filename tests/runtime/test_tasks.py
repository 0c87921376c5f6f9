from __future__ import annotations

import json

import pytest

from adainfer_runtime.errors import TaskFileError
from adainfer_runtime.tasks import read_tasks


def test_examples_take_their_file_name_as_task(tmp_path):
    path = tmp_path / "colours.test.jsonl"
    path.write_text('{"prompt": "a"}\n\n{"prompt": "b", "task": "own", "extra": 1}\n')
    assert [example.task for example in read_tasks([path])] == ["colours", "own"]


def test_unreadable_encoding(tmp_path):
    path = tmp_path / "latin.jsonl"
    path.write_bytes(b'{"prompt": "caf\xe9"}')
    with pytest.raises(TaskFileError, match="cannot be read"):
        read_tasks([path])


@pytest.mark.parametrize("end", ["\u2028", "\u2029", "\x85", "\x7f", "\u00a0"])
def test_lines_end_with_line_feeds_alone(tmp_path, end):
    """JSON may hold other ends of lines as they are."""
    path = tmp_path / "separators.jsonl"
    lines = [json.dumps({"prompt": f"a{end}b", "task": f"t{end}"}, ensure_ascii=False), ""]
    path.write_bytes("\r\n".join(lines * 2).encode())
    examples = read_tasks([path])
    assert [(example.prompt, example.task) for example in examples] == [(f"a{end}b", f"t{end}")] * 2


@pytest.mark.parametrize("end", ["\x0b", "\x0c"])
def test_control_characters_are_named_by_their_line(tmp_path, end):
    """JSON has them escaped alone; they are no ends of lines either."""
    path = tmp_path / "control.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": "a' + end + 'b"}\n')
    with pytest.raises(TaskFileError, match=r"control\.jsonl:2: Invalid JSON: control character"):
        read_tasks([path])


def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path):
    path = tmp_path / "marked.jsonl"
    path.write_text('{"prompt": "a"}\n', encoding="utf-8-sig")
    assert [example.prompt for example in read_tasks([path])] == ["a"]


def test_answers_that_are_none_of_the_labels_are_counted(tmp_path, caplog):
    path = tmp_path / "beside.jsonl"
    labels = {"labels": ["a", "b"]}
    fields = ({"answer": " a", **labels}, {"answer": " c", **labels}, {"answer": "c"}, labels)
    lines = [json.dumps({"prompt": "x", **line}) + "\n" for line in (*fields, fields[1])]
    path.write_text("".join(lines))
    assert len(read_tasks([path])) == 5
    (record,) = caplog.records
    assert record.getMessage() == (
        f"the answer is none of the labels in 2 examples (the first: {path}:2)"
    )


def test_lone_surrogates_are_no_text(tmp_path):
    """Only escaped can they stand in a file; no tokenizer would take them."""
    path = tmp_path / "half.jsonl"
    path.write_text('{"prompt": "ok"}\n{"prompt": "half a \\ud83d"}\n')
    with pytest.raises(TaskFileError, match=r"half\.jsonl:2"):
        read_tasks([path])


def test_shared_task_files_are_read(shared_tasks):
    paths = sorted(shared_tasks.glob("*.test.jsonl"))
    examples = read_tasks(paths)
    assert len({example.task for example in examples}) == len(paths)
    assert all(example.answer and example.answer.startswith(" ") for example in examples)
