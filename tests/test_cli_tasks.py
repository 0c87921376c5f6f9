"""`adainfer tasks` as a user types it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from adainfer_runtime.few_shot import parse_prompt
from adainfer_runtime.tasks import read_tasks

from .test_cli import command


@pytest.fixture
def files(tmp_path):
    """Two task files of four queries each, with two shots."""
    paths = []
    for name in ("antonym", "plural"):
        path = tmp_path / f"{name}.test.jsonl"
        lines = (
            {
                "prompt": f"Q: {name} {n}a\nA: x\n\nQ: {name} {n}b\nA: y\n\nQ: {name} {n}\nA:",
                "answer": " z",
                "labels": [" x", " y", " z"],
            }
            for n in range(4)
        )
        path.write_text("\n".join(map(json.dumps, lines)))
        paths.append(path)
    return paths


def fails(match, *arguments):
    done = command("adainfer", "tasks", *arguments, code=2)
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert match in done.stderr
    assert not done.stdout


def test_shots(files, tmp_path):
    out = tmp_path / "out.jsonl"
    done = command("adainfer", "tasks", "shots", *files, "--shots", 5, "--out", out)
    assert done.stdout == f"{out}: 8 prompts with 5 shots (antonym 4, plural 4)\n"
    made = read_tasks([out])
    assert [item.task for item in made] == ["antonym"] * 4 + ["plural"] * 4
    assert {len(parse_prompt(item).shots) for item in made} == {5}
    assert all(item.answer == " z" and item.labels == (" x", " y", " z") for item in made)


def test_shots_from_other_files(files, tmp_path):
    out = tmp_path / "out.jsonl"
    arguments = ("adainfer", "tasks", "shots", files[0], "--from", files[0], "--from", files[1])
    command(*arguments, "--shots", 2, "--out", out)
    assert {len(parse_prompt(item).shots) for item in read_tasks([out])} == {2}
    fails("pool holds 0", "shots", files[0], "--from", files[1], "--shots", 2, "--out", "x.jsonl")


def test_shots_json_and_copies(files, tmp_path):
    out = tmp_path / "out.jsonl"
    arguments = ("adainfer", "tasks", "shots", files[0], "--shots", 3, "--copies", 2, "--json")
    data = json.loads(command(*arguments, "--seed", 7, "--out", out).stdout)
    assert data == {
        "out": str(out), "prompts": 8, "shots": 3, "seed": 7, "tasks": {"antonym": 8},
    }  # fmt: skip
    again, other = tmp_path / "again.jsonl", tmp_path / "other.jsonl"
    command(*arguments, "--seed", 7, "--out", again)
    command(*arguments, "--seed", 8, "--out", other)
    assert again.read_bytes() == out.read_bytes() != other.read_bytes()


def test_existing_files_are_replaced_by_force_alone(files, tmp_path):
    out = tmp_path / "out.jsonl"
    out.write_text("mine")
    arguments = ("shots", *files, "--shots", 2, "--out", out)
    fails(f"{out} exists; give another --out, or --force to replace it", *arguments)
    assert out.read_text() == "mine"
    # What cannot be made replaces nothing.
    fails("task antonym: 12 shots", "shots", *files, "--shots", 12, "--out", out, "--force")
    assert out.read_text() == "mine"
    command("adainfer", "tasks", *arguments, "--force")
    assert len(read_tasks([out])) == 8
    assert {path.name for path in tmp_path.iterdir()} == {
        "out.jsonl", "antonym.test.jsonl", "plural.test.jsonl",
    }  # fmt: skip


def test_errors(files, tmp_path):
    out = tmp_path / "out.jsonl"
    fails("is a folder", "shots", *files, "--shots", 2, "--out", tmp_path, "--force")
    fails("there is no folder", "shots", *files, "--shots", 2, "--out", tmp_path / "no" / "x")
    fails("there is no dataset sst3", "dataset", "sst3", "--shots", 2, "--out", out)
    fails(
        "sst2 has no questions in split dev",
        "dataset", "sst2", "--shots", 2, "--split", "dev", "--out", out,
    )  # fmt: skip
    files[0].write_text('{"prompt": "Q: a\\nA:"}')
    fails("task antonym: the prompt that starts", "shots", *files, "--shots", 2, "--out", out)
    assert not out.exists()


def test_dataset_without_its_library(tmp_path):
    code = (
        "import sys\n"
        "sys.modules['datasets'] = None\n"  # as if it were not installed
        "from adainfer_runtime.commands import main\n"
        "sys.argv = ['adainfer', 'tasks', 'dataset', 'sst2', '--shots', '2', '--out', 'x.jsonl']\n"
        "main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], check=False, capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: stanfordnlp/sst2 cannot be loaded without the library")
    assert done.stderr.count("\n") == 1
    assert not any(tmp_path.iterdir())


def test_dataset(tmp_path):
    """The whole way, with a stand-in for the library."""
    code = (
        "import sys, types\n"
        "rows = [{'text': f'news {n}', 'label': n % 4} for n in range(9)]\n"
        "hub = types.SimpleNamespace(load_dataset=lambda *_, split: rows)\n"
        "sys.modules['datasets'] = hub\n"
        "from adainfer_runtime.commands import main\n"
        "sys.argv = 'adainfer tasks dataset ag_news --shots 3 --limit 5 --out x.jsonl'.split()\n"
        "main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], check=False, capture_output=True, text=True, cwd=tmp_path
    )
    assert done.stdout == "x.jsonl: 5 prompts with 3 shots (ag_news 5)\n", done.stderr
    assert {len(parse_prompt(item).shots) for item in read_tasks([tmp_path / "x.jsonl"])} == {3}


@pytest.mark.parametrize("name", [(), ("shots",), ("dataset",)])
def test_help(name):
    shown = command("adainfer", "tasks", *name, "--help").stdout
    assert "Usage" in shown
    assert not name or f"adainfer tasks {name[0]} " in shown


def test_help_says_what_copies_are_not_for():
    shown = " ".join(command("adainfer", "tasks", "shots", "--help").stdout.split())
    assert "not independent" in shown
    assert "not a stronger certificate" in shown
