from __future__ import annotations

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
