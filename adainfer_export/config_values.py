"""Values that transformers takes in a configuration, and that no decoder here can be built of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .errors import CheckpointError, UnsupportedError

__all__ = ["require_values"]

_EPSILONS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon")


def require_values(config: Any, eos_token_ids: Sequence[int], source: str) -> None:
    """Refuses by name what would be exported as another model, or as one that does not load.

    Args:
        config: a `transformers.PretrainedConfig`.
        source: what messages call the checkpoint.

    Raises:
        CheckpointError: a value that no model has.
        UnsupportedError: attention that looks ahead.
    """
    # Read by the function that makes the masks of all families, whatever their configuration.
    if not getattr(config, "is_causal", True):
        raise UnsupportedError(
            f"{source}: is_causal is false in its configuration: attention that looks ahead has no "
            "cache to decode with, and is not supported"
        )
    for name in _EPSILONS:
        if not getattr(config, name, 0.0) >= 0.0:
            raise CheckpointError(f"{source}: {name} of the configuration is negative")
    if not getattr(config, "query_pre_attn_scalar", 1) > 0:
        raise CheckpointError(
            f"{source}: query_pre_attn_scalar of the configuration is "
            f"{config.query_pre_attn_scalar}; attention is scaled by its root, and it must be "
            "positive"
        )
    for token in eos_token_ids:
        if not 0 <= token < config.vocab_size:
            raise CheckpointError(
                f"{source}: eos_token_id {token} is no token of a vocabulary of "
                f"{config.vocab_size}: mend it in generation_config.json or config.json"
            )
