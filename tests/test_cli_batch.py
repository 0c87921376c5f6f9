"""`adainfer batch`: files of prompts and of texts."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from adainfer_runtime.commands.app import build_app
from adainfer_runtime.errors import RequestError, TaskFileError

PROMPTS = ["a b", "c", "a long one, it is", "d e f", "g"]


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    return path


def run(*arguments):
    result = CliRunner().invoke(build_app(), ["batch", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def read(path):
    return sorted(map(json.loads, path.read_text().splitlines()), key=lambda line: line["index"])


def test_every_prompt_gets_its_text(tiny, prompts, tmp_path):
    out = tmp_path / "texts.jsonl"
    made = tiny("llama")
    options = ["--max-new-tokens", "6", "--at-once", "3", "--json"]
    result = run(made.folder, "--prompts", prompts, "--out", out, *options)
    summary = json.loads(result.stdout)
    assert (summary["prompts"], summary["generated"]) == (5, 5)
    assert sum(summary["statistics"]["texts"].values()) == 5
    lines = read(out)
    assert [(line["index"], line["prompt"]) for line in lines] == list(enumerate(PROMPTS))
    for line in lines:
        alone = made.engine.generate(line["prompt"], max_new_tokens=6)
        assert tuple(line["tokens"]) == alone.tokens
        assert line["text"] == alone.text
        assert line["finish_reason"] == alone.finish_reason


def test_a_killed_run_goes_on(tiny, prompts, tmp_path):
    out = tmp_path / "texts.jsonl"
    arguments = [tiny("llama").folder, "--prompts", prompts, "--out", out, "--max-new-tokens", "4"]
    run(*arguments)
    whole = read(out)
    kept = out.read_text().splitlines(keepends=True)
    out.write_text("".join(kept[:2]) + kept[2][:20])
    with pytest.raises(RequestError, match=r"texts.jsonl exists: give another file, or --resume"):
        run(*arguments)
    result = run(*arguments, "--resume", "--json")
    assert json.loads(result.stdout)["generated"] == 3
    for line, expected in zip(read(out), whole, strict=True):
        assert {**line, "seconds": 0} == {**expected, "seconds": 0}
    assert json.loads(run(*arguments, "--resume", "--json").stdout)["generated"] == 0


def test_other_prompts_texts_are_not_added_to(tiny, prompts, tmp_path):
    out = tmp_path / "texts.jsonl"
    arguments = [tiny("llama").folder, "--prompts", prompts, "--out", out, "--resume"]
    with pytest.raises(RequestError, match=r"texts.jsonl does not exist: leave --resume out"):
        run(*arguments)
    for line in ('{"index": 0, "prompt": "z"}', '{"index": 9, "prompt": "a b"}', "[]", "x"):
        out.write_text(line + "\n")
        with pytest.raises(RequestError, match=r"texts.jsonl:1 is no text of these prompts"):
            run(*arguments)
    with pytest.raises(RequestError, match="cannot be used"):
        run(*arguments[:4], tmp_path / "nowhere" / "texts.jsonl")


def test_bad_prompts_leave_nothing_behind(tiny, prompts, tmp_path):
    out = tmp_path / "texts.jsonl"
    folder = tiny("llama").folder
    with pytest.raises(RequestError, match="at_once must be at least 1, found 0"):
        run(folder, "--prompts", prompts, "--out", out, "--at-once", "0")
    prompts.write_text('{"prompt": ""}\n')
    with pytest.raises(TaskFileError, match=r"prompts.jsonl:1"):
        run(folder, "--prompts", prompts, "--out", out)
    assert not out.exists()
