"""The public face of the runtime: load a folder, generate, choose."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .backends import Backend, load_backend
from .certificate import certified_threshold
from .choose import Chosen, choose, join_label
from .decoding import PolicyDecoder
from .engine_folder import load_manifest, verify_files
from .errors import ExitUnavailableError, RequestError
from .exit_policy import ClassifierExit, ExitPolicy, NoExit
from .generate import Generated, GenerateRequest, generate
from .manifest import ExitSpec, Manifest
from .sampling import Greedy
from .session import Session
from .shadow import ShadowEntry, ShadowMonitor
from .tokenizer import Tokenizer, load_tokenizer

__all__ = ["ChoiceResult", "Engine", "GenerationResult", "Mode"]

Mode = Literal["off", "adaptive", "context"]
_IDLE_SESSIONS = 4


@dataclass(frozen=True)
class GenerationResult:
    """Generated text, and what it cost.

    Attributes:
        text: empty where the engine has no tokenizer.
        exit_layers: layers executed for each token, 1 … `layers_total`.
        layers_saved: 1 − position-layers executed / dense, prompt and decode together, as
            counted by the runtime; `prompt_layers_saved` and `decode_layers_saved` apart.
        compute_saved: 1 − multiply-adds executed / dense, adapters and probes included.
        finish_reason: `eos`, or `length`.
    """

    text: str
    tokens: tuple[int, ...]
    exit_layers: tuple[int, ...]
    layers_total: int
    layers_saved: float
    prompt_layers_saved: float
    decode_layers_saved: float
    compute_saved: float
    seconds: float
    finish_reason: Literal["eos", "length"]


@dataclass(frozen=True)
class ChoiceResult:
    """The chosen label; `scores` are the labels' log-probabilities among the labels."""

    label: str
    index: int
    scores: tuple[float, ...]
    exit_layer: int
    layers_total: int
    layers_saved: float
    compute_saved: float
    seconds: float


