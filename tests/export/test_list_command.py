from __future__ import annotations

import json

import pytest

from adainfer_export import list_command
from adainfer_export.errors import UnknownModelError
from adainfer_export.list_command import run_list
from adainfer_models import ExitSettings, QuantisationSettings, list_recipes, load_recipe


def test_an_alias_is_shown_with_all_that_is_known_of_it(capsys):
    run_list("llama2-7b")
    shown = capsys.readouterr().out
    assert shown.startswith("llama2-7b: architecture llama, 32 layers, hidden size 4096\n")
    assert "gated: accept it there, then `hf auth login`" in shown
    assert "exits: none measured\nint4: none measured\n" in shown
    assert "MMLU: accuracy 43.73, mean layers 28.91 [second-hand: SpecEE" in shown
    run_list("smollm2-135m")
    assert "exits: --target-agreement 0.985 --adapters distilled --classifier svm" in (
        capsys.readouterr().out
    )


def test_what_was_not_measured_is_said_to_be_so(capsys):
    for recipe in list_recipes():
        run_list(recipe.alias)
        shown = capsys.readouterr().out
        assert ("exits: none measured" in shown) is (recipe.exits is None)
        assert ("int4: none measured" in shown) is (recipe.quantisation is None)


@pytest.mark.parametrize(
    ("settings", "shown"),
    [
        ({"int8_layers": (1, 30), "int8_head": True}, "int4: --int8-layers 1,30,head (measured)"),
        ({}, "int4: --int8-layers none (measured)"),
    ],
)
def test_sensitive_layers_are_shown_as_the_option_takes_them(settings, shown, monkeypatch, capsys):
    known = QuantisationSettings(note="measured", **settings)
    recipe = load_recipe("gpt2").model_copy(update={"quantisation": known})
    monkeypatch.setattr(list_command, "load_recipe", lambda alias: recipe)
    run_list("gpt2")
    assert shown in capsys.readouterr().out


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
    fixed = {
        "entropy": False,
        "context_exit": False,
        "translators": TranslatorChoice.ridge,
        "shortlist": False,
    }
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
