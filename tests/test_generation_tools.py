"""Tools about generation: verified against off, tables, forecasts."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

TOOLS = Path(__file__).resolve().parents[1] / "tools"


def run(tool, *arguments):
    command = [sys.executable, str(TOOLS / tool), *map(str, arguments)]
    return subprocess.run(command, check=False, capture_output=True, text=True)


def test_verified_texts_equal_off(tiny, tmp_path):
    out = tmp_path / "report.json"
    arguments = ["--prompts", "3", "--tokens", "16", "--batch", "1,2", "--drafts", "3"]
    arguments += ["--chunk", "7", "--kv-tolerance", "1e-4", "--json", str(out)]
    folder = tiny("llama").folder
    done = run("verify_generation.py", folder, *arguments)
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
    done = run("verify_generation.py", folder, *strict)
    assert done.returncode == 1  # every cache differs by more than that


def measured(name, accepted=None, exits=None):
    return {"name": name, "accepted": accepted, "exits": exits or {}}


def test_gains_are_forecast_for_another_model(tiny, tmp_path):
    table = tmp_path / "table.json"
    rows = [
        measured("off"),
        measured("verified, full, forced: 1 of layer 15", accepted=0.75),
        measured("verified, full, forced: 2 of layer 15", accepted=0.1),
        measured("adaptive, deferred, full, forced", exits={"15": 0.25, "30": 0.75}),
    ]
    table.write_text(json.dumps({"layers": 30, "rows": rows}))
    out, times = tmp_path / "forecast.json", tmp_path / "times.json"
    folder = tiny("llama").folder  # four layers, not calibrated
    arguments = [folder, "--measured", table, "--times", times, "--repeats", 2, "--json", out]
    done = run("decode_forecast.py", *arguments)
    assert done.returncode == 0, done.stderr
    off, verified, adaptive = json.loads(out.read_text())
    assert (off["name"], off["gain"], off["layers_per_token"]) == ("off", 1.0, 4.0)
    assert verified["name"] == "verified, drafts of layer 2"
    assert (verified["share"], adaptive["share"]) == (0.75, 0.25)
    assert adaptive["name"] == "adaptive, exits after 2"
    kept = json.loads(times.read_text())
    assert kept["times"]["adapter"] > 0  # made up: this folder has none
    assert off["tokens_per_second"] == pytest.approx(1.0 / kept["times"]["step"])
    # The times that were kept give the same forecast: nothing is measured again.
    before = out.read_text()
    assert run("decode_forecast.py", *arguments).returncode == 0
    assert out.read_text() == before


def test_the_table_has_what_forecasts_are_made_from(tiny, tmp_path):
    out = tmp_path / "table.json"
    done = run(
        "generation_table.py", tiny("llama").folder, "--prompts", 2, "--tokens", 8,
        "--rounds", 2, "--json", out,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    content = json.loads(out.read_text())
    assert content["layers"] == 4
    (off,) = content["rows"]  # not calibrated: nothing else can be compared
    assert (off["name"], off["ratio"], off["exits"]) == ("off", 1.0, {"4": 1.0})
    assert off["text_agreement"] == 1.0
    assert (off["low"], off["high"]) == (1.0, 1.0)
    assert "ratio (quartiles)" in done.stdout


def test_rows_of_the_table(monkeypatch):
    """Every way is there with the full probe and the shortlist, planned and forced."""
    monkeypatch.syspath_prepend(str(TOOLS))
    rows = importlib.import_module("generation_table")._rows
    manifest = SimpleNamespace(
        exit=object(), plan=None, shortlist=object(), exit_points={19: None, 25: None},
        context_points={19: None},
    )  # fmt: skip
    names = [row.name for row in rows(SimpleNamespace(manifest=manifest), 64, None)]
    for probe in ("full", "shortlist"):
        assert {f"verified, {probe}", f"verified, {probe}, forced: 1 of layer 19"} <= set(names)
        for policy in ("deferred", "propagate", "translated"):
            assert f"adaptive, {policy}, {probe}" in names
            assert f"adaptive, {policy}, {probe}, forced" in names
    assert len(names) == len(set(names)) == 1 + (5 + 9) + (3 + 6)


def test_throughput_of_batches(tiny, tmp_path):
    out = tmp_path / "batches.json"
    arguments = ["--sizes", "1", "3", "--new-tokens", "5", "--rounds", "1", "--json", str(out)]
    done = run("batch_throughput.py", tiny("llama").folder, *arguments)
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())
    assert [(row["texts"], row["mode"], row["equal_texts"]) for row in rows] == [
        (1, "off", 1.0), (3, "off", 1.0)
    ]  # fmt: skip
    assert all(row["together"] > 0 and row["layers_saved"] == 0.0 for row in rows)
