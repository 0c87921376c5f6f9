"""`adainfer batch`: files of prompts and of texts."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from adainfer_runtime.commands.app import build_app
from adainfer_runtime.errors import ManifestError, RequestError, TaskFileError

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
    assert out.read_text().startswith("".join(kept[:2]))
    for line, expected in zip(read(out), whole, strict=True):
        assert {**line, "seconds": 0} == {**expected, "seconds": 0}
    assert json.loads(run(*arguments, "--resume", "--json").stdout)["generated"] == 0


def test_other_requests_texts_are_not_added_to(tiny, prompts, tmp_path):
    out = tmp_path / "texts.jsonl"
    arguments = [tiny("llama").folder, "--prompts", prompts, "--out", out]
    with pytest.raises(RequestError, match=r"texts.jsonl does not exist: leave --resume out"):
        run(*arguments, "--resume")
    run(*arguments, "--max-new-tokens", "3")
    whole = out.read_text()
    for changed in (["--max-new-tokens", "9"], ["--max-new-tokens", "3", "--temperature", "0.5"]):
        with pytest.raises(RequestError, match=r"texts.jsonl:1 is no text of these prompts by"):
            run(*arguments, *changed, "--resume")
    first = json.loads(whole.splitlines()[0])
    for line in ({**first, "index": 9}, {**first, "index": -1}, {"index": 0}, [], "x"):
        out.write_text(json.dumps(line) + "\n")
        with pytest.raises(RequestError, match=r"texts.jsonl:1 is no text"):
            run(*arguments, "--max-new-tokens", "3", "--resume")
    out.write_text(whole)
    done = run(*arguments, "--max-new-tokens", "3", "--timeout", "99", "--resume", "--json")
    assert json.loads(done.stdout)["generated"] == 0
    with pytest.raises(RequestError, match="cannot be used"):
        run(*arguments[:4], tmp_path / "nowhere" / "texts.jsonl")


def test_a_prompt_that_fails_gets_its_error_and_the_others_their_text(tiny, prompts, tmp_path):
    out = tmp_path / "texts.jsonl"
    long = "long " * 200
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("a", long, "b")))
    done = run(tiny("llama").folder, "--prompts", prompts, "--out", out, "--json")
    counts = json.loads(done.stdout)
    assert (counts["prompts"], counts["generated"], counts["failed"]) == (3, 2, 1)
    lines = read(out)
    assert [("text" in line, "error" in line) for line in lines] == [
        (True, False), (False, True), (True, False)
    ]  # fmt: skip
    assert "do not fit this engine's maximum" in lines[1]["error"]
    out.unlink()
    late = ["--prompts", prompts, "--out", out, "--timeout", "1e-9"]
    shown = run(tiny("llama").folder, *late)
    assert shown.exit_code == 1
    assert "3 failed: see their lines" in " ".join(shown.stderr.split())
    assert {line["error"].split(" passed")[0] for line in read(out) if line["index"] != 1} == {
        "the deadline of 1e-09 s"
    }


def test_errors_stay_unless_they_are_to_be_tried_again(tiny, prompts, tmp_path):
    out, again = tmp_path / "texts.jsonl", ["--resume", "--retry-errors"]
    long = "long " * 200
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("a", long, "b")))
    arguments = [tiny("llama").folder, "--prompts", prompts, "--out", out, "--json"]
    with pytest.raises(RequestError, match="--retry-errors goes with --resume"):
        run(*arguments, "--retry-errors")
    assert run(*arguments, "--timeout", "1e-9").exit_code == 1
    kept = out.read_text()
    assert run(*arguments, "--resume").exit_code == 1  # nothing is new, and there is no text
    assert out.read_text() == kept
    done = run(*arguments, *again)
    counts = json.loads(done.stdout)
    assert (done.exit_code, counts["generated"], counts["failed"]) == (0, 2, 1)
    lines = read(out)
    assert [line["index"] for line in lines] == [0, 1, 2]
    assert ["error" in line for line in lines] == [False, True, False]
    done = run(*arguments, *again)
    assert (done.exit_code, json.loads(done.stdout)["failed"]) == (0, 1)
    assert read(out) == lines
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_what_fails_before_the_first_text_leaves_nothing_behind(tiny, prompts, tmp_path):
    out = tmp_path / "texts.jsonl"
    folder = tiny("llama").folder
    with pytest.raises(RequestError, match="at_once must be at least 1, found 0"):
        run(folder, "--prompts", prompts, "--out", out, "--at-once", "0")
    with pytest.raises(ManifestError):
        run(tmp_path / "nowhere", "--prompts", prompts, "--out", out)
    prompts.write_text('{"prompt": ""}\n')
    with pytest.raises(TaskFileError, match=r"prompts.jsonl:1"):
        run(folder, "--prompts", prompts, "--out", out)
    assert not out.exists()
