"""Text that the model writes itself, to fit adapters and translators on: no data is needed for it.

Drawn by the folder's own engine at temperature 1, so that the hidden states are those of the model
that exits will run in. What it is good for is the model's own free text; questions with a form of
their own (few-shot answers) need prompts of that form beside it.
"""

from __future__ import annotations

import numpy as np

from adainfer_runtime import Engine
from adainfer_runtime.tasks import TaskExample

from ..progress import Reporter
from .traces import fits

__all__ = ["SELF", "write_texts"]

SELF = "self"  # the task's name

_TOKENS, _FEWEST = 96, 8
# A text begins with the tokenizer's start token alone, where there is one, or with one of these.
_OPENINGS = (
    "The", "A", "In", "It is", "When", "We", "I", "He said", "She", "They", "How to", "Why",
    "What is", "There", "If you", "Once", "On Monday", "As", "For example", "Dear", "#", "1.",
    "Question:", "Q:", "Input:", "Answer:", "def ", "Title:", "Review:", "News:", "List of",
)  # fmt: skip


def write_texts(engine: Engine, count: int, seed: int, reporter: Reporter) -> list[TaskExample]:
    """Texts of up to 96 tokens, the same for the same seed on the same engine.

    Raises:
        TokenizerMissingError: the folder has no tokenizer.
    """
    reporter.begin("writing texts", count)
    starts = [engine.tokenizer.encode(opening) for opening in ("", *_OPENINGS)]
    starts = [start for start in starts if start]
    random = np.random.default_rng(seed)
    texts = []
    for _ in range(count):
        start = starts[random.integers(len(starts))]
        texts.append(_write(engine, start, int(random.integers(2**31))))
        reporter.step()
    written = [TaskExample(prompt=text, task=SELF) for text in dict.fromkeys(texts) if text.strip()]
    return [text for text in written if fits(engine, text)]  # read again, odd text gets longer


def _write(engine: Engine, start: list[int], seed: int) -> str:
    room = min(_TOKENS, engine.manifest.max_seq_len - len(start))
    written = engine.generate(
        start, max_new_tokens=room, min_new_tokens=min(_FEWEST, room), temperature=1.0, seed=seed
    )
    return engine.tokenizer.decode([*start, *written.tokens])
