"""CUDA graphs that cannot be recorded: decoding goes on, with the right tokens."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest

from adainfer_runtime import NoExit
from adainfer_runtime.backends.tensorrt_graphs import GraphRecorder, RecordedRun
from adainfer_runtime.errors import StageError

from .fake_device import FakeDriver
from .test_tensorrt import PROMPT, fake_backend, tokens_of


@pytest.mark.parametrize("fails", ["run", "end"])
@pytest.mark.parametrize("target", ["tensorrt", "tensorrt-basic"])
def test_a_capture_that_fails_costs_no_token(tiny, caplog, target, fails):
    made = tiny("llama", target=target, precision="fp16")
    manifest = made.engine.manifest
    backend, driver = fake_backend(made, capture_fails=fails)
    with caplog.at_level(logging.WARNING):
        mine, session = tokens_of(backend, manifest, PROMPT, 6)
    theirs, _ = tokens_of(made.engine.backend, manifest, PROMPT, 6)
    assert mine == theirs
    assert [entry for entry in driver.log if entry[0] == "graph"] == []
    (record,) = caplog.records  # one, however many stages
    assert "cannot be recorded as a CUDA graph and runs without one" in record.getMessage()
    # Never again, in this sequence or another; what is bound later runs plainly at once.
    tried = driver.captures
    assert tried == (1 if target == "tensorrt-basic" else 2 + len(manifest.layer_stages))
    session.extend([session.predict(NoExit()).result.token])
    again, _ = tokens_of(backend, manifest, PROMPT, 6)
    assert again == theirs
    assert driver.captures == tried


def test_captures_go_on_where_one_stage_failed(tiny):
    """Graphs of other stages are recorded all the same."""
    made = tiny("llama", target="tensorrt", precision="fp16")
    backend, driver = fake_backend(made, capture_fails="end")
    record = driver.record

    def first_fails(work):
        try:
            return record(work)
        finally:
            driver.capture_fails = None

    driver.record = first_fails
    _, session = tokens_of(backend, made.engine.manifest, PROMPT, 4)
    driver.log.clear()
    session.extend([session.predict(NoExit()).result.token])
    graphs = [entry for entry in driver.log if entry[0] == "graph"]
    assert len(graphs) == 2 + len(made.engine.manifest.layer_stages) - 1


class Run:
    """A bound context; `capturable` is what it answers, one after the other, the last for ever."""

    def __init__(self, *capturable):
        self.answers = list(capturable)
        self.runs, self.asked = 0, 0

    def enqueue(self):
        self.runs += 1

    def capturable(self):
        self.asked += 1
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


def test_a_stage_is_asked_again_whether_it_can_be_recorded():
    driver, run = FakeDriver(), Run(False, False, True)
    call = RecordedRun("s", lambda: run, GraphRecorder(driver))
    for _ in range(6):
        call()
    assert run.asked == 3
    assert run.runs == 4  # three plain, one while recording
    assert len([entry for entry in driver.log if entry[0] == "graph"]) == 3


def test_a_stage_that_never_can_is_asked_a_few_times():
    driver, run = FakeDriver(), Run(False)
    call = RecordedRun("s", lambda: run, GraphRecorder(driver))
    for _ in range(20):
        call()
    assert (run.asked, run.runs, driver.captures) == (4, 20, 0)


def test_a_first_run_that_fails_is_not_recorded():
    """It settles nothing, and the run after it is the first."""
    driver, run = FakeDriver(), Run(True)
    call = RecordedRun("s", lambda: run, GraphRecorder(driver))
    run.enqueue = lambda: (_ for _ in ()).throw(StageError("a stage"))
    with pytest.raises(StageError, match="a stage"):
        call()
    del run.enqueue
    call()
    assert (run.runs, driver.captures) == (1, 0)


def test_a_stream_that_is_broken_is_an_error():
    """Nothing can run on it, with or without graphs."""

    def fail(*_):
        raise StageError("CUDA: cudaErrorIllegalAddress")

    recorder = GraphRecorder(SimpleNamespace(record=fail, wait=fail))
    call = RecordedRun("s", lambda: Run(True), recorder)
    call()
    with pytest.raises(StageError, match="IllegalAddress"):
        call()
