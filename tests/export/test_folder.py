"""The place of a finished folder: what stands there by then."""

from __future__ import annotations

import pytest

from adainfer_export.errors import OutputError
from adainfer_export.folder import new_folder
from adainfer_export.journal import JOURNAL_NAME


def write(folder, content):
    (folder / "manifest.json").write_text(content)
    (folder / JOURNAL_NAME).touch()


def siblings(out):
    return sorted(path.name for path in out.parent.iterdir())


def test_two_exports_to_one_place(tmp_path):
    """The second is kept beside the first, which it does not replace."""
    out = tmp_path / "out"
    message = r"out exists; .*was kept as .*: rename that"
    with pytest.raises(OutputError, match=message), new_folder(out) as late:
        write(late, "second")
        with new_folder(out) as early:
            write(early, "first")
    assert (out / "manifest.json").read_text() == "first"
    (kept,) = (path for path in tmp_path.iterdir() if path != out)
    assert (kept / "manifest.json").read_text() == "second"
    assert kept.name.startswith(".out.partial-stopped-")
    with new_folder(out, force=True, resume=True) as again:
        assert (again / "manifest.json").read_text() == "second"  # it goes on with what was kept
    assert siblings(out) == ["out"]


@pytest.mark.parametrize("force", [False, True])
def test_a_folder_that_comes_to_be_meanwhile_is_not_removed(tmp_path, force):
    out = tmp_path / "out"
    message = r"out exists.*it came to be while this was written"
    with pytest.raises(OutputError, match=message), new_folder(out, force=force) as folder:
        write(folder, "engine")
        out.mkdir()
        (out / "mine.txt").write_text("precious")
    assert (out / "mine.txt").read_text() == "precious"


def test_what_may_be_replaced(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with new_folder(out) as folder:  # empty
        write(folder, "first")
    with new_folder(out, force=True) as folder:
        write(folder, "second")
    assert (out / "manifest.json").read_text() == "second"
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with new_folder(tmp_path / "link") as folder:
        write(folder, "third")
    assert not (tmp_path / "link").is_symlink()
    assert siblings(out) == ["elsewhere", "link", "out"]


@pytest.mark.parametrize(
    ("resume", "note"),
    [
        (False, "nothing was kept: --resume keeps what is finished"),
        (True, "what is finished was kept for --resume"),
    ],
)
def test_an_interrupt_says_what_was_kept(tmp_path, resume, note):
    def export():
        with new_folder(tmp_path / "out", resume=resume) as folder:
            write(folder, "half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        export()
    assert caught.value.__notes__ == [note]
    assert len(siblings(tmp_path / "out")) == resume
