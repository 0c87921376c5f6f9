"""Chat templates as transformers renders them, and conversations over one KV cache."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adainfer_export import ExportRequest, export
from adainfer_runtime import CancelToken, Engine
from adainfer_runtime.chat_template import ChatTemplate, load_chat_template
from adainfer_runtime.errors import ChatTemplateError, DeadlineError, ManifestError, RequestError
from adainfer_runtime.manifest import TokenizerSpec
from adainfer_runtime.tokenizer import Tokenizer

from ..checkpoints import make_checkpoint

CHATML = (
    "{% for message in messages %}{{ '<' + message['role'] + '>' + message['content'] }}"
    "{% endfor %}\n{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
# What templates on the hub make use of, in one.
RICH = """{{ bos_token }}{%- set ns = namespace(n=0) -%}
{%- if messages[0].role == 'system' %}
    [{{ messages[0].content | trim }}]
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'system' %}{% continue %}{% endif %}
    {%- if loop.index0 > 6 %}{% break %}{% endif %}
    {%- set ns.n = ns.n + 1 %}
    {% if message.role not in ['user', 'assistant'] %}
        {{ raise_exception('role ' + message.role + ' is unknown') }}
    {% endif %}
  {{ ns.n }}:{{ message.role | upper }}{% generation %}{{ message.content }}{% endgeneration %}

