"""A hundred prompts of four kinds for generation: chat, stories, lists, code."""

from __future__ import annotations

from adainfer_runtime.tokenizer import Tokenizer

_TOPICS = (
    "the sea", "a lighthouse", "bees", "the moon", "a train station", "bread", "winter",
    "a library",
    "volcanoes", "a lost key", "chess", "the desert", "a market", "rivers", "an old clock", "rain",
    "bicycles", "a garden", "the night sky", "maps", "a bridge", "coffee", "the forest",
    "an island", "music",
)  # fmt: skip
_KINDS = {
    "chat": "Explain {} to a child in a few sentences.",
    "story": "Once upon a time there was a story about {}. It began when",
    "list": "Ten facts about {}:\n1.",
    "code": 'def describe(count):\n    """Prints a line about {} for each number."""\n',
}
_CHAT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"


def generation_prompts(tokenizer: Tokenizer, count: int) -> list[list[int]]:
    """Token ids of the first `count` prompts; kinds take turns.

    Chat prompts are written in ChatML where the tokenizer knows its tokens.
    """
    chatml = len(tokenizer.encode("<|im_start|>")) <= 2
    prompts = []
    for topic in _TOPICS:
        for kind, form in _KINDS.items():
            text = form.format(topic)
            prompts.append(_CHAT.format(text) if kind == "chat" and chatml else text)
    return [tokenizer.encode(text) for text in prompts[:count]]
