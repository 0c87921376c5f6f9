"""What exits were fitted on is known again."""

import pytest

from adainfer_runtime.errors import ManifestError
from adainfer_runtime.fitted_on import FittedOn, asked, hashes_of
from adainfer_runtime.tasks import TaskExample

REPORT = "reports/calibration.0123456789ab.json"


def few_shot(question, task="t", example="Q: a\nA: b"):
    return TaskExample(prompt=f"{example}\n\nQ: {question}\nA:", answer=" x", task=task)


def test_prompts_and_questions_are_known_again():
    plain = TaskExample(prompt="whatever", task="t")
    fitted = FittedOn(frozenset(hashes_of([plain], [asked(few_shot("hot"))])))
    assert plain in fitted
    assert few_shot("hot") in fitted
    assert few_shot("hot", example="Q: other\nA: y") in fitted
    assert few_shot("hot", task="another") not in fitted
    assert few_shot("cold") not in fitted
    assert plain.model_copy(update={"prompt": "what ever"}) not in fitted


def test_a_folder_without_a_report_knows_nothing(tiny):
    made = tiny("llama")
    assert not FittedOn.read(made.folder, made.engine.manifest).hashes


@pytest.mark.parametrize("content", ["{", "[]", '{"fitted_on": 3}'])
def test_a_report_that_cannot_be_read(tiny, tmp_path, content):
    manifest = tiny("llama").engine.manifest
    some = next(iter(manifest.files.values()))
    manifest = manifest.model_copy(update={"files": {**manifest.files, REPORT: some}})
    (tmp_path / "reports").mkdir()
    (tmp_path / REPORT).write_text(content)
    with pytest.raises(ManifestError, match=r"cannot be read: .*; run `adainfer calibrate"):
        FittedOn.read(tmp_path, manifest)
