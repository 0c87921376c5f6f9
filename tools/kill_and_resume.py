"""Kills an export again and again, resumes it, and compares what comes out.

    python tools/make_checkpoint.py llama2-7b build/llama2 --layers 8
    python tools/kill_and_resume.py build/llama2 build/killed --kills 10

First an export that nobody disturbs (or `--undisturbed DIR`, which is at hand), then one that gets
SIGKILL at random moments, each after it resumed the one before: in the middle of one of its data
files, drawn at random, however fast the machine is. Every file must have the same sha256 in the
end.
"""

from __future__ import annotations

import argparse
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

from adainfer_runtime.engine_folder import load_manifest, verify_files

_EXPORT = "from adainfer_runtime.commands import main_export; main_export()"


def main() -> None:
    """Runs both exports and compares them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("out", type=Path, help="folder for both; it must not exist")
    parser.add_argument("--undisturbed", type=Path, help="a whole export of the same model")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    whole, killed = args.undisturbed or args.out / "whole", args.out / "killed"
    args.out.mkdir(parents=True)
    if args.undisturbed is None:
        finish(start(args.model, whole))
    files, moments = len(list((whole / "stages").glob("*.data"))), random.Random(args.seed)
    if args.kills > files - 2:
        sys.exit(f"{args.kills} kills are too many for {files} data files: every one is to get on")
    for after in sorted(moments.sample(range(1, files - 1), args.kills)):
        part = moments.random()
        while not kill_once(args.model, killed, after, part):
            print(f"ended before the kill: {compare(killed, whole)}; begun anew", flush=True)
            shutil.rmtree(killed)
            part = 0.0  # the last files are written side by side, and fast
        print(f"killed with {finished(killed)} of {files} data files finished", flush=True)
    finish(start(args.model, killed))
    print(compare(killed, whole))


def compare(killed: Path, whole: Path) -> str:
    """Every file's sha256, of what was resumed and of what nobody disturbed."""
    manifest = load_manifest(killed)
    verify_files(killed, manifest, sha256=True)
    if manifest.files != load_manifest(whole).files:
        sys.exit("the files differ")
    return f"{len(manifest.files)} files with the same sha256"


def start(model: str, out: Path) -> subprocess.Popen[bytes]:
    """An export with --resume."""
    command = [sys.executable, "-c", _EXPORT, model, "--out", str(out), "--calibration", "none"]
    return subprocess.Popen([*command, "--resume", "--quiet"], stdout=subprocess.DEVNULL)


def finish(export: subprocess.Popen[bytes]) -> None:
    """Waits for it to end well."""
    if export.wait() != 0:
        sys.exit("the export failed")


def kill_once(model: str, out: Path, after: int, part: float) -> bool:
    """Kills an export once `after` data files are finished, and a part (0 … 1) of the time that a
    file takes. False if it ended before that.
    """
    before = finished(out)
    export = start(model, out)
    wait_for_writing(export, out)
    begun = time.monotonic()
    while finished(out) < after and export.poll() is None:
        time.sleep(0.02)
    file_seconds = (time.monotonic() - begun) / max(1, finished(out) - before)
    time.sleep(part * file_seconds)
    export.kill()
    export.wait()
    return not out.exists()


def finished(out: Path) -> int:
    """Data files that the journal of an unfinished export names."""
    return sum(journal.read_text().count("\n") - 1 for journal in journals(out))


def wait_for_writing(export: subprocess.Popen[bytes], out: Path) -> None:
    """Until the export's own folder has a journal."""
    while not any(f".partial-{export.pid}-" in str(path) for path in journals(out)):
        if export.poll() is not None:
            sys.exit("the export ended before it wrote anything")
        time.sleep(0.02)


def journals(out: Path) -> list[Path]:
    """Of unfinished exports to the same place."""
    return list(out.parent.glob(f".{out.name}.partial-*/journal.jsonl"))


if __name__ == "__main__":
    main()
