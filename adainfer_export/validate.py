"""Compares an engine folder with transformers on the same weights: stage by stage, end to end."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from adainfer_runtime import Engine
from adainfer_runtime.engine_folder import load_manifest
from adainfer_runtime.manifest import Manifest, SourceSpec

from .architectures import find_architecture
from .errors import SourceError
from .lower import PRECISIONS
from .sources import Checkpoint, resolve
from .sources.onnx_folder import OnnxFolder
from .sources.viewed import ViewedCheckpoint

__all__ = ["StageDifference", "ValidationReport", "reference_model", "validate_folder"]

_TOLERANCE = {"fp32": 1e-3, "keep": 1e-3}
_LENGTHS = (24, 96) * 3  # quantised engines compute few and many positions differently


@dataclass(frozen=True)
class StageDifference:
    """Largest absolute difference of the hidden state after a layer, and its relative size."""

    layer: int
    largest: float
    relative: float


@dataclass(frozen=True)
class ValidationReport:
    """Figures over all prompts.

    Attributes:
        tolerance: on the logits; None where the precision promises none (fp8, int8, int4).
        same_tokens: share of greedy tokens equal to the reference's, teacher-forced.
    """

    reference: str
    stages: tuple[StageDifference, ...]
    logits: float
    same_tokens: float
    tolerance: float | None

    @property
    def passed(self) -> bool:
        """Within the tolerance, where there is one."""
        return self.tolerance is None or (self.logits <= self.tolerance and self.same_tokens == 1.0)


def validate_folder(
    folder: Path, reference: str | None = None, *, seed: int = 0
) -> ValidationReport:
    """Runs random token sequences through the chain and through transformers.

    Args:
        reference: checkpoint to compare with; default: the folder's own source, where that is no
            local one.

    Raises:
        SourceError: the reference is not given, cannot be found, or has another shape.
    """
    source = load_manifest(folder).source
    if reference is None:
        _require_fetched(folder, source)
    engine = Engine.load(folder, verify=True)
    manifest = engine.manifest
    cut = engine
    if manifest.joined:  # what runs, and the single stages behind it
        cut = Engine.of_manifest(folder, manifest.uncalibrated())
    checkpoint = resolve(reference) if reference else _fetch_again(source)
    if isinstance(checkpoint, OnnxFolder):
        raise SourceError(
            f"{checkpoint.source_name} holds a decoder in ONNX, which transformers does not run: "
            "give the checkpoint that it was made of"
        )
    _require_same_shape(checkpoint, manifest)
    model = reference_model(checkpoint)
    random = np.random.default_rng(seed)
    lengths = [min(length, manifest.max_seq_len) for length in _LENGTHS]
    prompts = [random.integers(0, manifest.model.vocab_size, length) for length in lengths]
    by_stage = [_compare(cut, model, prompt) for prompt in prompts]
    comparisons = [_compare(engine, model, prompt) for prompt in prompts]
    return ValidationReport(
        reference=checkpoint.source.id,
        stages=_worst_stages(cut.manifest, by_stage),
        logits=max(comparison.logits for comparison in comparisons),
        same_tokens=float(np.mean([comparison.same_tokens for comparison in comparisons])),
        tolerance=_TOLERANCE.get(PRECISIONS[manifest.precision].name),
    )


def _fetch_again(source: SourceSpec) -> Checkpoint:
    """A package's version is not asked for: its recipe has it, and its checksum."""
    return resolve(source.id, revision=source.revision if source.kind == "huggingface" else None)


def _require_fetched(folder: Path, source: SourceSpec) -> None:
    """Of what was local the manifest has the name alone, which elsewhere is nothing or another."""
    if source.kind != "huggingface" and source.revision is None:
        raise SourceError(
            f"{folder} was exported from a local checkpoint, {source.id}: say where it is with "
            "--reference CHECKPOINT"
        )


def reference_model(checkpoint: Checkpoint) -> Any:
    """The checkpoint as a float32 transformers model, its tensors read one by one."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    config = checkpoint.config
    config.dtype = torch.float32
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    stored = ViewedCheckpoint(checkpoint, {}, find_architecture(config.model_type).aliases)
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        for leaf, parameter in module._parameters.items():
            if parameter is None or (module is head and checkpoint.tied_head):
                continue
            tensor = torch.from_numpy(np.array(stored.read(f"{name}.{leaf}")))
            # Assigned, not copied: layers may be narrower than the configuration says.
            module._parameters[leaf] = torch.nn.Parameter(tensor, requires_grad=False)
    for module in model.modules():  # once all have their weights
        if hasattr(module, "num_key_value_groups"):
            _regroup(module)
    if checkpoint.tied_head:
        head.weight = model.get_input_embeddings().weight
    return model.eval()


def _regroup(attention: Any) -> None:
    """Query heads for each head of K and V, from the weights that the layer really has."""
    query, key, fused = (getattr(attention, f"{part}_proj", None) for part in ("q", "k", "qkv"))
    if query is not None and key is not None:
        attention.num_key_value_groups = len(query.weight) // len(key.weight)
    if fused is not None:  # Phi-3, which cuts by these numbers
        heads = attention.o_proj.weight.shape[1] // attention.head_dim
        kv_heads = (len(fused.weight) // attention.head_dim - heads) // 2
        attention.config = copy.copy(attention.config)
        attention.config.num_attention_heads = heads
        attention.num_key_value_heads = kv_heads
        attention.num_key_value_groups = heads // kv_heads


@dataclass(frozen=True)
class _Comparison:
    stages: tuple[tuple[float, float], ...]
    logits: float
    same_tokens: float


def _compare(engine: Engine, model: Any, prompt: npt.NDArray[np.int64]) -> _Comparison:
    import torch

    with torch.no_grad():
        out = model(torch.from_numpy(prompt[None]), output_hidden_states=True)
    expected = out.logits[0].numpy()
    stages = []
    with engine.borrow() as session:
        session.extend(prompt.tolist())
        for boundary in engine.manifest.boundaries:
            session.advance(boundary)
            # transformers applies the final norm to the last hidden state it returns.
            if boundary < engine.manifest.model.num_layers:
                hidden = out.hidden_states[boundary][0].numpy()
                difference = np.abs(session.hidden() - hidden)
                stages.append((float(difference.max()), float(np.abs(hidden).max())))
        logits = engine.backend.probe_logits(session.hidden())
    return _Comparison(
        tuple(stages),
        float(np.abs(logits - expected).max()),
        float((logits.argmax(-1) == expected.argmax(-1)).mean()),
    )


def _worst_stages(
    manifest: Manifest, comparisons: Sequence[_Comparison]
) -> tuple[StageDifference, ...]:
    rows = []
    for index, layer in enumerate(manifest.boundaries[:-1]):
        found = [comparison.stages[index] for comparison in comparisons]
        largest, scale = max(value for value, _ in found), max(scale for _, scale in found)
        rows.append(StageDifference(layer, largest, largest / scale if scale else 0.0))
    return tuple(rows)


def _require_same_shape(checkpoint: Checkpoint, manifest: Manifest) -> None:
    config, model = checkpoint.config, manifest.model
    found = (config.num_hidden_layers, config.hidden_size, config.vocab_size)
    expected = (model.num_layers, model.hidden_size, model.vocab_size)
    if found != expected:
        raise SourceError(
            f"reference {checkpoint.source.id} has (layers, hidden size, vocabulary) {found}, "
            f"the engine folder {expected}: give the checkpoint that was exported"
        )
