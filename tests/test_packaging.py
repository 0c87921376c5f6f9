from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_every_package_is_in_the_wheel():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = {
        ".".join(path.parent.relative_to(root).parts)
        for root in (ROOT, ROOT / "runtime", ROOT / "models")
        for path in root.glob("adainfer_*/**/__init__.py")
    }
    assert found == set(settings["packages"])
