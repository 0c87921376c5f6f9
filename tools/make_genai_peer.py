"""The same checkpoint as an onnxruntime-genai int4 model, for `benchmark.py`.

    python tools/make_genai_peer.py smollm2-135m build/genai

Uses genai's own builder with its defaults for int4 on CPUs: block 32, accuracy level 4.
Needs `pip install 'adainfer-export[bench]'`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from adainfer_export.sources import resolve
from adainfer_export.validate import reference_model


def main() -> None:
    """Writes the checkpoint in Hugging Face's layout, then runs the builder."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model", help="alias, folder or .gguf file")
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    checkpoint = resolve(args.model)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        reference_model(checkpoint).save_pretrained(folder)
        checkpoint.write_tokenizer(folder)
        settings = {"tokenizer_class": "PreTrainedTokenizerFast"}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder"]
        command += ["-i", str(folder), "-o", str(args.out), "-p", "int4", "-e", "cpu"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"the builder failed:\n{done.stderr[-2000:]}")
    print(args.out)


if __name__ == "__main__":
    main()
