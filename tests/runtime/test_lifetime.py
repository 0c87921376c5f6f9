"""Engines that are closed: what ends, what is finished first, and what is given back."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest

from adainfer_runtime import Engine
from adainfer_runtime.batch import ContinuousBatching, TakeTurns
from adainfer_runtime.errors import RequestError
from adainfer_runtime.lifetime import Lifetime

from ..export.exit_folder import make_exit_folder
from .device_engines import on_both

TEXT = {"max_new_tokens": 6, "ignore_eos": True}


@pytest.fixture
def made(tiny):
    return tiny("llama")


def refused():
    return pytest.raises(RequestError, match=r"^this engine is closed$")


def test_a_closed_engine_refuses_every_request(made):
    with Engine.load(made.folder) as engine:
        assert engine.generate("hello", **TEXT).tokens
        assert engine.choose("x:", ["a", "b"]).label
        session, unread = engine.session(), engine.stream("hello", **TEXT)
        session.extend([5, 6])
    engine.close()
    for call in (
        lambda: engine.generate("hello"),
        lambda: engine.stream("hello"),
        lambda: engine.generate_batch([]),
        lambda: engine.choose("x:", ["a", "b"]),
        engine.session,
        lambda: engine.borrow().__enter__(),
        session.complete,
        lambda: session.length,
        lambda: next(unread),
        lambda: engine.backend.max_rows,
    ):
        with refused():
            call()
    assert engine.tokenizer.encode("hello")
    assert engine.statistics.texts == {"length": 1}
    assert repr(engine).endswith(", closed>")


def test_a_block_that_fails_closes_the_engine(made):
    with pytest.raises(ZeroDivisionError), Engine.load(made.folder) as engine:
        raise ZeroDivisionError
    with refused():
        engine.session()


def test_a_session_can_be_closed_alone(made):
    session = made.engine.session()
    session.close()
    with pytest.raises(RequestError, match=r"^this session is closed$"):
        session.extend([5])
    assert made.engine.generate([5], **TEXT).tokens


def test_what_runs_is_finished(made):
    """In the same thread: closing does not wait for a stream that stands between two tokens."""
    expected = made.engine.generate("hello", **TEXT)
    engine = Engine.load(made.folder)
    events = engine.stream("hello", **TEXT)
    next(events)
    session = engine.session()
    engine.close()
    with refused():
        engine.stream("hello")
    *_, last = events
    assert last.result.tokens == expected.tokens
    with refused():
        session.extend([5])
    with refused():
        engine.backend.max_rows  # noqa: B018


@pytest.mark.parametrize("scheduler", [ContinuousBatching(2), TakeTurns(2)])
def test_batches_are_finished(made, scheduler):
    """Texts that have not begun too."""
    prompts = [[5, 6], [7, 8, 9], [10]]
    expected = [made.engine.generate(prompt, **TEXT).tokens for prompt in prompts]
    engine = Engine.load(made.folder)
    done = engine.generate_batch(
        prompts, scheduler=scheduler, on_result=lambda *_: engine.close(), **TEXT
    )
    assert [result.tokens for result in done] == expected
    with refused():
        engine.generate_batch(prompts, scheduler=scheduler)


def test_a_stream_that_is_left_ends_with_its_generator(made):
    engine = Engine.load(made.folder)
    backend = weakref.ref(engine.backend)
    events = engine.stream("hello", **TEXT)
    next(events)
    engine.close()
    assert backend() is not None
    del events
    gc.collect()
    assert backend() is None


def test_stages_are_given_back(made):
    engine = Engine.load(made.folder, profile=True)
    policy, stages = engine.policy("off"), engine.backend
    engine.generate("hello", **TEXT)
    engine.close()
    assert policy.checks == ()
    assert stages._inner.embed is None
    assert not stages._inner._stages


@pytest.mark.parametrize("target", ["onnx-std", "tensorrt-basic"])
def test_device_memory_is_given_back(tiny, tmp_path, target):
    """Though the caller still holds the engine, a session and a policy over its graphs."""
    folder = make_exit_folder(tiny("llama", target=target).folder, tmp_path / "engines")
    pair = on_both(folder)
    engine, driver = pair.device, pair.driver
    engine.generate([5, 6, 7], mode="adaptive", **TEXT)
    session, policy = engine.session(), engine.policy("adaptive")
    session.extend([5, 6])
    session.complete()
    before = driver.live_bytes
    engine.close()
    assert policy.checks
    assert driver.live_bytes < before
    del policy
    gc.collect()
    assert (driver.live_bytes, driver.graphs) == (0, 0)
    with refused():
        session.extend([7])


def test_the_last_at_work_lets_go_once():
    lifetime, released = Lifetime(), []
    inside, leave = threading.Event(), threading.Event()

    def work():
        with lifetime.work(), lifetime.work():
            inside.set()
            leave.wait()

    thread = threading.Thread(target=work)
    thread.start()
    inside.wait()
    for _ in range(2):
        lifetime.close(lambda: released.append(1))
    assert (lifetime.closed, released) == (True, [])
    with lifetime.work():
        pass  # a part of what is at work still
    leave.set()
    thread.join()
    assert released == [1]
    with refused(), lifetime.work():
        pass
    with refused():
        lifetime.check()


def test_engines_say_what_they_are(made, tiny, tmp_path):
    assert repr(made.engine) == (
        f"<Engine {made.folder}: {made.engine.manifest.source.id}, 4 layers, ort-cpu fp32 on cpu, "
        "exits after layers: none, modes: off>"
    )
    exits = Engine.load(make_exit_folder(made.folder, tmp_path / "engines"))
    layers = ", ".join(map(str, exits.manifest.exit_layers))
    assert f"exits after layers: {layers}, modes: off, adaptive, context, combined, verified>" in (
        repr(exits)
    )