{%- endfor %}
{{ messages[-1] | tojson }} {{ tools | tojson(indent=2) if tools else 'no tools' }}
{{ strftime_now('%Y') | length }}{{ eos_token }}{{ missing is defined }}
{%- if add_generation_prompt %}{{ '<assistant>' }}{% endif %}
"""
MESSAGES = [
    {"role": "system", "content": " Be <brief> & 'kind'. "},
    {"role": "user", "content": 'Où? "naïve" 日本\n'},
    {"role": "assistant", "content": "There."},
    {"role": "user", "content": ""},
]


def theirs(template, messages, **options):
    from transformers import PreTrainedTokenizerFast

    from .test_detokenise import BYTE_LEVEL

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=BYTE_LEVEL._inner, bos_token="<s>", eos_token="</s>"
    )
    tokenizer.chat_template = template
    return tokenizer.apply_chat_template(messages, tokenize=False, **options)


@pytest.mark.parametrize("template", [CHATML, RICH])
@pytest.mark.parametrize("prompted", [True, False])
@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("tools", [None, [{"name": "f", "parameters": {"x": "<int>"}}]])
def test_rendered_as_by_transformers(template, prompted, count, tools):
    mine = ChatTemplate(template, {"bos_token": "<s>", "eos_token": "</s>"}).render(
        MESSAGES[:count], add_generation_prompt=prompted, values={"tools": tools}
    )
    assert mine == theirs(template, MESSAGES[:count], add_generation_prompt=prompted, tools=tools)


def test_what_is_no_chat():
    template = ChatTemplate(RICH, {})
    with pytest.raises(ChatTemplateError, match="refuses these messages: role tool is unknown"):
        template.render([{"role": "tool", "content": "x"}])
    for wrong in ([], "hello", [3]):
        with pytest.raises(ChatTemplateError):
            template.render(wrong)
    with pytest.raises(ChatTemplateError, match="messages must be plain data"):
        template.render([{"role": "user", "content": object()}])
    with pytest.raises(ChatTemplateError, match="refuses these messages") as caught:
        ChatTemplate(CHATML, {}).render([{"role": "user", "content": None}])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{% for i in range(10**9) %}x{% endfor %}",
    ],
)
def test_templates_run_in_a_sandbox(source):
    with pytest.raises(ChatTemplateError, match="refuses these messages"):
        ChatTemplate(source, {}).render([{"role": "user", "content": "x"}])


def test_missing_and_malformed_templates(tiny):
    engine = tiny("llama").engine
    with pytest.raises(ChatTemplateError, match="this engine has no chat template: give the"):
        engine.chat([{"role": "user", "content": "x"}])
    with pytest.raises(ChatTemplateError, match="this engine has no chat template"):
        engine.conversation()
    with pytest.raises(ChatTemplateError, match=r"the chat template is malformed: .*endfor"):
        ChatTemplate("{% for x in messages %}", {}).require()


def write(folder, **files):
    folder.mkdir(exist_ok=True)
    names = {"config": "tokenizer_config.json", "map": "special_tokens_map.json",
             "jinja": "chat_template.jinja"}  # fmt: skip
    for key, text in files.items():
        (folder / names[key]).write_text(text if isinstance(text, str) else json.dumps(text))
    return TokenizerSpec(
        file="tokenizer.json", files=tuple(sorted(path.name for path in folder.iterdir()))
    )


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"config": {"chat_template": "A{{ bos_token }}", "bos_token": "<b>"}}, "A<b>"),
        ({"config": {"chat_template": "A"}, "jinja": "B"}, "B"),
        (
            {"config": {"chat_template": [{"name": "tool_use", "template": "T"},
                                          {"name": "default", "template": "D"}]}},
            "D",
        ),
        ({"map": {"eos_token": {"content": "<e>"}}, "jinja": "{{ eos_token }}"}, "<e>"),
    ],
)  # fmt: skip
def test_where_templates_stand(tiny, tmp_path, files, expected):
    spec = write(tmp_path / "folder", **files)
    manifest = tiny("llama").engine.manifest.model_copy(update={"tokenizer": spec})
    template = load_chat_template(tmp_path / "folder", manifest)
    assert template.render([{"role": "user", "content": "x"}]) == expected


@pytest.mark.parametrize(
    "entry",
    [{"name": "tool_use"}, {"template": "T"}, {"name": 3, "template": "T"}, {"name": "x"}, "T"],
)
def test_several_templates_need_names_and_texts(tiny, tmp_path, entry):
    entries = [{"name": "default", "template": "D"}, entry]
    spec = write(tmp_path / "folder", config={"chat_template": entries})
    manifest = tiny("llama").engine.manifest.model_copy(update={"tokenizer": spec})
    match = "entry 2 of the tokenizer's chat_template must have a name and a template"
    with pytest.raises(ManifestError, match=match):
        load_chat_template(tmp_path / "folder", manifest)
    spec = write(tmp_path / "folder", jinja="B")  # it is this that counts
    manifest = manifest.model_copy(update={"tokenizer": spec})
    template = load_chat_template(tmp_path / "folder", manifest)
    assert template.render([{"role": "user", "content": "x"}]) == "B"


def test_damaged_tokenizer_config(tiny, tmp_path):
    spec = write(tmp_path / "folder", config="{")
    manifest = tiny("llama").engine.manifest.model_copy(update={"tokenizer": spec})
    with pytest.raises(ManifestError, match=r"tokenizer_config\.json is no JSON"):
        load_chat_template(tmp_path / "folder", manifest)


def test_an_export_keeps_the_template(tmp_path):
    make_checkpoint(tmp_path / "checkpoint")
    settings = {"chat_template": CHATML, "bos_token": "<s>", "eos_token": "</s>"}
    (tmp_path / "checkpoint" / "tokenizer_config.json").write_text(json.dumps(settings))
    export(ExportRequest(str(tmp_path / "checkpoint"), tmp_path / "engines", precision="fp32"))
    engine = Engine.load(tmp_path / "engines")
    messages = [{"role": "user", "content": "hi"}]
    prompt = theirs(CHATML, messages, add_generation_prompt=True)
    assert engine.tokenizer.encode_chat(messages) == engine.tokenizer.encode(prompt)
    answer = engine.chat(messages, max_new_tokens=4, ignore_eos=True)
    assert answer.tokens == engine.generate(prompt, max_new_tokens=4, ignore_eos=True).tokens


@pytest.fixture
def engine(tiny):
    """The tiny model with a template."""
    made = tiny("llama").engine
    tokenizer = Tokenizer(made.tokenizer._inner, ChatTemplate(CHATML, {}))
    return Engine(made.manifest, made.backend, tokenizer)


def test_a_conversation_computes_only_what_is_new(engine):
    talk = engine.conversation([{"role": "system", "content": "ab"}])
    for turn, asked in enumerate(["x", "why", "z"]):
        history = [*talk.messages, {"role": "user", "content": asked}]
        expected = engine.chat(history, max_new_tokens=5, ignore_eos=True)
        result = talk.say(asked, max_new_tokens=5, ignore_eos=True)
        assert (result.tokens, result.text) == (expected.tokens, expected.text)
        assert talk.messages == (*history, {"role": "assistant", "content": result.text})
        found = result.statistics
        assert found.prompt_tokens == expected.statistics.prompt_tokens
        executed = 4 * (found.prompt_tokens - found.reused_tokens + 4)
        assert found.layers_executed == executed
        assert (found.reused_tokens > 0) == (turn > 0)
    assert engine.statistics.reused_tokens > 0
    talk.reset()
    assert talk.messages == ({"role": "system", "content": "ab"},)
    again = talk.say("x", max_new_tokens=5, ignore_eos=True)
    assert again.statistics.reused_tokens == again.statistics.prompt_tokens - 1


@settings(max_examples=15, deadline=None)
@given(
    turns=st.lists(
        st.tuples(
            st.text("abc ", max_size=6), st.integers(1, 5), st.sampled_from([None, "a", "<"])
        ),
        min_size=1,
        max_size=3,
    ),
    seed=st.integers(0, 99),
)
def test_conversations_answer_as_if_nothing_had_been_kept(tiny, turns, seed):
    made = tiny("llama").engine
    tokenizer = Tokenizer(made.tokenizer._inner, ChatTemplate(CHATML, {}))
    engine = Engine(made.manifest, made.backend, tokenizer)
    talk = engine.conversation()
    for asked, count, stop in turns:
        options = {"max_new_tokens": count, "temperature": 0.8, "seed": seed}
        if stop:
            options["stop"] = stop
        history = [*talk.messages, {"role": "user", "content": asked}]
        expected = engine.chat(history, **options)
        result = talk.say(asked, **options)
        assert (result.tokens, result.text) == (expected.tokens, expected.text)
        assert result.finish_reason == expected.finish_reason


def test_turns_of_an_engine_that_is_closed(tiny):
    """The running one is finished, or fails by its own error; there is none after it."""

    class Breaking(CancelToken):
        def __call__(self):
            if super().__call__():
                raise ZeroDivisionError
            return False

    made = tiny("llama")
    options = {"max_new_tokens": 5, "ignore_eos": True}
    for breaks in (False, True):
        cancel = Breaking()
        loaded = Engine.load(made.folder)
        tokenizer = Tokenizer(loaded.tokenizer._inner, ChatTemplate(CHATML, {}))
        engine = Engine(loaded.manifest, loaded.backend, tokenizer)
        talk = engine.conversation()
        events = talk.stream("x", **options, cancel=cancel)
        next(events)
        engine.close()
        if not breaks:
            *_, last = events
            assert len(last.result.tokens) == 5
            assert talk.messages[-1]["content"] == last.result.text
        else:
            cancel.cancel()
            with pytest.raises(ZeroDivisionError):
                list(events)
        with pytest.raises(RequestError, match="this engine is closed"):
            talk.say("y", **options)


def test_what_goes_wrong_in_a_turn_leaves_the_history(engine):
    talk = engine.conversation()
    talk.say("x", max_new_tokens=3, ignore_eos=True)
    before = talk.messages
    events = talk.stream("closed", max_new_tokens=9, ignore_eos=True)
    next(events)
    with pytest.raises(DeadlineError):  # closes the stream that was left, and fails itself
        talk.say("late", max_new_tokens=9, ignore_eos=True, timeout=0.0)
    assert list(events) == []
    with pytest.raises(RequestError):
        talk.say("bad", temperature=-1)
    assert talk.messages == before
    assert engine.statistics.texts == {"length": 1, "closed": 1, "failed": 1}
    history = [*before, {"role": "user", "content": "y"}]
    expected = engine.chat(history, max_new_tokens=4, ignore_eos=True)
    assert talk.say("y", max_new_tokens=4, ignore_eos=True).tokens == expected.tokens


def test_a_cancelled_answer_stays_as_far_as_it_came(engine):
    talk, cancel = engine.conversation(), CancelToken()
    events = talk.stream("x", max_new_tokens=20, ignore_eos=True, cancel=cancel)
    heard = next(events).text + next(events).text
    cancel.cancel()
    *_, last = events
    assert last.result.finish_reason == "cancelled"
    assert (heard + last.text) == last.result.text == talk.messages[-1]["content"]


def test_what_was_cancelled_before_its_answer_was_not_said(engine):
    talk, cancel = engine.conversation(), CancelToken()
    cancel.cancel()
    assert talk.say("x", cancel=cancel).finish_reason == "cancelled"
    assert talk.messages == ()


def test_the_cache_of_a_conversation_is_that_of_its_tokens(engine):
    talk = engine.conversation()
    for asked in ("one", "two"):
        talk.say(asked, max_new_tokens=4, ignore_eos=True)
    session = talk._session
    fresh = engine.session()
    fresh.extend(session.tokens)
    fresh.complete()
    session.complete()
    for layer in range(1, 5):
        for mine, full in zip(session.kv(layer), fresh.kv(layer), strict=True):
            np.testing.assert_allclose(mine, full, atol=1e-5)
