"""Requests: what is refused, what comes back, and that the engine survives both."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from adainfer_export import ExportRequest, export
from adainfer_runtime import CancelToken, Engine, FixedExit
from adainfer_runtime.choose import join_label
from adainfer_runtime.errors import (
    DeadlineError,
    ExitUnavailableError,
    PromptTooLongError,
    RequestCancelledError,
    RequestError,
    TokenizerMissingError,
)

from ..checkpoints import make_checkpoint
from ..reference import reference_logits


@pytest.fixture
def made(tiny):
    return tiny("llama")


def test_text_and_token_ids_are_the_same_prompt(made):
    engine = made.engine
    text = engine.generate("hello", max_new_tokens=5, ignore_eos=True)
    ids = engine.generate(engine.tokenizer.encode("hello"), max_new_tokens=5, ignore_eos=True)
    assert text.tokens == ids.tokens
    assert len(text.tokens) == len(text.exit_layers) == 5
    assert (text.layers_total, text.finish_reason) == (4, "length")
    array = np.array(engine.tokenizer.encode("hello"))
    assert engine.generate(array, max_new_tokens=5, ignore_eos=True).tokens == text.tokens


def test_over_long_prompt(made):
    with pytest.raises(PromptTooLongError, match=r"200 prompt tokens and 1 new ones .* of 128"):
        made.engine.generate([5] * 200, max_new_tokens=1)
    with pytest.raises(PromptTooLongError, match="129 tokens do not fit"):
        made.engine.session().extend([5] * 129)
    full = made.engine.generate([5] * 120, max_new_tokens=9, ignore_eos=True)
    assert len(full.tokens) == 9  # the last new token takes no position
    with pytest.raises(PromptTooLongError):
        made.engine.generate([5] * 120, max_new_tokens=10)


@pytest.mark.parametrize(
    ("prompt", "match"),
    [
        ([], "holds no tokens"),
        ([5, 320], "token id 320 is outside the vocabulary of 320"),
        ([-1], "token id -1 is outside"),
        ([1.5, 2.0], "token ids must be whole numbers, found 1.5"),
        (np.array([1.5, 2.0]), "token ids must be whole numbers, found values of float64"),
        ([True, 5], "token ids must be whole numbers, found True"),
        (np.array([True]), "token ids must be whole numbers, found values of bool"),
        (["a", "b"], "is a list of texts: give one text, or the list to generate_batch"),
        ([[5, 6], [7]], "is a list of lists"),
        (np.array([[5, 6]]), r"one list of token ids, found values of shape \(1, 2\)"),
        (None, "must be text or a list of token ids, found NoneType"),
        ({"input_ids": [5]}, "must be text or a list of token ids, found dict"),
    ],
)
def test_bad_prompts(made, prompt, match):
    with pytest.raises(RequestError, match=match):
        made.engine.generate(prompt, max_new_tokens=2)
    assert made.engine.generate([5, 6], max_new_tokens=2, ignore_eos=True).tokens


def test_one_text_is_no_batch(made):
    with pytest.raises(RequestError, match="prompts is one text: give a list"):
        made.engine.generate_batch("hello")
    with pytest.raises(RequestError, match="prompt 0: the prompt must be text or one list"):
        made.engine.generate_batch([5, 6])


def test_bad_settings(made):
    with pytest.raises(RequestError, match="max_new_tokens must be at least 1, found 0"):
        made.engine.generate([5], max_new_tokens=0)
    with pytest.raises(RequestError, match="mode 'fast' is unknown"):
        made.engine.generate([5], mode="fast")
    with pytest.raises(ExitUnavailableError, match="no exit graph: run `adainfer calibrate"):
        made.engine.generate([5], mode="adaptive")
    for threshold in (float("nan"), "0.5"):
        with pytest.raises(RequestError, match=f"threshold must be a number, found .*{threshold}"):
            made.engine.generate([5], mode="adaptive", threshold=threshold)
    with pytest.raises(RequestError, match="level must be a number, found nan"):
        made.engine.generate([5], level=float("nan"))
    with pytest.raises(RequestError, match="the session is empty"):
        made.engine.session().complete() or made.engine.session().predict(FixedExit(2))
    with pytest.raises(RequestError, match="layer 9 is no boundary"):
        made.engine.session().advance(9)


@pytest.mark.parametrize("threads", ["2", 1.5, True, 0, -1, float("nan")])
def test_threads_that_are_no_number_of_them(made, threads):
    """At the first load of a process and at later ones, as is this."""
    with pytest.raises(RequestError, match="threads must be") as caught:
        Engine.load(made.folder, threads=threads)
    assert "\n" not in str(caught.value)


def test_threads_of_a_pool_that_is_there(made, caplog):
    Engine.load(made.folder, threads=np.int64(97)).close()
    assert "threads=97 is ignored" in caplog.text


def test_deadline_leaves_the_engine_usable(made):
    with pytest.raises(DeadlineError, match=r"deadline of 0\.0 s passed after 0 of 50"):
        made.engine.generate([5, 6], max_new_tokens=50, timeout=0.0, ignore_eos=True)
    assert made.engine.generate([5, 6], max_new_tokens=3, ignore_eos=True).tokens


def test_engine_without_tokenizer(tmp_path):
    make_checkpoint(tmp_path / "checkpoint", tokenizer=False)
    export(ExportRequest(str(tmp_path / "checkpoint"), tmp_path / "engines", precision="fp32"))
    engine = Engine.load(tmp_path / "engines")
    with pytest.raises(TokenizerMissingError, match="give token ids instead of text"):
        engine.generate("hello")
    result = engine.generate([5, 6, 7], max_new_tokens=4, ignore_eos=True)
    assert (len(result.tokens), result.text) == (4, "")


def test_eos_ends_the_text(made):
    engine = made.engine
    free = engine.generate([5, 6, 7], max_new_tokens=8, ignore_eos=True).tokens
    model = engine.manifest.model.model_copy(update={"eos_token_ids": (free[3],)})
    manifest = engine.manifest.model_copy(update={"model": model})
    stopping = Engine(manifest, engine.backend, engine.tokenizer)
    result = stopping.generate([5, 6, 7], max_new_tokens=8)
    assert (result.tokens, result.finish_reason) == (free[: free.index(free[3])], "eos")


def test_choice_scores_are_log_probabilities_among_the_labels(made):
    engine = made.engine
    labels = ["a", "bcd", "zz"]
    result = engine.choose("x:", labels)
    prompt = engine.tokenizer.encode("x:")
    expected = []
    for label in labels:
        tokens = engine.tokenizer.encode_continuation(f" {label}")
        logits = reference_logits(made.reference, [*prompt, *tokens]).astype(np.float64)
        log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        rows = enumerate(tokens, start=len(prompt) - 1)
        expected.append(sum(log_probs[row, token] for row, token in rows))
    expected -= np.log(np.exp(expected).sum())
    np.testing.assert_allclose(result.scores, expected, atol=1e-3)
    assert result.label == labels[int(np.argmax(result.scores))]


def test_labels_that_begin_alike_are_told_apart_by_what_follows(made):
    engine = made.engine
    assert len({engine.tokenizer.encode_continuation(label)[0] for label in (" ab", " ac")}) == 1
    result = engine.choose("x:", ["ab", "ac"])
    assert result.exit_layer == 4
    assert np.exp(result.scores).sum() == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
@pytest.mark.parametrize("variant", ["llama", "llama-tied"])
def test_candidate_rows_are_those_of_the_head(tiny, variant, precision):
    backend = tiny(variant, precision=precision).engine.backend
    hidden = np.random.default_rng(0).normal(size=64).astype(np.float32)
    candidates = np.array([7, 3, 250, 19])
    full, few = backend.probe(hidden), backend.probe_candidates(hidden, candidates)
    # MatMulNBits at accuracy level 4 rounds its input to 8 bits, the few rows are multiplied in
    # full: the difference is that rounding's.
    loose = 0.0 if precision == "fp32" else 0.02 * np.abs(full.logits).max()
    np.testing.assert_allclose(few.logits, full.logits[candidates], atol=1e-4 + loose)
    probabilities = np.exp(few.logits - few.logits.max())
    probabilities /= probabilities.sum()
    first, second = np.sort(probabilities)[::-1][:2]
    assert few.token == candidates[probabilities.argmax()]
    assert few.top_prob == pytest.approx(first, abs=1e-5)
    assert few.gap == pytest.approx(first - second, abs=1e-5)


@pytest.mark.parametrize(
    ("labels", "match"),
    [
        (["a"], "at least two labels"),
        (["a", "a"], "same tokens"),
        (["a", ""], "holds no tokens"),
        ("ab", "labels must be a list of texts, found 'ab'"),
        (None, "labels must be a list of texts, found None"),
        (["a", 5], "labels must be a list of texts, found 5 in it"),
    ],
)
def test_bad_labels(made, labels, match):
    with pytest.raises(RequestError, match=match):
        made.engine.choose("x:", labels)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"threshold": 0.5}, "threshold has no effect in mode off"),
        ({"threshold": float("nan"), "mode": "adaptive"}, "threshold must be a number, found nan"),
        ({"timeout": -1}, "timeout must be 0 or more seconds, found -1"),
        ({"timeout": "1"}, "timeout must be a number, found '1'"),
        ({"cancel": True}, "cancel must be a CancelToken, found True"),
        ({"mode": "fast"}, "mode 'fast' is unknown"),
    ],
)
def test_bad_choices(made, options, match):
    with pytest.raises(RequestError, match=match):
        made.engine.choose("x:", ["a", "b"], **options)
    with pytest.raises(RequestError, match="found NoneType"):
        made.engine.choose(None, ["a", "b"])


def test_choices_end_in_time_or_when_they_are_cancelled(made):
    engine = made.engine
    asked = []

    class Late(CancelToken):
        """Cancelled while the prompt is read."""

        def __call__(self):
            asked.append(1)
            return len(asked) > 2

    with pytest.raises(DeadlineError, match=r"deadline of 0\.0 s passed before a label was found"):
        engine.choose("x:", ["a", "b"], timeout=0.0)
    with pytest.raises(RequestCancelledError, match="cancelled before a label was found"):
        engine.choose("x:", ["a", "b"], cancel=Late())
    assert len(asked) == 3
    free = engine.choose("x:", ["a", "b"])
    timed = engine.choose("x:", iter(["a", "b"]), timeout=60, cancel=CancelToken())
    assert (timed.label, timed.scores) == (free.label, free.scores)


def test_labels_join_the_prompt_as_words():
    assert join_label("A:", "yes") == " yes"
    assert join_label("A: ", "yes") == "yes"
    assert join_label("(", "yes") == "yes"
    assert join_label("A:", " yes") == " yes"
    assert join_label("", "yes") == "yes"


def test_fixed_exit_counts_its_layers(made):
    session = made.engine.session()
    session.extend([5, 6, 7, 8])
    prediction = session.predict(FixedExit(3))
    assert prediction.exit_layer == 3
    assert (session.count.executed, session.count.dense) == (12, 16)


def test_threads_share_an_engine(made):
    """Each request has its own sequence: results do not depend on what runs beside."""
    engine = made.engine
    prompts = [[5 + i, 9, 40 + i] for i in range(8)]
    alone = [engine.generate(p, max_new_tokens=12, ignore_eos=True).tokens for p in prompts]
    together = [None] * len(prompts)

    def work(index):
        result = engine.generate(prompts[index], max_new_tokens=12, ignore_eos=True)
        together[index] = result.tokens

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone


def test_a_conversation_of_ones_own(made):
    engine = made.engine
    session = engine.session()
    session.extend([5, 6, 7])
    session.complete()
    session.extend([8, 9])
    session.complete()
    whole = engine.session()
    whole.extend([5, 6, 7, 8, 9])
    whole.complete()
    np.testing.assert_allclose(session.hidden(), whole.hidden(), atol=1e-5)
    assert session.tokens == (5, 6, 7, 8, 9)


def test_runtime_needs_no_torch():
    import subprocess
    import sys

    code = (
        "import sys, adainfer_runtime, adainfer_runtime.backends.ort_cpu\n"
        "heavy = {'torch', 'transformers', 'onnx', 'onnx_ir', 'sklearn', 'mobius'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_public_names():
    import adainfer_runtime
    from adainfer_runtime import errors

    assert set(adainfer_runtime.__all__) <= set(dir(adainfer_runtime))
    assert {"Engine", "Session"} <= set(adainfer_runtime.__all__)
    assert set(errors.__all__) <= set(adainfer_runtime.__all__)
