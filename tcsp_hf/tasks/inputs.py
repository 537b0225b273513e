"""How long a model's inputs may be, and on which side they are padded."""

import copy
from typing import Any

from ..errors import TCSPError


def input_length(model: Any, usual: int, asked: int | None = None) -> int:
    """Tokens of an input: `asked`, or the usual number, but no more than the model has positions for.

    Raises:
        TCSPError: `asked` is more than that.
    """
    longest = getattr(model.config, "max_position_embeddings", None)
    if asked is not None and longest is not None and asked > longest:
        raise TCSPError(f"max_length is {asked}, but the model reads at most {longest} tokens: take no more.")
    return asked or (usual if longest is None else min(usual, longest))


def right_padding(tokenizer: Any) -> Any:
    """The tokenizer, or a copy of it that pads on the right, as BERT and T5 were trained: spans are counted from the
    left, and absolute positions would depend on a batch's longest input."""
    if getattr(tokenizer, "padding_side", "right") == "right":
        return tokenizer
    turned = copy.copy(tokenizer)
    turned.padding_side = "right"
    return turned
