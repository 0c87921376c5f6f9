"""The commands as a user types them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

BIN = Path(sys.executable).parent


def command(*arguments, code=0, stdin=None):
    done = subprocess.run(
        [BIN / arguments[0], *map(str, arguments[1:])],
        capture_output=True,
        text=True,
        check=False,
        input=stdin,
    )
    assert done.returncode == code, done.stderr
    return done


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from .checkpoints import make_checkpoint

    root = tmp_path_factory.mktemp("cli")
    make_checkpoint(root / "checkpoint")
    prompts = root / "prompts.jsonl"
    lines = (
        {"prompt": f"{n % 7} {n}: x {n % 5}: y {n}:", "answer": " a", "labels": ["a", "b"]}
        for n in range(90)
    )
    prompts.write_text("\n".join(map(json.dumps, lines)))
    done = command(
        "adainfer-export", root / "checkpoint", "--out", root / "engines", "--precision", "fp32",
        "--calibration", prompts, "--target-agreement", "0.6", "--json",
    )  # fmt: skip
    summary = json.loads(done.stdout)
    specs = [spec for spec in (summary["exit"], summary["choice_exit"]) if spec]
    layers = {point["exit_layer"] for spec in specs for point in spec["points"]}
    assert summary["engines"] == len(layers) + 1  # joined between exits
    assert summary["peak_memory_bytes"] > 0
    return root


def test_run_json(folder):
    done = command(
        "adainfer", "run", folder / "engines", "--prompt", "hello", "--max-new-tokens", 5, "--json"
    )
    data = json.loads(done.stdout)
    assert {"text", "tokens", "exit_layers", "layers_total", "layers_saved", "seconds"} <= set(data)
    assert data["layers_total"] == 4


def test_run_prints_text_alone_on_standard_output(folder):
    done = command(
        "adainfer", "run", folder / "engines", "--prompt", "-", "--mode", "adaptive", stdin="hi"
    )
    assert "layers saved" in done.stderr
    assert "layers saved" not in done.stdout


def test_run_labels(folder):
    done = command(
        "adainfer", "run", folder / "engines", "--prompt", "x:", "--labels", "yes,no", "--json"
    )
    data = json.loads(done.stdout)
    assert data["label"] in ("yes", "no")
    assert len(data["scores"]) == 2


def test_eval(folder, tmp_path):
    report = tmp_path / "report.json"
    done = command(
        "adainfer", "eval", folder / "engines", "--tasks", folder / "prompts.jsonl",
        "--limit", 10, "--json", report,
    )  # fmt: skip
    assert "layers saved" in done.stdout
    content = json.loads(report.read_text())
    assert [row["task"] for row in content["summary"]] == ["prompts", "mean"]
    off, adaptive = content["methods"]
    assert (off["method"], adaptive["method"]) == ("off", "adaptive")
    assert adaptive["mean"]["layers_saved"] >= 0.0
    assert adaptive["tasks"][0]["examples"] == 10
    assert 0 < content["fitted_on"] <= 10
    assert f"fitted on {content['fitted_on']} of these 10 prompts" in done.stderr
    done = command(
        "adainfer", "eval", folder / "engines", "--tasks", folder / "prompts.jsonl",
        "--limit", 5, "--methods", "adaptive,fixed:3,shortgpt:1", "--plots", tmp_path / "plots",
        "--log", tmp_path / "log.jsonl",
    )  # fmt: skip
    assert "shortgpt:1" in done.stdout
    assert (tmp_path / "plots" / "agreement.png").stat().st_size > 1000
    assert isinstance(json.loads((tmp_path / "plots" / "curves.json").read_text()), list)
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 1 + 4 * 5


def test_inspect(folder):
    done = command("adainfer", "inspect", folder / "engines", "--verify")
    assert re.search(r"4 in [1-4] engines?", done.stdout)
    data = json.loads(command("adainfer", "inspect", folder / "engines", "--json").stdout)
    assert data["schema_version"] == 5


def test_validate(folder):
    done = command(
        "adainfer", "validate", folder / "engines", "--reference", folder / "checkpoint", "--json"
    )
    data = json.loads(done.stdout)
    assert data["passed"]
    assert data["logits"] <= 1e-3
    assert [stage["layer"] for stage in data["stages"]] == [1, 2, 3]


def test_validate_against_another_checkpoint(folder, tmp_path):
    from .checkpoints import make_checkpoint

    make_checkpoint(tmp_path / "other", seed=5)
    done = command(
        "adainfer", "validate", folder / "engines", "--reference", tmp_path / "other", code=2
    )
    assert done.stderr.startswith("error: ")
    assert "differs from" in done.stderr


def test_calibrate(folder):
    done = command(
        "adainfer", "calibrate", folder / "engines", "--calibration", folder / "prompts.jsonl",
        "--target-agreement", "0.6", "--adapters", "none", "--json",
    )  # fmt: skip
    assert json.loads(done.stdout)["exit"]["target_agreement"] == 0.6


def test_list():
    done = command("adainfer", "list", "--json")
    data = json.loads(done.stdout)
    assert "smollm2-135m" in {recipe["alias"] for recipe in data["aliases"]}
    assert "llama" in data["architectures"]
    assert "ort-cpu" in command("adainfer", "list").stdout


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (("adainfer", "run", "nowhere", "--prompt", "x"), "is no engine folder"),
        (("adainfer-export", "smolm", "--out", "x"), "did you mean smollm2"),
        (("adainfer", "export", "smolm", "--out", "x"), "did you mean smollm2"),
        (
            ("adainfer-export", "x", "--out", "x", "--calibration", "none", "--calibration", "y"),
            "goes with no other",
        ),
    ],
)
def test_errors_are_one_line_and_code_2(arguments, match):
    done = command(*arguments, code=2)
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert match in done.stderr
    assert not done.stdout


def test_debug_shows_the_traceback():
    done = command("adainfer", "run", "nowhere", "--prompt", "x", "--debug", code=2)
    assert "Traceback" in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [("adainfer",), ("adainfer-export",)]
    + [("adainfer", name) for name in
       ("run", "chat", "eval", "inspect", "export", "calibrate", "validate", "list")],
)  # fmt: skip
def test_help(arguments):
    assert "Usage" in command(*arguments, "--help").stdout


@pytest.mark.parametrize("name", ["export", "calibrate", "certify", "validate"])
def test_help_has_examples(name):
    _, _, examples = command("adainfer", name, "--help").stdout.partition("Examples:")
    assert re.search(f"adainfer.{name} ", examples)


def test_version():
    assert command("adainfer", "--version").stdout.startswith("adainfer 0.")


def test_runtime_works_without_the_compiler(tmp_path):
    """Where the compiler's libraries are missing its commands say so, and nothing else breaks."""
    code = (
        "import sys\n"
        "sys.modules['onnx_ir'] = None\n"  # as if it were not installed
        "from adainfer_runtime.commands import {entry}\n"
        "sys.argv = ['x', '--help']\n"
        "{entry}()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code.format(entry="main")],
        check=False,
        capture_output=True,
        text=True,
    )
    assert "inspect" in done.stdout
    assert "calibrate" in done.stdout
    code = code.replace("--help", "smollm2-135m")
    done = subprocess.run(
        [sys.executable, "-c", code.format(entry="main_export")],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.startswith(
        "error: the compiler is not installed (onnx_ir is missing): pip install"
    )


def test_certify(folder, tmp_path):
    copy = tmp_path / "engines"
    shutil.copytree(folder / "engines", copy)
    prompts = tmp_path / "traffic.jsonl"
    lines = ({"prompt": f"{n % 7} {n}: x {n % 5}: y {n}:"} for n in range(60, 160))
    prompts.write_text("\n".join(map(json.dumps, lines)))
    done = command("adainfer", "certify", copy, "--prompts", prompts, "--json")
    data = json.loads(done.stdout)
    levels = data["certificates"]["svm"]["levels"]
    assert [level["level"] for level in levels] == [0.005, 0.01, 0.02, 0.05, 0.1]
    assert data["fitted_on"] > 0
    assert levels[0]["prompts_needed"] == 598
    shown = command("adainfer", "certify", copy, "--prompts", prompts)
    assert "left out: the exits were fitted on them" in shown.stderr
    assert "not certified" in shown.stdout
    run = ("adainfer", "run", copy, "--prompt", "x", "--mode", "adaptive", "--level", "0.005")
    failed = command(*run, "--max-new-tokens", "1", code=2)
    assert "level 0.005 is not certified" in failed.stderr
    assert command(*run, code=2).stderr == (
        "error: level 0.005 in mode adaptive with kv_policy deferred is certified for answers, not "
        "for texts: run `adainfer certify DIR --texts FILE --max-new-tokens 64`, or ask for one "
        "new token\n"
    )
