"""Floating-point operations of one forward pass: the products of the linears, and of attention."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

_READERS = (("query", "key", "value"), ("q", "k", "v"))


def count_flops(model: PreTrainedModel, length: int, target_length: int | None = None) -> int:
    """Twice the multiply-adds of one sequence of `length` tokens: linears and the two products of attention.

    Counted from the shapes of the modules and the number of rows that pass them; norms, activations, biases, softmax
    and table look-ups are left out, as in torch's own counter.

    Args:
        model: dense, compressed or cut; it runs once on one made-up sequence.
        length: tokens of the sequence.
        target_length: tokens of the decoder's input, where there is a decoder; `length` when None.
    """
    config = model.config
    ids = torch.full((1, length), min(3, config.vocab_size - 1), device=model.device)
    if isinstance(config.eos_token_id, int):
        ids[0, -1] = config.eos_token_id  # T5's classifier reads the state at the end token
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if config.is_encoder_decoder:
        targets = length if target_length is None else target_length
        inputs["decoder_input_ids"] = ids[:, :1].expand(1, targets)
        if target_length is None:
            inputs["decoder_input_ids"] = ids
    rows: dict[nn.Module, int] = {}
    with torch.no_grad(), _counting(model, rows):
        model(**inputs)
    linears = sum(2 * m.weight.numel() * count for m, count in rows.items() if isinstance(m, nn.Linear))
    attention = sum(
        2 * rows[query] * rows[key] * (wide_qk + wide_vo) for query, key, wide_qk, wide_vo in _attentions(model)
    )
    return linears + attention


def _attentions(model: nn.Module) -> Iterator[tuple[nn.Module, nn.Module, int, int]]:
    """For every attention: what makes queries and keys, and the entries of all heads' queries and values."""
    for item in model.modules():
        module: Any = item
        if hasattr(module, "split_sizes"):  # one product makes query, key and value
            yield module.qkv, module.qkv, module.split_sizes[0], module.split_sizes[2]
            continue
        for names in _READERS:
            query, key, value = (cast(Any, getattr(module, name, None)) for name in names)
            if all(hasattr(part, "out_features") for part in (query, key, value)):
                yield query, key, query.out_features, value.out_features


@contextmanager
def _counting(model: nn.Module, rows: dict[nn.Module, int]) -> Iterator[None]:
    """Collect the number of rows that pass every module with `out_features`."""

    def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        rows[module] = rows.get(module, 0) + args[0].shape[:-1].numel()

    handles = [m.register_forward_pre_hook(hook) for m in model.modules() if hasattr(m, "out_features")]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
