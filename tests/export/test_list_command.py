from __future__ import annotations

import json

import pytest

from adainfer_export.errors import UnknownModelError
from adainfer_export.list_command import run_list
from adainfer_models import ExitSettings


def test_an_alias_is_shown_with_all_that_is_known_of_it(capsys):
    run_list("llama2-7b")
    shown = capsys.readouterr().out
    assert "gated: accept it there, then `hf auth login`" in shown
    assert "MMLU: accuracy 43.73, mean layers 28.91 [second-hand: SpecEE" in shown
    run_list("smollm2-135m")
    assert "exits: --target-agreement 0.985 --adapters distilled --classifier svm" in (
        capsys.readouterr().out
    )


def test_the_same_as_json(capsys):
    run_list("opt-1.3b", json_output=True)
    data = json.loads(capsys.readouterr().out)
    assert data["architecture"] == "opt"
    assert data["sources"][0]["id"] == "facebook/opt-1.3b"
    run_list(json_output=True)
    everything = json.loads(capsys.readouterr().out)
    assert data in everything["aliases"]
    assert "gpt_neox" in everything["architectures"]


def test_an_unknown_alias_suggests_near_ones():
    with pytest.raises(UnknownModelError, match=r"'lama2-7b' is no known alias.*llama2-7b"):
        run_list("lama2-7b")


def test_what_a_user_leaves_open_is_the_recipes():
    from adainfer_export.commands import AdapterChoice, TranslatorChoice, _calibration

    known = ExitSettings(target_agreement=0.9, classifiers=("crf",), adapters="ridge", note="x")
    fixed = {"context_exit": False, "translators": TranslatorChoice.ridge, "shortlist": False}
    open_ = (["builtin"], None, 0, None, None, None, None)
    request = _calibration(*open_, **fixed, known=known)
    assert (request.target_agreement, request.classifiers, request.adapters) == (
        0.9,
        ("crf",),
        "ridge",
    )
    given = (["builtin"], None, 0, 0.8, AdapterChoice.none, None, None)
    request = _calibration(*given, **fixed, known=known)
    assert (request.target_agreement, request.adapters) == (0.8, "none")
    request = _calibration(*open_, **fixed)
    assert (request.target_agreement, request.classifiers) == (0.99, ("svm",))
