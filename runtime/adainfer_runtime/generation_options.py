"""Everything that a request for text can ask for, checked before any work."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from .decode_options import DEFAULT_OPTIONS, DecodeOptions
from .errors import RequestError
from .long_text import LongText
from .mode_options import check_mode_options
from .mode_policies import Mode
from .sampling import MinimumLength
from .sampling_options import SamplingKeywords, SamplingOptions
from .stop_strings import StopStrings
from .values import require_count, require_number, require_whole, suggestion

__all__ = [
    "CancelToken",
    "GenerationKeywords",
    "GenerationOptions",
    "require_cancel",
    "require_timeout",
]

_MAX_LOGPROBS = 100
_GREEDY = SamplingOptions()
_SAMPLING = frozenset(field.name for field in fields(SamplingOptions))


def _never() -> bool:
    return False


class CancelToken:
    """Ends a text from another thread or a signal handler, at the next token."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def cancel(self) -> None:
        """For good: a token serves one request (or several that end together)."""
        self._event.set()

    def __call__(self) -> bool:
        """Whether it was cancelled."""
        return self._event.is_set()


def require_timeout(value: float) -> None:
    """Raises RequestError for what is no time to wait."""
    require_number("timeout", value)
    if not value >= 0:
        raise RequestError(f"timeout must be 0 or more seconds, found {value}")


def require_cancel(value: object) -> None:
    """Raises RequestError for what cannot say whether it was cancelled."""
    if not callable(value):
        raise RequestError(f"cancel must be a CancelToken, found {value!r}")


class GenerationKeywords(SamplingKeywords, total=False):
    """Keyword arguments of `Engine.generate`, `stream`, `chat` and `Conversation`: the fields of
    `GenerationOptions`, and those of `SamplingOptions` in place of `sampling`.
    """

    max_new_tokens: int
    min_new_tokens: int
    mode: Mode
    threshold: float | None
    level: float | None
    ignore_eos: bool
    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    logprobs: int | None
    timeout: float | None
    cancel: CancelToken | None
    decoding: DecodeOptions


