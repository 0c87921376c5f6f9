"""The tool that compares mode verified with mode off says so when they differ."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

TOOL = Path(__file__).resolve().parents[1] / "tools" / "verify_generation.py"


def run(*arguments):
    command = [sys.executable, str(TOOL), *map(str, arguments)]
    return subprocess.run(command, check=False, capture_output=True, text=True)


def test_verified_texts_equal_off(tiny, tmp_path):
    out = tmp_path / "report.json"
    arguments = ["--prompts", "3", "--tokens", "16", "--batch", "1,2", "--drafts", "3"]
    arguments += ["--chunk", "7", "--kv-tolerance", "1e-4", "--json", str(out)]
    folder = tiny("llama").folder
    done = run(folder, *arguments)
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    assert report["kernel_noise"] < 1e-3
    assert [(row["batch"], row["drafts_from"]) for row in report["runs"]] == [
        (1, "exit"), (1, "forced"), (2, "exit"), (2, "forced")
    ]  # fmt: skip
    for row in report["runs"]:
        assert (row["texts"], row["texts_that_differ"], row["wrong"]) == (3, 0, 0)
        assert row["cache_difference"] < 1e-4
    forced = report["runs"][1]
    assert 0 < forced["accepted"] < forced["proposed"]
    strict = [*arguments[:-4], "--kv-tolerance", "-1", "--batch", "1"]
    done = run(folder, *strict)
    assert done.returncode == 1  # every cache differs by more than that
