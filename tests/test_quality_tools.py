"""The tools that compare exits over tasks and shots, on a tiny model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[1] / "tools"


@pytest.fixture
def files(tmp_path):
    for part, start in (("calibration", 0), ("test", 50)):
        for task in ("one", "two"):
            lines = (
                {
                    "prompt": f"Q: {n}\nA: {n % 3}\n\nQ: {start + n}{task[0]}\nA:",
                    "answer": f" {n % 3}",
                    "task": task,
                }
                for n in range(start, start + 45)
            )
            path = tmp_path / f"{task}.{part}.jsonl"
            path.write_text("\n".join(map(json.dumps, lines)))
    return [
        *("--calibration", *sorted(tmp_path.glob("*.calibration.jsonl"))),
        *("--test", *sorted(tmp_path.glob("*.test.jsonl"))),
    ]


def run(tool, *arguments):
    command = [sys.executable, str(TOOLS / tool), *map(str, arguments)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_leave_one_task_out(tiny, files, tmp_path):
    out = tmp_path / "folds.json"
    arguments = ("--test-limit", 4, "--adapters", "ridge", "--target-agreement", 0.6, "--quiet")
    text = run("leave_one_task_out.py", tiny("llama").folder, *files, *arguments, "--json", out)
    assert text.count("pooled: agreement") == 4
    assert text.split("\n\n")[-1].startswith("each fold at the target that the others support")
    folds = json.loads(out.read_text())["folds"]
    assert [fold["task"] for fold in folds] == ["one", "two"]
    assert {fold["test"]["prompts"] for fold in folds} == {4}
    assert {fold["held_out"]["prompts"] for fold in folds} == {11}  # a quarter of 45


def test_folds_take_the_loosest_target_that_the_others_support(capsys, monkeypatch):
    monkeypatch.syspath_prepend(TOOLS)
    from leave_one_task_out import report_chosen

    def folds(*wrong):
        return [
            {
                "task": task,
                "held_out": {"prompts": 300, "wrong": wrong[n], "saved": 0.5},
                "test": {"prompts": 100, "wrong": n, "saved": 0.5},
            }
            for n, task in enumerate(("one", "two", "three"))
        ]

    # At .98 the others of `one` were wrong too often, and at no target were those of `two` right.
    report_chosen({0.99: folds(9, 1, 1), 0.98: folds(8, 4, 4), 0.97: folds(40, 0, 9)}, 0.98)
    text = capsys.readouterr().out
    rows = [line.split() for line in text.splitlines() if line.startswith(("one", "two", "three"))]
    chosen = {row[0]: row[4:] for row in rows}
    assert chosen == {"one": ["target", "0.99"], "two": [], "three": []}
    assert "of 300, layers saved 16.7%" in text


def test_shots_table(tiny, files, tmp_path):
    work = tmp_path / "work"
    out = tmp_path / "table.json"
    arguments = (tiny("llama").folder, *files, "--work", work, "--shots", 1, 2, "--limit", 3)
    arguments = (*arguments, "--json", out)
    table = run("shots_table.py", *arguments, "--target-agreement", 0.6, "--quiet")
    rows = [line.split(" | ") for line in table.splitlines()[2:]]
    assert [row[0].strip("| ") for row in rows] == [
        "off", "svm, adapters", "crf, adapters", "threshold, adapters",
        "svm, plain AdaInfer", "crf, plain AdaInfer", "context exits", "one layer for all",
        "shortgpt",
    ]  # fmt: skip
    assert {len(row) for row in rows} == {7}
    cells = json.loads(out.read_text())
    assert [cell["shots"] for cell in cells] == [1, 2] * len(rows)
    assert cells[0]["result"]["agreement"] == 1.0
    answers = len((work / "adapted-1.jsonl").read_text().splitlines())
    again = run("shots_table.py", *arguments, "--target-agreement", 0.6, "--quiet")
    assert again == table
    assert len((work / "adapted-1.jsonl").read_text().splitlines()) == answers


def test_leave_one_task_out_of_context_exits(tiny, files, tmp_path):
    arguments = ("--test-limit", 4, "--exit-layers", 2, 3, "--target-agreement", 0.6, 0.7)
    folder = tiny("llama").folder
    before = sorted(folder.rglob("*"))
    text = run("leave_one_task_out_context.py", folder, *files, *arguments, "--work", tmp_path)
    tables = text.split("context exits (svm), target agreement ")
    assert [table.split("\n")[0] for table in tables[1:]] == ["0.6", "0.7"]
    assert text.count("pooled: agreement") == 6
    rows = [line.split() for line in tables[1].splitlines() if line.startswith(("one", "two"))]
    assert [(row[0], row[1]) for row in rows] == [
        ("one", "11"), ("two", "11"), ("one", "4"), ("two", "4"),
    ]  # fmt: skip
    assert sorted(folder.rglob("*")) == before  # a copy took what was written
