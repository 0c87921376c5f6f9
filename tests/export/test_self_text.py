from __future__ import annotations

import json
import shutil

import pytest

from adainfer_export.calibrate import CalibrationRequest, fitting
from adainfer_export.calibrate.data import load_examples
from adainfer_export.calibrate.pipeline import recalibrate
from adainfer_export.calibrate.self_text import SELF, write_texts
from adainfer_export.commands import TranslatorChoice, _calibration
from adainfer_export.errors import CalibrationError
from adainfer_export.progress import SilentReporter
from adainfer_runtime.engine_folder import load_manifest


def test_texts_are_the_seeds(tiny):
    engine = tiny("llama").engine
    texts, again, other = (write_texts(engine, 6, seed, SilentReporter()) for seed in (0, 0, 1))
    assert texts == again != other
    assert all(text.task == SELF for text in texts)
    lengths = [len(engine.tokenizer.encode(text.prompt)) for text in texts]
    assert min(lengths) >= 4
    assert max(lengths) <= engine.manifest.max_seq_len


def test_adapters_alone_are_fitted_on_them(tiny, tmp_path, monkeypatch):
    seen = {"adapters": [], "others": []}
    trace_answers = fitting.trace_answers

    def spy_on_answers(engine, examples, *args, **settings):
        seen["others"] += examples
        return trace_answers(engine, examples, *args, **settings)

    def spy_on_prompts(engine, examples, reporter, seed, **settings):
        seen["adapters"] += examples
        raise CalibrationError("seen enough")

    monkeypatch.setattr(fitting, "trace_answers", spy_on_answers)
    monkeypatch.setattr(fitting, "trace_prompts", spy_on_prompts)
    shutil.copytree(tiny("llama").folder, tmp_path / "engines")
    prompts = tmp_path / "short.jsonl"
    prompts.write_text("\n".join(json.dumps({"prompt": f"{n}: x {n}: y"}) for n in range(80)))
    request = CalibrationRequest(files=(prompts,), self_texts=5)
    folder = tmp_path / "engines"
    before = load_manifest(folder)
    with pytest.raises(CalibrationError, match="seen enough"):
        recalibrate(folder, before, request, SilentReporter())
    tasks = {part: [example.task for example in group] for part, group in seen.items()}
    assert 0 < tasks.pop("adapters").count(SELF) <= 5
    assert tasks["others"] and SELF not in tasks["others"]


@pytest.mark.parametrize(
    ("values", "data"),
    [
        (["self"], ["builtin", "self"]),
        (["builtin"], ["builtin"]),
        (["a.jsonl", "self"], ["self", "a.jsonl"]),
        (["self", "builtin", "a.jsonl"], ["builtin", "self", "a.jsonl"]),
    ],
)
def test_words_of_the_command_line_combine(values, data):
    request = _calibration(
        values, None, 9, None, None, None, None,
        entropy=False, context_exit=False, translators=TranslatorChoice.ridge, shortlist=None,
    )  # fmt: skip
    assert request.data == data
    assert request.self_texts == (9 if "self" in values else 0)


def test_builtin_prompts_stand_beside_files(tmp_path):
    prompts = tmp_path / "own.jsonl"
    prompts.write_text("\n".join(json.dumps({"prompt": f"{n}"}) for n in range(80)))
    examples = load_examples(CalibrationRequest(files=(prompts,), builtin=True))
    tasks = {example.task for example in examples}
    assert {"own", "yes or no"} <= tasks