class Engine:
    """An engine folder, loaded. Immutable; may be shared by threads.

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
    ) -> None:
        self._shadow = shadow
        self._manifest = manifest
        self._backend = backend
        self._tokenizer = tokenizer
        self._idle: list[Session] = []
        self._lock = threading.Lock()

    @classmethod
    def load(
        cls,
        path: str | Path,
        device: str = "cpu",
        threads: int | None = None,
        *,
        low_memory: bool = False,
        shadow_every: int | None = None,
        verify: bool = False,
    ) -> Engine:
        """Loads an engine folder.

        Args:
            device: `cpu`, which runs every target, or `cuda`.
            threads: of the process's one ONNX Runtime pool; default: the cores it may use.
            low_memory: hold the weights once. Otherwise int4 engines hold them a second time, laid
                out for passes of many positions: prompts are then read 1.4 times as fast.
            shadow_every: also run every n-th adaptive request in full and compare: see `shadow`.
            verify: also compare every file's sha256 with the manifest's (sizes always are).

        Raises:
            ManifestError: the folder is no engine folder, or was changed.
            DeviceError: the engines do not run on this device.
            StageError: a stage cannot be loaded.
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
        )

    @classmethod
    def of_manifest(
        cls,
        folder: Path,
        manifest: Manifest,
        *,
        device: str = "cpu",
        threads: int | None = None,
        low_memory: bool = False,
        shadow_every: int | None = None,
    ) -> Engine:
        """Loads stages under a manifest that is at hand (the compiler's, before it is written)."""
        backend = load_backend(
            folder, manifest, device=device, threads=threads, low_memory=low_memory
        )
        shadow = None if shadow_every is None else ShadowMonitor(shadow_every)
        return cls(manifest, backend, load_tokenizer(folder, manifest), shadow)

    @property
    def manifest(self) -> Manifest:
        """The folder's manifest."""
        return self._manifest

    @property
    def backend(self) -> Backend:
        """The loaded stages."""
        return self._backend

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

    def session(self) -> Session:
        """A sequence of one's own."""
        return Session(self._backend, self._manifest)

    def policy(
        self,
        mode: Mode,
        *,
        classifier: str | None = None,
        threshold: float | None = None,
        level: float | None = None,
    ) -> ExitPolicy:
        """The exit policy of a mode.

        Args:
            classifier: kind of the exit graph, where the folder has several; default: its first.
            threshold: of the classifier's score, instead of the manifest's.
            level: a certified share of disagreement, such as 0.02, whose threshold is taken.

        Raises:
            ExitUnavailableError: `adaptive`, but the folder has no such exit graph, or the level
                is not certified.
            RequestError: no such mode, or both a threshold and a level.
        """
        if mode == "off":
            return NoExit()
        if mode == "context":
            return self._context_policy(threshold, level)
        if mode != "adaptive":
            raise RequestError(f"mode {mode!r} is unknown: off, adaptive or context")
        spec = self._exit_graph(classifier)
        return self._classifier_exit(spec, threshold, level)

    def choice_policy(
        self, mode: Mode, *, threshold: float | None = None, level: float | None = None
    ) -> ExitPolicy:
        """`policy` for choices among labels: the exit graph that was calibrated for them.

        A folder whose calibration data had no labels has none; `policy` is taken then.
        """
        spec = self._manifest.choice_exit
        if mode != "adaptive" or spec is None:
            return self.policy(mode, threshold=threshold, level=level)
        return self._classifier_exit(spec, threshold, level, over_candidates=True)

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        max_new_tokens: int = 64,
        mode: Mode = "off",
        threshold: float | None = None,
        level: float | None = None,
        ignore_eos: bool = False,
        timeout: float | None = None,
    ) -> GenerationResult:
        """Continues a prompt greedily.

        Args:
            prompt: text, or token ids.
            mode: `off` runs every layer; `adaptive` stops where the exit graph says so; `context`
                lets the prompt's positions stop and runs the last one through every layer.
            threshold, level: see `policy`.
            ignore_eos: go on after an end-of-text token (for benchmarks).
            timeout: seconds after which `DeadlineError` is raised.

        Raises:
            RequestError: the request cannot be served; the engine stays usable.
            DeadlineError: the timeout passed.
        """
        eos = frozenset() if ignore_eos else frozenset(self._manifest.model.eos_token_ids)
        request = GenerateRequest(self._tokens(prompt), max_new_tokens, eos, timeout)
        policy = self.policy(mode, threshold=threshold, level=level)
        with self.borrow() as session:
            decoder = PolicyDecoder(session, policy, Greedy())
            done = generate(session, decoder, request, self._manifest.max_seq_len)
        if self._compares(policy):
            with self.borrow() as session:
                session.extend(request.prompt)
                full = session.predict(NoExit()).result.token
            # No token came out where the first was an end-of-text token.
            first = done.tokens[0] if done.tokens else None
            agrees = first == full or (first is None and full in eos)
            self._record(policy, agrees=agrees)
        return self._result(done)

    def choose(
        self,
        prompt: str | Sequence[int],
        labels: Sequence[str],
        *,
        mode: Mode = "off",
        threshold: float | None = None,
        level: float | None = None,
    ) -> ChoiceResult:
        """The label that most likely follows the prompt (labels of several tokens too).

        A label that would touch the prompt's last word is joined with a space (`join_label`).

        Raises:
            RequestError: fewer than two labels, empty or equal ones.
        """
        policy = self.choice_policy(mode, threshold=threshold, level=level)
        done = self.choose_with(prompt, labels, policy)
        if self._compares(policy):
            full = self.choose_with(prompt, labels, NoExit())
            self._record(policy, agrees=done.index == full.index)
        return ChoiceResult(
            labels[done.index],
            done.index,
            done.scores,
            done.exit_layer,
            self._manifest.model.num_layers,
            done.count.layers_saved,
            done.count.compute_saved,
            done.seconds,
        )

    def choose_with(
        self, prompt: str | Sequence[int], labels: Sequence[str], policy: ExitPolicy
    ) -> Chosen:
        """`choose` under any exit policy, with the position-layers that were counted."""
        tokens = self.label_tokens(prompt, labels)
        with self.borrow() as session:
            limit = self._manifest.max_seq_len
            return choose(session, self._tokens(prompt), tokens, policy, limit)

    def _context_policy(self, threshold: float | None, level: float | None) -> ExitPolicy:
        spec = self._manifest.context_exit
        if spec is None:
            raise ExitUnavailableError(
                "this engine has no context exit: run `adainfer calibrate DIR --context-exit`"
            )
        return self._classifier_exit(spec, threshold, level, translates=True)

    def _classifier_exit(
        self,
        spec: ExitSpec,
        threshold: float | None,
        level: float | None,
        *,
        over_candidates: bool = False,
        translates: bool = False,
    ) -> ExitPolicy:
        if spec.classifier is None or spec.threshold is None:
            return NoExit()  # calibrated, and the answer was "do not exit"
        if threshold is not None and level is not None:
            raise RequestError("give a threshold or a certified level, not both")
        promised = round(1.0 - spec.target_agreement, 6) if threshold is None else None
        if level is not None:
            threshold = certified_threshold(spec, level)
            against = spec.certificate.against if spec.certificate else "model"
            promised = level if against == "model" else None
        return ClassifierExit.of(
            self._backend,
            spec.points,
            spec.classifier,
            self._manifest.model.num_layers,
            spec.threshold if threshold is None else threshold,
            over_candidates=over_candidates,
            translates=translates,
            promised=promised,
        )

    def _exit_graph(self, classifier: str | None) -> ExitSpec:
        spec = self._manifest.exit
        if spec is None:
            raise ExitUnavailableError(
                "this engine has no exit graph: run `adainfer calibrate DIR`, or use mode off"
            )
        if classifier is None:
            return spec
        graphs = self._manifest.exit_graphs
        if classifier not in graphs:
            raise ExitUnavailableError(
                f"this engine has no exit graph with classifier {classifier!r}: it has "
                f"{', '.join(graphs) or 'none'}; run `adainfer calibrate DIR --classifier "
                f"{classifier}`"
            )
        return graphs[classifier]

    def label_tokens(
        self, prompt: str | Sequence[int], labels: Sequence[str]
    ) -> list[Sequence[int]]:
        """The labels' tokens as they continue the prompt (see `join_label`)."""
        text = prompt if isinstance(prompt, str) else ""
        joined = [join_label(text, label) for label in labels]
        return [self._tokenizer.encode_continuation(label) for label in joined]

    def _compares(self, policy: ExitPolicy) -> bool:
        return bool(policy.exit_layers) and self._shadow is not None and self._shadow.due()

    def _record(self, policy: ExitPolicy, *, agrees: bool) -> None:
        if self._shadow is not None:
            promised = policy.promised if isinstance(policy, ClassifierExit) else None
            self._shadow.record(promised, agrees=agrees)

    def _tokens(self, prompt: str | Sequence[int]) -> Sequence[int]:
        return self._tokenizer.encode(prompt) if isinstance(prompt, str) else prompt

    def _result(self, done: Generated) -> GenerationResult:
        count = done.prompt + done.decode
        return GenerationResult(
            text=self._tokenizer.decode(list(done.tokens)),
            tokens=done.tokens,
            exit_layers=done.exit_layers,
            layers_total=self._manifest.model.num_layers,
            layers_saved=count.layers_saved,
            prompt_layers_saved=done.prompt.layers_saved,
            decode_layers_saved=done.decode.layers_saved,
            compute_saved=count.compute_saved,
            seconds=done.seconds,
            finish_reason=done.finish_reason,
        )

    @contextmanager
    def borrow(self) -> Iterator[Session]:
        """An empty session; bindings and KV memory are reused from request to request."""
        with self._lock:
            session = self._idle.pop() if self._idle else None
        session = session or self.session()
        session.truncate(0)
        yield session
        # Not reached when the request failed: a session in an unknown state is dropped.
        with self._lock:
            if len(self._idle) < _IDLE_SESSIONS:
                self._idle.append(session)
