"""The same checkpoint as an onnxruntime-genai int4 model, for `benchmark.py`.

    python tools/make_genai_peer.py smollm2-135m build/genai
    python tools/make_genai_peer.py build/llama2-7b build/genai --most-gb 18

Uses genai's own builder with its defaults for int4 on CPUs: block 32, accuracy level 4; prints its
time and its peak memory. Needs `pip install 'adainfer-export[bench]'`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from adainfer_export.sources import resolve
from adainfer_export.validate import reference_model

_SETTINGS = "tokenizer_config.json"


def main() -> None:
    """Hands the checkpoint to the builder in Hugging Face's layout."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model", help="alias, folder or .gguf file")
    parser.add_argument("out", type=Path)
    parser.add_argument("--most-gb", type=float, help="stop the builder when it takes more memory")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        fill(folder, args.model)
        if not (folder / _SETTINGS).exists():
            settings = {"tokenizer_class": "PreTrainedTokenizerFast"}
            (folder / _SETTINGS).write_text(json.dumps(settings))
        build(folder, args.out, args.most_gb)


def fill(folder: Path, model: str) -> None:
    """Links to a Hugging Face folder's own files, or a copy of another checkpoint in float32."""
    if (Path(model) / "config.json").is_file():
        for file in Path(model).resolve().iterdir():
            (folder / file.name).symlink_to(file)
        return
    checkpoint = resolve(model)
    reference_model(checkpoint).save_pretrained(folder)
    checkpoint.write_tokenizer(folder)


def build(folder: Path, out: Path, most_gb: float | None) -> None:
    """Runs the builder and watches its resident memory."""
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder"]
    command += ["-i", str(folder), "-o", str(out), "-p", "int4", "-e", "cpu"]
    command += ["-c", str(folder / "cache")]
    start, peak = time.perf_counter(), 0
    with tempfile.TemporaryFile("w+") as log:
        builder = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log)
        watched = psutil.Process(builder.pid)
        while builder.poll() is None:
            peak = max(peak, resident(watched))
            if most_gb is not None and peak > most_gb * 1e9:
                builder.kill()
                builder.wait()
                sys.exit(
                    f"stopped after {time.perf_counter() - start:.0f} s at {peak / 1e9:.1f} GB"
                )
            time.sleep(0.05)
        log.seek(0)
        if builder.returncode:
            sys.exit(f"the builder failed:\n{log.read()[-2000:]}")
    print(f"{out}: {time.perf_counter() - start:.0f} s, peak {peak / 1e9:.2f} GB")


def resident(process: psutil.Process) -> int:
    """Bytes; 0 where it has just ended."""
    try:
        return int(process.memory_info().rss)
    except psutil.Error:
        return 0


if __name__ == "__main__":
    main()