@dataclass(frozen=True)
class GenerationOptions:
    """A request, apart from its prompt.

    Attributes:
        max_new_tokens: at least 1.
        min_new_tokens: before them, no end-of-text or stop token is taken.
        mode: `off` runs every layer; `adaptive` stops where the exit graph says so; `context`
            lets the prompt's positions stop and runs the last one through every layer; `combined`
            looks for the one and the other; `auto` takes what is expected to be fastest here, for
            a prompt of this length and so many new tokens; `verified` drafts tokens at an exit
            point and confirms them: `off`'s own text, or distribution.
        threshold, level: see `Engine.policy`. A threshold is for modes `adaptive`, `context` and
            `auto`. A level is certified for greedy decoding alone; where a certificate of texts is
            needed (see `threshold_at_level`), it is the share of differing tokens.
        ignore_eos: go on after an end-of-text token (for benchmarks).
        stop: strings that end the text, which is returned without them. They are looked for in
            the new text, not in the prompt. None: no such strings. (Kept as a tuple, as are
            `stop_token_ids`: what is given may be good for one pass only, or change later.)
        stop_token_ids: tokens that end the text beside the model's own.
        logprobs: this many alternatives per token, with log-probabilities; 0 gives the token's
            own alone, None none.
        timeout: seconds from the request's arrival after which `DeadlineError` is raised.
        cancel: ends the text when it is cancelled; what there is, is returned.
        decoding: how the mode decodes, where its defaults are not wanted.

    Raises:
        RequestError: a value of the wrong kind or outside its range, an option that the mode does
            not take, or a level with anything but greedy decoding.
    """

    max_new_tokens: int = 64
    min_new_tokens: int = 0
    mode: Mode = "off"
    threshold: float | None = None
    level: float | None = None
    ignore_eos: bool = False
    stop: str | Sequence[str] | None = ()
    stop_token_ids: Sequence[int] | None = ()
    logprobs: int | None = None
    timeout: float | None = None
    cancel: CancelToken | None = None
    sampling: SamplingOptions = _GREEDY
    decoding: DecodeOptions = DEFAULT_OPTIONS

    @classmethod
    def of(cls, keywords: GenerationKeywords) -> GenerationOptions:
        """From keyword arguments.

        Raises:
            RequestError: an unknown one, or see the class.
        """
        given: dict[str, Any] = dict(keywords)
        known = GenerationKeywords.__annotations__.keys()
        for name in sorted(given.keys() - known):
            raise RequestError(f"{name} is no option of a request: {suggestion(name, known)}")
        sampling = {name: given.pop(name) for name in _SAMPLING & given.keys()}
        return cls(**given, sampling=SamplingOptions(**sampling))

    def __post_init__(self) -> None:
        for name in ("stop", "stop_token_ids"):
            object.__setattr__(self, name, _listed(name, getattr(self, name)))
        self._check_kinds()
        self._check_ranges()
        self._check_certified()
        threshold = () if self.threshold is None else ("threshold",)
        check_mode_options(self.mode, (*threshold, *self.decoding.changed))

    def _check_kinds(self) -> None:
        for name in ("max_new_tokens", "min_new_tokens", "logprobs"):
            value = getattr(self, name)
            if value is not None or name != "logprobs":
                require_whole(name, value)
        if self.timeout is not None:
            require_timeout(self.timeout)
        if self.cancel is not None:
            require_cancel(self.cancel)
        if not isinstance(self.decoding, DecodeOptions):
            raise RequestError(f"decoding must be DecodeOptions, found {self.decoding!r}")
        for text in self.stop_strings:
            if not isinstance(text, str):
                raise RequestError(f"stop must be text, or a list of texts, found {text!r} in it")
        for token in self.stop_ids:
            require_whole("a token id of stop_token_ids", token)

    def _check_ranges(self) -> None:
        StopStrings(self.stop_strings)  # refuses what cannot be one
        require_count("max_new_tokens", self.max_new_tokens)
        if not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise RequestError(
                f"min_new_tokens must be between 0 and max_new_tokens ({self.max_new_tokens}), "
                f"found {self.min_new_tokens}"
            )
        if self.logprobs is not None and not 0 <= self.logprobs <= _MAX_LOGPROBS:
            raise RequestError(
                f"logprobs must be between 0 and {_MAX_LOGPROBS} alternatives, "
                f"found {self.logprobs}"
            )

    def _check_certified(self) -> None:
        if self.level is not None and not self.greedy:
            raise RequestError(
                f"level {self.level}: certificates speak of greedy decoding of the model's own "
                "logits; leave temperature, penalties, logit_bias and min_new_tokens out, or give "
                "a threshold instead"
            )
        changed = self.decoding.confidence is not None or self.decoding.probe == "shortlist"
        if self.level is not None and changed:
            raise RequestError(
                f"level {self.level}: certificates speak of exits as they were calibrated; leave "
                "confidence decay and the shortlist out, or give a threshold instead"
            )

    @property
    def greedy(self) -> bool:
        """Whether each token is the largest of the model's own logits."""
        return self.sampling.greedy and not self.sampling.changes_logits and not self.min_new_tokens

    @property
    def long_text(self) -> LongText | None:
        """The text that is asked for, where it is more than one token."""
        if self.max_new_tokens == 1:
            return None
        own_end = not (self.ignore_eos or self.stop_strings or self.stop_ids)
        return LongText(self.max_new_tokens, self.decoding.kv_policy, own_end)

    @property
    def decoding_as_certified(self) -> DecodeOptions:
        """At a level every token looks at each exit point, as those did that certified it."""
        return self.decoding if self.level is None else replace(self.decoding, exit_looks="always")

    @property
    def cancelled(self) -> Callable[[], bool]:
        """Whether to end now."""
        return self.cancel or _never

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop`, which is a tuple by now."""
        return tuple(self.stop or ())

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """`stop_token_ids`, which is a tuple by now."""
        return tuple(self.stop_token_ids or ())

    def ends(self, eos_token_ids: Sequence[int]) -> tuple[frozenset[int], frozenset[int]]:
        """Tokens that end the text: the model's, unless they are ignored, and the request's."""
        eos = frozenset() if self.ignore_eos else frozenset(eos_token_ids)
        return eos, frozenset(self.stop_ids)

    def minimum(self, eos_token_ids: Sequence[int]) -> MinimumLength:
        """What the sampler must forbid, and for how long."""
        eos, stop = self.ends(eos_token_ids)
        return MinimumLength(self.min_new_tokens, eos | stop)


def _listed(name: str, value: object) -> tuple[Any, ...]:
    """What was given as a tuple, one text as a tuple of it.

    Raises:
        RequestError: no list.
    """
    if value is None:
        return ()
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, Iterable) or isinstance(value, Mapping):
        raise RequestError(f"{name} must be a list, found {value!r}")
    return tuple(value)
