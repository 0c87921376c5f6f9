"""`adainfer run` and `adainfer chat`: in process, through pipes and on a terminal."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from types import SimpleNamespace
from typing import get_args

import pytest
import typer
from typer.testing import CliRunner

from adainfer_export import ExportRequest, export
from adainfer_runtime import Engine
from adainfer_runtime.commands.answers import AnswerPrinter, ExitColours, cancel_on_interrupt
from adainfer_runtime.commands.app import build_app
from adainfer_runtime.commands.chat import _lines
from adainfer_runtime.commands.generation_arguments import takes_generation_options
from adainfer_runtime.confidence import ConfidenceDecay
from adainfer_runtime.decode_options import DecodeOptions, ExitLooks
from adainfer_runtime.draft_schedule import Fixed
from adainfer_runtime.errors import (
    ChatTemplateError,
    DeadlineError,
    ExitUnavailableError,
    RequestError,
)
from adainfer_runtime.generation_options import GenerationKeywords
from adainfer_runtime.kv_fill import KvPolicy
from adainfer_runtime.results import Span, StreamEvent
from adainfer_runtime.session import ExitProbe

from .checkpoints import make_checkpoint
from .runtime.test_chat import CHATML

MAIN = "from adainfer_runtime.commands import main\nmain()\n"
# Answers that take long enough to be interrupted.
SLOW = (
    "import time\n"
    "from adainfer_runtime.decoding import PolicyDecoder\n"
    "step = PolicyDecoder.step\n"
    "PolicyDecoder.step = lambda self: (time.sleep(0.05), step(self))[1]\n"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("cli")
    make_checkpoint(root / "checkpoint")
    (root / "checkpoint" / "chat_template.jinja").write_text(CHATML)
    export(ExportRequest(str(root / "checkpoint"), root / "engines", precision="fp32"))
    return root / "engines"


@pytest.fixture(scope="module")
def engine(folder):
    return Engine.load(folder)


def run(*arguments, stdin=None, **settings):
    done = CliRunner().invoke(build_app(), list(map(str, arguments)), input=stdin, **settings)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done


def test_run_options_are_those_of_generate(folder, engine):
    done = run(
        "run", folder, "--prompt", "hello", "--max-new-tokens", 12, "--temperature", 0.9,
        "--top-k", 50, "--top-p", 0.9, "--min-p", 0.01, "--repetition-penalty", 1.1,
        "--frequency-penalty", 0.2, "--presence-penalty", 0.1, "--seed", 4, "--stop", "zz",
        "--stop", "qq", "--logprobs", 2, "--min-new-tokens", 3, "--stop-token-id", 9,
        "--stop-token-id", 11, "--logit-bias", "20=2.5", "--logit-bias", "7=-inf", "--ignore-eos",
        "--json",
    )  # fmt: skip
    data = json.loads(done.stdout)
    expected = engine.generate(
        "hello", max_new_tokens=12, temperature=0.9, top_k=50, top_p=0.9, min_p=0.01,
        repetition_penalty=1.1, frequency_penalty=0.2, presence_penalty=0.1, seed=4,
        stop=["zz", "qq"], logprobs=2, min_new_tokens=3, stop_token_ids=[9, 11],
        logit_bias={20: 2.5, 7: float("-inf")}, ignore_eos=True,
    )  # fmt: skip
    assert data["text"] == expected.text
    assert tuple(data["tokens"]) == expected.tokens
    assert len(data["logprobs"]) == len(expected.tokens)
    assert {"prompt_seconds", "time_to_first_token", "kv_fills"} <= set(data["statistics"])


def test_tokens_and_biases_of_the_command_line():
    options = options_of(
        "--stop-token-id", 3, "--stop-token-id", 4, "--ignore-eos", "--logit-bias", "5=-inf",
        "--logit-bias", "6=1.5",
    )  # fmt: skip
    assert options["stop_token_ids"] == (3, 4)
    assert options["ignore_eos"]
    assert options["logit_bias"] == {5: float("-inf"), 6: 1.5}
    for wrong in ("5", "5=", "=1", "a=1", "5=b", "5=1=2"):
        with pytest.raises(RequestError, match=f"--logit-bias must be ID=VALUE.* found '{wrong}'"):
            run("run", "no-engine", "--prompt", "x", "--logit-bias", wrong)


def decoding_of(*arguments):
    """What a command line hands on."""
    found = options_of(*arguments)
    return found if isinstance(found, str) else found["decoding"]


def options_of(*arguments):
    seen = []

    @takes_generation_options(max_new_tokens=64)
    def command(options: GenerationKeywords) -> None:
        seen.append(options)

    app = typer.Typer()
    app.command()(command)
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return seen[0] if seen else done.output


def test_decode_options_of_the_command_line():
    assert decoding_of() == DecodeOptions()
    assert decoding_of(
        "--mode", "auto", "--kv-policy", "propagate", "--probe", "shortlist",
        "--exit-looks", "always", "--confidence-decay", 4,
        "--draft-layer", 3, "--drafts", 2, "--max-new-tokens", 20,
    ) == DecodeOptions(
        kv_policy="propagate",
        probe="shortlist",
        exit_looks="always",
        confidence=ConfidenceDecay(4.0, 20),
        draft_layer=3,
        draft_schedule=Fixed(2),
    )  # fmt: skip
    for name, choices in (
        ("--kv-policy", KvPolicy), ("--probe", ExitProbe), ("--exit-looks", ExitLooks)
    ):  # fmt: skip
        for value in get_args(choices):
            assert isinstance(decoding_of("--mode", "auto", name, value), DecodeOptions)
        assert "Invalid value" in decoding_of(name, "none-such")
    assert "Invalid value" in decoding_of("--drafts", -1)


def test_times_by_stage_are_shown_where_they_are_wanted(folder):
    arguments = ["run", folder, "--prompt", "hello", "--max-new-tokens", 4]
    assert "ms by stage: embed " in run(*arguments, "--profile").output.replace("\n", " ")
    assert "ms by stage" not in run(*arguments).output
    data = json.loads(run(*arguments, "--profile", "--json").stdout)
    assert data["statistics"]["stage_seconds"]["layers"] > 0
    labels = run("run", folder, "--prompt", "x:", "--labels", "a,b", "--profile")
    assert "ms by stage" in labels.output.replace("\n", " ")


def test_run_drafts_as_asked(folder, engine):
    arguments = ["--prompt", "hello", "--max-new-tokens", 12, "--json"]
    off = json.loads(run("run", folder, *arguments).stdout)
    drafting = ["--mode", "verified", "--draft-layer", 3, "--drafts", 2]
    done = json.loads(run("run", folder, *arguments, *drafting, "--logprobs", 1).stdout)
    assert done["text"] == off["text"]
    assert done.keys() == off.keys()
    assert done["statistics"]["drafts"]["proposed"] > 0
    assert len(done["logprobs"]) == 12
    with pytest.raises(ExitUnavailableError, match="no shortlist: run `adainfer calibrate DIR"):
        run("run", folder, *arguments, *drafting, "--probe", "shortlist")
    with pytest.raises(ExitUnavailableError, match="draft_layer 9 is no boundary between engines"):
        run("run", folder, *arguments, "--mode", "verified", "--draft-layer", 9)


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (
            ["--drafts", 2],
            r"^draft_schedule \(--drafts\) has no effect in mode off: .* verified or",
        ),
        (["--draft-layer", 3], "^draft_layer has no effect in mode off"),
        (["--kv-policy", "propagate"], "^kv_policy has no effect in mode off"),
        (["--confidence-decay", 4], r"\(--confidence-decay\) has no effect in mode off"),
        (["--exit-looks", "always"], "^exit_looks has no effect in mode off"),
        (
            ["--threshold", 0.5],
            "^threshold has no effect in mode off: .* adaptive, context or auto",
        ),
        (["--threshold", 0.5, "--mode", "verified"], "^threshold has no effect in mode verified"),
    ],
)
@pytest.mark.parametrize("command", ["run", "chat", "batch"])
def test_flags_that_a_mode_would_ignore_are_refused(tmp_path, command, flags, match):
    """Before an engine is loaded, or a file begun."""
    out = tmp_path / "texts.jsonl"
    files = {
        "run": ["--prompt", "hello"], "chat": [],
        "batch": ["--prompts", tmp_path / "prompts.jsonl", "--out", out],
    }  # fmt: skip
    with pytest.raises(RequestError, match=match):
        run(command, tmp_path / "no-engine", *files[command], *flags)
    assert not out.exists()


@pytest.mark.parametrize(
    "flags",
    [
        ["--temperature", 0.5], ["--stop", "x"], ["--logprobs", 1], ["--show-exits"], ["--stream"],
        ["--max-new-tokens", 3], ["--seed", 0], ["--mode", "verified", "--drafts", 1],
        ["--mode", "adaptive", "--kv-policy", "propagate"], ["--stop-token-id", 3],
        ["--ignore-eos"], ["--logit-bias", "3=1"],
    ],
)  # fmt: skip
def test_a_choice_refuses_what_speaks_of_a_text(tmp_path, flags):
    flag = next(f for f in reversed(flags) if str(f).startswith("--"))
    with pytest.raises(RequestError, match=f"^--labels chooses .*: leave {flag} out$"):
        run("run", tmp_path / "no-engine", "--prompt", "x:", "--labels", "a,b", *flags)


def test_a_choice_takes_a_deadline(folder):
    arguments = ["run", folder, "--prompt", "x:", "--labels", "a,b", "--json", "--no-stream"]
    assert json.loads(run(*arguments, "--timeout", 60).stdout)["label"] in ("a", "b")
    with pytest.raises(DeadlineError, match=r"deadline of 0\.0 s passed before a label was found"):
        run(*arguments, "--timeout", 0)


def test_an_interrupted_choice_has_the_shells_code(folder, monkeypatch):
    def cancelled(engine, *_, cancel, **__):
        cancel.cancel()
        return choose(engine, "x:", ["a", "b"], cancel=cancel)

    choose = Engine.choose
    monkeypatch.setattr(Engine, "choose", cancelled)
    done = run("run", folder, "--prompt", "x:", "--labels", "a,b")
    assert (done.exit_code, done.stdout) == (130, "")


def test_run_streams_what_it_would_print(folder):
    arguments = ["run", folder, "--prompt", "hello", "--max-new-tokens", 12]
    whole, streamed = run(*arguments), run(*arguments, "--stream")
    assert whole.stdout == streamed.stdout == run(*arguments, "--no-stream").stdout
    assert "12 tokens in" in whole.stderr
    assert "12 tokens in" not in whole.stdout


def test_run_chat_applies_the_template(folder, engine):
    done = run("run", folder, "--prompt", "hi", "--chat", "--max-new-tokens", 6, "--json")
    expected = engine.chat([{"role": "user", "content": "hi"}], max_new_tokens=6)
    assert json.loads(done.stdout)["text"] == expected.text
    done = run("run", folder, "--prompt", "hi", "--chat", "--labels", "yes,no", "--json")
    chosen = engine.choose(
        engine.tokenizer.encode_chat([{"role": "user", "content": "hi"}]), ["yes", "no"]
    )
    assert json.loads(done.stdout)["scores"] == pytest.approx(chosen.scores, abs=1e-6)


def test_run_shows_logprobs_and_the_legend(folder):
    done = run(
        "run", folder, "--prompt", "hi", "--max-new-tokens", 2, "--logprobs", 3, "--show-exits"
    )
    rows = [line for line in done.stderr.splitlines() if " | " in line]
    assert len(rows) == 2
    assert all(len(re.findall(r"-\d+\.\d{3}", row)) == 4 for row in rows)
    assert "exit after layer: ■ 4 (all)" in done.stderr


def test_run_errors(folder):
    with pytest.raises(RequestError, match="top_p must be above 0"):
        run("run", folder, "--prompt", "x", "--top-p", 0)
    with pytest.raises(RequestError, match="certificates speak of greedy decoding"):
        run("run", folder, "--prompt", "x", "--level", 0.02, "--temperature", 1)


@pytest.mark.parametrize("command", ["run", "chat"])
def test_input_that_is_no_text_is_one_line(folder, command):
    prompt = {"run": ["--prompt", "-"], "chat": []}[command]
    for arguments, sent in (
        ([*prompt, "--max-new-tokens", "2"], b"hi\ncaf\xe9 is\n"),
        (["--prompt" if command == "run" else "--system", b"caf\xe9 is"], b"hi\n"),
    ):
        done = subprocess.run(
            [sys.executable, "-c", MAIN, command, str(folder), *arguments],
            input=sent, capture_output=True, check=False,
            env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"},
        )  # fmt: skip
        assert done.returncode == 2, done.stderr
        last = done.stderr.decode().splitlines()[-1]
        assert re.match("error: (standard input is no text|the text is no valid Unicode)", last)
        assert b"Traceback" not in done.stderr


def type_in(monkeypatch, lines):
    """At a terminal; exceptions among the lines are raised."""
    typed = iter(lines)

    def answer(prompt):
        said = next(typed)
        if isinstance(said, str):
            return said
        raise said

    monkeypatch.setattr("builtins.input", answer)
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True))


def test_a_line_that_is_no_text_is_asked_for_again(monkeypatch):
    invalid = UnicodeDecodeError("utf-8", b"\xe9", 0, 1, "invalid")
    type_in(monkeypatch, ["hi", invalid, EOFError])
    notes = []
    assert list(_lines(notes.append)) == ["hi"]
    assert notes[1].startswith("that was no text: 'utf-8' codec")


def test_text_that_was_held_back_has_its_own_colours(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    colours = ExitColours(SimpleNamespace(depth=4, exit_layers=(2, 3)))
    events = [
        StreamEvent("", 1, 2),
        StreamEvent("ab", 2, 4, spans=(Span("a", 2), Span("b", 4))),
        StreamEvent("c", result="result", spans=(Span("c", 3),)),
    ]
    out = io.StringIO()
    AnswerPrinter(colours, out).print(events)
    assert out.getvalue() == "\x1b[92ma\x1b[0mb\x1b[96mc\x1b[0m\n"


def test_tokens_are_coloured_by_exit_layer(monkeypatch):
    colours = ExitColours(SimpleNamespace(depth=4, exit_layers=(2, 3)))
    assert colours.legend().plain == "exit after layer: ■ 2  ■ 3  ■ 4 (all)"
    events = [
        StreamEvent("early", 1, 2),
        StreamEvent(" later", 2, 3),
        StreamEvent(" full", 3, 4),
        StreamEvent("", result="result"),
    ]
    for environment, expected in (
        ({}, "early later full\n"),
        ({"FORCE_COLOR": "1", "TERM": "xterm-256color"},
         "\x1b[92mearly\x1b[0m\x1b[96m later\x1b[0m full\n"),
        ({"FORCE_COLOR": "1", "TERM": "xterm-256color", "NO_COLOR": "1"}, "early later full\n"),
    ):  # fmt: skip
        for name in ("FORCE_COLOR", "TERM", "NO_COLOR", "COLORTERM"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        out = io.StringIO()
        assert AnswerPrinter(colours, out).print(events) == "result"
        assert out.getvalue() == expected


def test_control_characters_stay_off_the_terminal():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    for stream, expected in ((Terminal(), "a[2Jb\n\tc"), (io.StringIO(), "a\x1b[2Jb\n\tc")):
        AnswerPrinter(None, stream).write("a\x1b[2Jb\n\tc")
        assert stream.getvalue() == expected


def test_one_interrupt_ends_the_answer_and_two_the_program():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), cancel_on_interrupt() as cancel:
        os.kill(os.getpid(), signal.SIGINT)
        assert cancel()
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_chat_from_a_pipe(folder, engine):
    asked = "hi\n\n/stats\nmore\n/nonsense\n/reset\nhi\n/exit\nnever\n"
    done = run("chat", folder, "--system", "Be.", "--max-new-tokens", 6, "--json", stdin=asked)
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    talk = engine.conversation([{"role": "system", "content": "Be."}])
    expected = [talk.say(line, max_new_tokens=6).text for line in ("hi", "more")]
    assert [answer["text"] for answer in answers] == [*expected, expected[0]]
    assert answers[1]["statistics"]["reused_tokens"] > 0
    assert "answers: " in done.stderr  # /stats
    assert "/nonsense is no command: /reset forgets" in done.stderr
    plain = run("chat", folder, "--max-new-tokens", 3, "--show-exits", stdin="hi\n")
    assert plain.stdout.endswith("\n")
    assert "exit after layer" in plain.stderr


def test_chat_needs_a_template(tiny):
    with pytest.raises(ChatTemplateError, match="this engine has no chat template"):
        run("chat", tiny("llama").folder, stdin="hi\n")


def test_what_is_refused_ends_a_piped_chat(folder):
    done = subprocess.run(
        [sys.executable, "-c", MAIN, "chat", str(folder), "--max-new-tokens", "200"],
        input="hi\nhi\n", capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "do not fit this engine's maximum of 128" in done.stderr


class Terminal:
    """A program on a terminal of its own."""

    def __init__(self, *arguments, script=MAIN):
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            # As a shell in the foreground starts programs: one in the background ignores Ctrl-C.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            command = [sys.executable, "-c", script, *map(str, arguments)]
            os.execvpe(sys.executable, command, {**os.environ, "TERM": "xterm"})
        self.seen = ""

    def expect(self, pattern, seconds=60.0):
        """Reads until the pattern appears; what was read until then is forgotten."""
        end = time.monotonic() + seconds
        while not (match := re.search(pattern, self.seen)):
            assert time.monotonic() < end, self.seen
            if select.select([self.fd], [], [], 0.5)[0]:
                self.seen += os.read(self.fd, 4096).decode(errors="replace")
        self.seen = self.seen[match.end() :]
        return match[0]

    def send(self, text):
        os.write(self.fd, text.encode())

    def wait(self):
        _, status = os.waitpid(self.pid, 0)
        os.close(self.fd)
        return os.waitstatus_to_exitcode(status)


def test_ctrl_c_at_the_prompt_leaves_nothing(monkeypatch):
    type_in(monkeypatch, [" hi ", KeyboardInterrupt, "more", EOFError])
    notes = []
    assert list(_lines(notes.append)) == ["hi", "more"]
    assert notes[1:] == ["/exit or Ctrl-D leaves"]


def test_chat_on_a_terminal(folder):
    terminal = Terminal("chat", folder, "--max-new-tokens", 60, script=SLOW + MAIN)
    terminal.expect(r"> ")
    terminal.send("hello\r")
    terminal.expect(r"hello\r\n")
    time.sleep(0.4)
    terminal.send("\x03")
    cancelled = terminal.expect(r"(\d+) tokens in [^;]*, cancelled;")
    assert int(cancelled.split()[0]) < 60
    terminal.expect(r"> ")
    terminal.send("/stats\r")
    terminal.expect(r"answers: cancelled 1")
    terminal.expect(r"> ")
    terminal.send("/exit\r")
    assert terminal.wait() == 0


def test_run_on_a_terminal_can_be_interrupted(folder):
    terminal = Terminal(
        "run", folder, "--prompt", "hi", "--max-new-tokens", 100, script=SLOW + MAIN
    )
    terminal.expect(r"\S")  # the first piece, long before the last
    terminal.send("\x03")
    terminal.expect(r"tokens in [^;]*, cancelled;")
    assert terminal.wait() == 130
