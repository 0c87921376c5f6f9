"""The public face of the runtime: load a folder, generate, choose."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self, Unpack
from weakref import WeakSet

from .backends import Backend, load_backend
from .batch import BatchScheduler, ContinuousBatching
from .batch_request import BatchListener, check_batch, prepare_texts
from .certificate import device_class
from .choose import ChoiceOptions, Chosen, choose, join_label, listed_labels, longest_label
from .conversation import Conversation
from .decode_costs import DecodeCosts
from .decode_plan import DecodeForecast
from .engine_folder import load_manifest, verify_files
from .errors import DeadlineError, RequestError
from .exit_policy import ExitPolicy, NoExit
from .generation_options import CancelToken, GenerationKeywords, GenerationOptions
from .lifetime import Lifetime, closed
from .long_text import LongText
from .manifest import Manifest
from .mode_options import check_mode_options
from .mode_policies import Mode, PolicyFactory, Strictness, known_modes
from .planner import Planner
from .planning import Machine, ModeForecast, RecentExits, RequestShape, machine
from .profile import ProfiledBackend, StageClock, measuring
from .results import ChoiceResult, GenerationResult, StreamEvent
from .session import ExitProbe, Session, check_tokens
from .shadow import ShadowEntry, ShadowMonitor
from .statistics import EngineStatistics, StatisticsRecorder
from .text_request import finish, prepare
from .tokenizer import Tokenizer, load_tokenizer
from .values import require_count

__all__ = ["Engine"]

_IDLE_SESSIONS = 4


class Engine:
    """An engine folder, loaded. Immutable; may be shared by threads.

    `close` gives its memory up before Python would; `with Engine.load(…) as engine:` does so at the
    end of the block.

    Example:
        >>> engine = Engine.load("engines/")  # doctest: +SKIP
        >>> engine.generate("The sky is", max_new_tokens=8, mode="adaptive").text  # doctest: +SKIP
    """

    def __init__(
        self,
        manifest: Manifest,
        backend: Backend,
        tokenizer: Tokenizer,
        shadow: ShadowMonitor | None = None,
        clock: StageClock | None = None,
        device: str = "cpu",
        here: Machine | None = None,
        folder: Path | None = None,
    ) -> None:
        self._folder = folder
        self.lifetime = Lifetime()
        self._shadow = shadow
        self._device = device
        self._device_class = device_class(device)
        self.clock = clock
        self.recorder = StatisticsRecorder()
        self._manifest = manifest
        self._backend = backend if clock is None else ProfiledBackend(backend, clock)
        self._tokenizer = tokenizer
        self._policies = PolicyFactory(self._backend, manifest)
        self._planner = Planner(
            manifest,
            device_class=self._device_class,
            max_rows=self._backend.max_rows,
            here=here,
        )
        self._idle: list[Session] = []
        self._own: WeakSet[Session] = WeakSet()  # of callers
        self._lock = threading.Lock()

    @classmethod
    def load(
        cls,
        path: str | Path,
        device: str = "cpu",
        threads: int | None = None,
        *,
        low_memory: bool | None = None,
        shadow_every: int | None = None,
        profile: bool = False,
        verify: bool = False,
    ) -> Engine:
        """Loads an engine folder.

        Args:
            device: `cpu`, which runs every target, or `cuda`.
            threads: of the process's one ONNX Runtime pool; default: the cores it may use. The
                first engine of a process makes the pool. Another number for a later one has no
                effect, and a warning is logged: that takes another process.
            low_memory: whether int4 engines (and int8 engines whose caches are int8) hold their
                weights once, or a second time, for passes of many positions, in which some
                processors read prompts up to 1.4 times as fast. Default: twice where that takes at
                most a quarter of the memory that this process may use (the machine's, or its
                control group's limit), and always of engines that were exported with
                `--prefill int8`.
            shadow_every: also run every n-th adaptive request in full and compare: see `shadow`.
            profile: measure time by kind of stage: see `statistics`. Costs nothing where off.
            verify: also compare every file's sha256 with the manifest's (sizes always are).

        Raises:
            ManifestError: the folder is no engine folder, or was changed.
            DeviceError: the engines do not run on this device.
            StageError: a stage cannot be loaded.
            RequestError: `threads` is no whole number of at least 1.
        """
        folder = Path(path)
        manifest = load_manifest(folder)
        verify_files(folder, manifest, sha256=verify)
        return cls.of_manifest(
            folder,
            manifest,
            device=device,
            threads=threads,
            low_memory=low_memory,
            shadow_every=shadow_every,
            profile=profile,
        )

    @classmethod
    def of_manifest(
        cls,
        folder: Path,
        manifest: Manifest,
        *,
        device: str = "cpu",
        threads: int | None = None,
        low_memory: bool | None = None,
        shadow_every: int | None = None,
        profile: bool = False,
    ) -> Engine:
        """Loads stages under a manifest that is at hand (the compiler's, before it is written).

        Raises:
            DeviceError, StageError, RequestError: see `load`.
        """
        if threads is not None:
            require_count("threads", threads)
        backend = load_backend(
            folder, manifest, device=device, threads=threads, low_memory=low_memory
        )
        shadow = None if shadow_every is None else ShadowMonitor(shadow_every)
        clock = StageClock() if profile else None
        tokenizer, here = load_tokenizer(folder, manifest), machine(threads, device)
        return cls(manifest, backend, tokenizer, shadow, clock, device, here, folder)

    def __repr__(self) -> str:
        """Folder, model, and what it can do, on one line."""
        manifest = self._manifest
        exits = ", ".join(map(str, manifest.exit_layers)) or "none"
        state = ", closed" if self.lifetime.closed else ""
        return (
            f"<Engine {self._folder or 'without folder'}: {manifest.source.id}, "
            f"{manifest.model.num_layers} layers, {manifest.target} {manifest.precision} on "
            f"{self._device}, exits after layers: {exits}, modes: "
            f"{', '.join(known_modes(manifest))}{state}>"
        )

    def __enter__(self) -> Self:
        """The engine itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """See `close`."""
        self.close()

    def close(self) -> None:
        """Gives up stages, KV caches and device memory; again it does nothing.

        Later requests raise RequestError. One that runs, in another thread or as a stream between
        two tokens, is finished: memory is given up by the last of them, and this does not wait for
        it. (Close a stream that you leave.) Sessions of one's own and conversations end then too.
        Manifest, tokenizer and statistics stay readable.
        """
        self.lifetime.close(self._release)

    def _release(self) -> None:
        with self._lock:
            sessions = [*self._idle, *self._own]
            self._idle.clear()
            self._own.clear()
        for session in sessions:
            session.close("engine")
        backend, self._backend = self._backend, closed("engine")
        self._policies = PolicyFactory(self._backend, self._manifest)
        backend.close()

    @property
    def manifest(self) -> Manifest:
        """The folder's manifest."""
        return self._manifest

    @property
    def backend(self) -> Backend:
        """The loaded stages."""
        return self._backend

    @property
    def device(self) -> str:
        """What the stages run on, as `load` was told: `cpu` or `cuda`."""
        return self._device

    @property
    def device_class(self) -> str:
        """What its certificates and stage times must be of, such as `cpu-x86_64`, `gpu-sm87`."""
        return self._device_class

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises `TokenizerMissingError` when given text, where the folder has none."""
        return self._tokenizer

    @property
    def shadow(self) -> tuple[ShadowEntry, ...]:
        """Live agreement of adaptive answers with the full model's, where `shadow_every` is set.

        Of a text the first token is compared, of a choice the label.
        """
        return self._shadow.report() if self._shadow else ()

    @property
    def statistics(self) -> EngineStatistics:
        """What was done since the engine was loaded, also for texts that failed or were closed."""
        return self.recorder.snapshot()

    @property
    def recent(self) -> RecentExits:
        """Where requests of late left, which mode `auto` goes by."""
        return self._planner.recent

    def session(self) -> Session:
        """A sequence of one's own, for as long as the engine is open.

        Raises:
            RequestError: the engine is closed.
        """
        self.lifetime.check()
        with self.lifetime.work():
            session = Session(self._backend, self._manifest)
            with self._lock:
                self._own.add(session)
        return session

    def policy(
        self,
        mode: Mode,
        *,
        classifier: str | None = None,
        threshold: float | None = None,
        level: float | None = None,
        shape: RequestShape | None = None,
        text: LongText | None = None,
    ) -> ExitPolicy:
        """The exit policy of a mode.

        Args:
            classifier: kind of the exit graph, where the folder has several; default: its first.
            threshold: of the classifier's score, instead of the manifest's.
            level: a certified share of disagreement, such as 0.02, whose threshold is taken.
            shape: of the request, which mode `auto` decides by.
            text: what is wanted, where it is more than one token; default: one.

        Raises:
            ExitUnavailableError: the folder has no such exits, the level is not certified, or
                there is no plan for mode `auto`.
            RequestError: no such mode, both a threshold and a level, or an option that the mode
                does not take.
        """
        _check_taken(mode, threshold=threshold, classifier=classifier)
        strictness = Strictness(threshold, level, self._device_class, text)
        if mode == "auto":
            return self._planner.pick(self._policies, shape, strictness).policy
        return self._policies.of_mode(mode, strictness, classifier)

    def plan(
        self,
        shape: RequestShape,
        *,
        threshold: float | None = None,
        level: float | None = None,
        text: LongText | None = None,
    ) -> ModeForecast:
        """What mode `auto` takes for a request; arguments as for `policy`.

        Raises:
            ExitUnavailableError: there is no plan.
        """
        return self._planner.pick(
            self._policies, shape, Strictness(threshold, level, self._device_class, text)
        )

    def choice_policy(
        self,
        mode: Mode,
        *,
        classifier: str | None = None,
        threshold: float | None = None,
        level: float | None = None,
        shape: RequestShape | None = None,
        longest_label: int = 1,
    ) -> ExitPolicy:
        """`policy` for choices among labels: the exit graph that was calibrated for them.

        A folder whose calibration data had no labels has none; `policy` is taken then, and no level
        is certified.

        Args:
            longest_label: its tokens; levels are certified for labels of one.
        """
        _check_taken(mode, threshold=threshold, classifier=classifier)
        strictness = Strictness(threshold, level, self._device_class, longest_label=longest_label)
        if mode == "auto":
            return self._planner.pick(self._policies, shape, strictness).policy
        return self._policies.of_choice(mode, strictness, classifier)

    def forecasts(
        self, shape: RequestShape, *, level: float | None = None
    ) -> tuple[ModeForecast, ...]:
        """What each mode is expected to take for such a request, `off` first.

        Raises:
            ExitUnavailableError: the folder has no plan, or one of another class of device.
        """
        text = LongText(shape.new_tokens, shape.kv_policy) if shape.new_tokens > 1 else None
        label = 1 if shape.candidates else None
        return self._planner.forecasts(
            self._policies, shape, Strictness(None, level, self._device_class, text, label)
        )

    def decode_costs(self, probe: ExitProbe = "full") -> DecodeCosts:
        """What drafts and looks at exit points cost here, with the probe they use."""
        return self._planner.decode_costs(probe)

    def decode_forecasts(self, *, level: float | None = None) -> tuple[DecodeForecast, ...]:
        """What exits and drafts are expected to gain in decode, by mode, exit point and probe.

        A level leaves mode `adaptive` out, as mode `auto` does: it is certified for texts that look
        at every exit point, whatever that costs.
        """
        return self._planner.decode_forecasts(self._policies, level=level)

    def generate(
        self, prompt: str | Sequence[int], **options: Unpack[GenerationKeywords]
    ) -> GenerationResult:
        """Continues a prompt.

        Args:
            prompt: text, or token ids.
            **options: the fields of `GenerationOptions` and `SamplingOptions`, by name: how far,
                under which mode, how tokens are drawn (greedily, unless `temperature` is given),
                what ends the text.

        Raises:
            RequestError: the request cannot be served; the engine stays usable.
            DeadlineError: the timeout passed, from this call on.
        """
        return finish(self.stream(prompt, **options))

    def stream(
        self, prompt: str | Sequence[int], **options: Unpack[GenerationKeywords]
    ) -> Generator[StreamEvent, None, None]:
        """The same, token by token. The request is checked now, and worked on as events are asked
        for; closing the generator ends it.

        Yields:
            an event per token, and a last one with the result.
        """
        arrived = time.perf_counter()
        tokens = self._tokens(prompt)
        request = prepare(self, tokens, GenerationOptions.of(options), arrived=arrived)
        return request.run_on_borrowed()

    def generate_batch(
        self,
        prompts: Sequence[str | Sequence[int]],
        *,
        scheduler: BatchScheduler = ContinuousBatching(),  # noqa: B008 - it is immutable
        on_result: Callable[[int, GenerationResult], None] | None = None,
        on_error: Callable[[int, RequestError | DeadlineError], None] | None = None,
        **options: Unpack[GenerationKeywords],
    ) -> list[GenerationResult]:
        """`generate` for several prompts that advance together.

        Args:
            scheduler: default: passes carry a position of each text, at most 8 at once. Seconds in
                results are a text's share of them.
            on_result: told of each text as it ends, with its place among the prompts.
            on_error: told of each text that fails, with its place; the others go on then, and
                results are of those alone. Default: the first failure is raised.
            **options: as for `generate`; a timeout is of each text, from its own start, which
                comes after all prompts were tokenised.

        Raises:
            RequestError, DeadlineError: of the first text that fails, unless `on_error` is told;
                the others are given up.
        """
        arrived = time.perf_counter()
        check_batch(prompts, scheduler)
        self.lifetime.check()
        listener = BatchListener(on_result, on_error)
        texts = prepare_texts(self, prompts, GenerationOptions.of(options), listener, arrived)
        with self.lifetime.work():
            results = scheduler.run(texts, self)
        return [result for result in results if result is not None]

    def chat(
        self, messages: Sequence[Mapping[str, Any]], **options: Unpack[GenerationKeywords]
    ) -> GenerationResult:
        """The assistant's answer to a chat, by the folder's chat template.

        To stream it, or to give the template values of its own: `stream(tokenizer.encode_chat(…))`.

        Args:
            messages: each with `role` (`system`, `user`, `assistant`) and `content`.
            **options: as for `generate`.

        Raises:
            ChatTemplateError: the folder has no chat template, or it refuses these messages.
            RequestError, DeadlineError: see `generate`.
        """
        arrived = time.perf_counter()
        tokens = self._tokenizer.encode_chat(messages)
        request = prepare(self, tokens, GenerationOptions.of(options), arrived=arrived)
        return finish(request.run_on_borrowed())

    def conversation(self, messages: Sequence[Mapping[str, Any]] = ()) -> Conversation:
        """A chat over one KV cache: each turn computes only what is new.

        Args:
            messages: what it begins with, such as a system message.

        Raises:
            ChatTemplateError: the folder has no chat template.
        """
        return Conversation(self, messages)

    def choose(
        self,
        prompt: str | Sequence[int],
        labels: Sequence[str],
        *,
        mode: Mode = "off",
        threshold: float | None = None,
        level: float | None = None,
        timeout: float | None = None,
        cancel: CancelToken | None = None,
    ) -> ChoiceResult:
        """The label that most likely follows the prompt (labels of several tokens too).

        A label that would touch the prompt's last word is joined with a space (`join_label`).

        Args:
            threshold, level: see `policy`; a threshold is for modes `adaptive`, `context`, `auto`.
                Levels are certified in mode `adaptive`, of an engine that was calibrated on prompts
                with labels, for labels of one token. (`auto` runs every layer for others.)
            timeout: seconds after which `DeadlineError` is raised, within the prompt too.
            cancel: raises `RequestCancelledError` when it is cancelled: of a choice there is no
                part that could be returned.

        Raises:
            RequestError: fewer than two labels, empty or equal ones; the engine stays usable.
            ExitUnavailableError: the mode's exits are not there, or the level is not certified.
            DeadlineError: the timeout passed.
            RequestCancelledError: it was cancelled.
        """
        check = ChoiceOptions(mode, threshold, level, timeout, cancel).interruption()
        self.lifetime.check()
        names = listed_labels(labels)
        shape = RequestShape(len(self._tokens(prompt)), candidates=True)
        # Only levels depend on it.
        longest = 1 if level is None else longest_label(self.label_tokens(prompt, names))
        policy = self.choice_policy(
            mode, threshold=threshold, level=level, shape=shape, longest_label=longest
        )
        with self.lifetime.work():
            return self._choose(prompt, names, policy, check)

    def _choose(
        self,
        prompt: str | Sequence[int],
        names: Sequence[str],
        policy: ExitPolicy,
        check: Callable[[], None],
    ) -> ChoiceResult:
        stage_seconds: dict[str, float] = {}
        with measuring(self.clock, stage_seconds):
            done = self.choose_with(prompt, names, policy, check)
        if self._compares(policy):
            full = self.choose_with(prompt, names, NoExit())
            self._record(policy, agrees=done.index == full.index)
        self.recorder.choice(done.exit_layer, done.seconds, done.count, stage_seconds)
        return ChoiceResult(
            names[done.index],
            done.index,
            done.scores,
            done.exit_layer,
            self._manifest.model.num_layers,
            done.count.layers_saved,
            done.count.compute_saved,
            done.seconds,
        )

    def choose_with(
        self,
        prompt: str | Sequence[int],
        labels: Sequence[str],
        policy: ExitPolicy,
        check: Callable[[], None] = lambda: None,
    ) -> Chosen:
        """`choose` under any exit policy, with the position-layers that were counted.

        Args:
            check: called before every pass of a stage; what it raises ends the choice.
        """
        tokens = self.label_tokens(prompt, labels)
        with self.borrow() as session, session.interruptible(check):
            limit = self._manifest.max_seq_len
            done = choose(session, self._tokens(prompt), tokens, policy, limit)
        self.recent.record(policy, done.exit_layer)
        return done

    def label_tokens(
        self, prompt: str | Sequence[int], labels: Sequence[str]
    ) -> list[Sequence[int]]:
        """The labels' tokens as they continue the prompt (see `join_label`)."""
        text = prompt if isinstance(prompt, str) else ""
        joined = [join_label(text, label) for label in listed_labels(labels)]
        return [self._tokenizer.encode_continuation(label) for label in joined]

    def compare(self, policy: ExitPolicy, prompt: Sequence[int], first: int) -> None:
        """Where it is its turn, runs a prompt in full and notes whether the first token agrees."""
        if not self._compares(policy):
            return
        with self.borrow() as session:
            session.extend(prompt)
            full = session.predict(NoExit()).result.token
        eos = self._manifest.model.eos_token_ids
        # The end of a text is one answer, whichever token says it.
        self._record(policy, agrees=first == full or (first in eos and full in eos))

    def _compares(self, policy: ExitPolicy) -> bool:
        return bool(policy.checks) and self._shadow is not None and self._shadow.due()

    def _record(self, policy: ExitPolicy, *, agrees: bool) -> None:
        if self._shadow is not None:
            self._shadow.record(policy.promised, agrees=agrees)

    def _tokens(self, prompt: str | Sequence[int]) -> Sequence[int]:
        """Raises RequestError for what is neither text nor a list of token ids, or is empty."""
        ids = self._tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        return check_tokens(ids, self._manifest.model.vocab_size).tolist()  # type: ignore[no-any-return]

    @contextmanager
    def borrow(self) -> Iterator[Session]:
        """An empty session; bindings and KV memory are reused from request to request."""
        with self.lifetime.work():
            with self._lock:
                session = self._idle.pop() if self._idle else None
            session = session or Session(self._backend, self._manifest)
            session.truncate(0)
            yield session
            # Not reached when the request failed: a session in an unknown state is dropped.
            with self._lock:
                if len(self._idle) < _IDLE_SESSIONS:
                    self._idle.append(session)


def _check_taken(mode: Mode, **options: object) -> None:
    """Raises RequestError for an option that was given and that the mode does not take."""
    check_mode_options(mode, (name for name, value in options.items() if value is not None))
