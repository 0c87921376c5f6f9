"""An engine in device memory that threads share: their passes and exit looks do not mix."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from adainfer_runtime import DecodeOptions

from ..export.exit_folder import make_exit_folder
from .device_engines import on_both

PROMPTS = [[5 + n, 17, 200 - n, 43, 9 * n + 1, 120, 77, 31] for n in range(6)]
ALWAYS = DecodeOptions(exit_looks="always")


@pytest.fixture
def eager_threads():
    """Threads that give way all the time."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.parametrize(
    ("target", "precision"),
    [("onnx-std", "fp32"), ("tensorrt-basic", "fp32"), ("ort-cuda", "fp16")],
)
def test_threads_get_what_they_get_alone(tiny, tmp_path, eager_threads, target, precision):
    made = tiny("llama", target=target, precision=precision)
    pair = on_both(make_exit_folder(made.folder, tmp_path / "engines"))

    def text(engine, number):
        modes = [
            {"mode": "adaptive", "threshold": 0.0},
            {"mode": "adaptive", "threshold": 1e9},
            {"mode": "context", "threshold": 0.0},
        ]
        settings = {"max_new_tokens": 4, "ignore_eos": True, "decoding": ALWAYS}
        done = engine.generate(PROMPTS[number], **modes[number % 3], **settings)
        choice = engine.choose(PROMPTS[number], ["a", "b"], mode="adaptive", threshold=1e9)
        return done.tokens, done.exit_layers, choice.index

    numbers = [*range(len(PROMPTS))] * 2
    alone = [text(pair.cpu, number) for number in numbers]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda number: text(pair.device, number), numbers))
    assert together == alone
