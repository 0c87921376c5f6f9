"""Texts as requests get them, under any exit policy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from adainfer_runtime import Engine, GenerationResult
from adainfer_runtime.decode_options import DecodeOptions
from adainfer_runtime.exit_policy import ExitPolicy
from adainfer_runtime.generation_options import GenerationOptions
from adainfer_runtime.text_request import finish, prepare

from .text_loss import WrittenText, first_difference, teacher_forced_share

__all__ = ["TextWriter"]


@dataclass(frozen=True)
class TextWriter:
    """Writes the texts of one mode, by the requests' own code."""

    engine: Engine
    max_new_tokens: int
    mode: Literal["adaptive", "context"]
    kv_policy: Literal["deferred", "translated"]

    def write(
        self, prompt: Sequence[int], policy: ExitPolicy
    ) -> tuple[WrittenText, GenerationResult]:
        """A text, with a look at every exit point at each token."""
        options = GenerationOptions(
            max_new_tokens=self.max_new_tokens,
            mode=self.mode,
            decoding=DecodeOptions(kv_policy=self.kv_policy, exit_looks="always"),
        )
        request = replace(prepare(self.engine, prompt, options), policy=policy)
        result = finish(request.run_on_borrowed())
        return WrittenText.of(result), result

    def teacher_forced(self, prompt: Sequence[int], early: WrittenText, full: WrittenText) -> float:
        """The share by the full model's choices, in one pass behind the first difference."""
        first = first_difference(early, full)
        if first is None:
            return 0.0
        places = len(early.places)
        choices: list[int] = []
        if first + 1 < places:
            with self.engine.borrow() as session:
                session.extend([*prompt, *early.tokens[: places - 1]])
                choices = session.verify_tokens(len(prompt) + first).tolist()
        eos = self.engine.manifest.model.eos_token_ids
        return teacher_forced_share(early, first, choices, eos)
