"""Whether examples can be asked about: all of them, before the first is."""

from __future__ import annotations

from collections.abc import Iterable

from ..choose import require_choice
from ..engine import Engine
from ..errors import RequestError, TokenizerMissingError
from ..session import check_tokens, require_fit
from ..tasks import PlacedExample, TaskExample

__all__ = ["check_examples"]


def check_examples(engine: Engine, examples: Iterable[PlacedExample], *, labels_only: bool) -> None:
    """Encodes every prompt, and every label where there is a choice; nothing is run.

    Raises:
        RequestError: a prompt does not fit, or labels are no choice; says where the first is that
            cannot be used, and how many more there are.
    """
    found = [
        (placed.where, reason)
        for placed in examples
        if (reason := _reason(engine, placed.example, labels_only=labels_only))
    ]
    if found:
        where, reason = found[0]
        others = f" (and {len(found) - 1} more that cannot be used)" if len(found) > 1 else ""
        raise RequestError(f"{where}: {reason}{others}")


def _reason(engine: Engine, example: TaskExample, *, labels_only: bool) -> str | None:
    """Why an example cannot be asked about."""
    manifest = engine.manifest
    try:
        ids = check_tokens(engine.tokenizer.encode(example.prompt), manifest.model.vocab_size)
        if not labels_only:
            require_fit(len(ids), manifest.max_seq_len)
        elif not example.labels:
            return "labels_only needs examples with labels"
        else:
            labels = engine.label_tokens(example.prompt, example.labels)
            require_choice(len(ids), labels, manifest.max_seq_len)
    except TokenizerMissingError:
        raise
    except RequestError as error:
        return str(error)
    return None
