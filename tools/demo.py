"""What `make demo` shows: text, and answers that stop early, with what was counted.

python tools/demo.py build/demo
"""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from adainfer_runtime import Engine

REVIEWS = (
    "Q: A warm and funny film.\nA: positive\n\n"
    "Q: I wanted my money back.\nA: negative\n\n"
    "Q: What a delightful story!\nA: positive\n\n"
    "Q: Predictable and far too long.\nA: negative\n\n"
    "Q: {review}\nA:"
)
QUESTIONS = (
    ("review: moving and well made", REVIEWS.format(review="Moving and beautifully made.")),
    ("review: a waste of time", REVIEWS.format(review="A dull waste of two hours.")),
    ("past tense of walk", "go -> went\ntake -> took\nsee -> saw\nplay -> played\nwalk ->"),
    ("plural of river", "cat: cats\nhouse: houses\ncity: cities\nriver:"),
    ("capital letter", "dog -> Dog\npiano -> Piano\nhammer -> Hammer\napple ->"),
)


def main() -> None:
    """Runs the demonstration on an engine folder."""
    engine = Engine.load(Path(sys.argv[1]))
    console = Console(width=110)
    story = engine.generate("Once upon a time, a small robot", max_new_tokens=40)
    console.print(f"[bold]mode off:[/bold] {story.text.strip()!r}")
    console.print(f"{len(story.tokens)} tokens, {len(story.tokens) / story.seconds:.0f} tokens/s\n")
    table = Table(title="one answer token, off and adaptive")
    for heading in ("question", "off", "adaptive", "exit after layer", "layers saved", "time"):
        table.add_column(heading)
    for name, prompt in QUESTIONS:
        off = engine.generate(prompt, max_new_tokens=1, ignore_eos=True)
        early = engine.generate(prompt, max_new_tokens=1, ignore_eos=True, mode="adaptive")
        table.add_row(
            name,
            off.text.strip(),
            early.text.strip(),
            f"{early.exit_layers[0]} of {early.layers_total}",
            f"{early.layers_saved:.0%}",
            f"{early.seconds / off.seconds:.2f} of off",
        )
    console.print(table)


if __name__ == "__main__":
    main()
