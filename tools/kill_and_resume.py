"""Kills an export again and again, resumes it, and compares what comes out.

    python tools/make_checkpoint.py llama2-7b build/llama2 --layers 8
    python tools/kill_and_resume.py build/llama2 build/killed --kills 10

First an export that nobody disturbs (or `--undisturbed DIR`, which is at hand), then one that gets
SIGKILL at random moments, each after it resumed the one before. Every file must have the same
sha256 in the end.
"""

from __future__ import annotations

import argparse
import random
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
    seconds = writing_time(whole)
    print(f"undisturbed: {seconds:.1f} s of writing", flush=True)
    moments = random.Random(args.seed)
    for number in range(args.kills):
        done = kill_once(args.model, killed, moments.uniform(0, seconds / args.kills))
        print(f"kill {number + 1}: {done} files were finished", flush=True)
    finish(start(args.model, killed))
    manifest = load_manifest(killed)
    verify_files(killed, manifest, sha256=True)
    if manifest.files != load_manifest(whole).files:
        sys.exit("the files differ")
    print(f"{len(manifest.files)} files with the same sha256")


def start(model: str, out: Path) -> subprocess.Popen[bytes]:
    """An export with --resume."""
    command = [sys.executable, "-c", _EXPORT, model, "--out", str(out), "--calibration", "none"]
    return subprocess.Popen([*command, "--resume", "--quiet"], stdout=subprocess.DEVNULL)


def finish(export: subprocess.Popen[bytes]) -> None:
    """Waits for it to end well."""
    if export.wait() != 0:
        sys.exit("the export failed")


def writing_time(whole: Path) -> float:
    """Seconds from the first finished data file to the last one."""
    moments = [path.stat().st_mtime for path in (whole / "stages").glob("*.data")]
    return max(moments) - min(moments)


def kill_once(model: str, out: Path, delay: float) -> int:
    """Kills an export some seconds after its first new file; files finished by then."""
    before = finished(out)
    export = start(model, out)
    wait_for_writing(export, out)
    while finished(out) <= before and export.poll() is None:  # every round gets further
        time.sleep(0.02)
    time.sleep(delay)
    export.kill()
    export.wait()
    if out.exists():
        sys.exit("the export was faster than the kill: give more layers or fewer kills")
    return finished(out)


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
