"""Counting: parameters before and after, with and without embeddings."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from ..offload import distinct_parameters, identity


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of a model. `embedding` holds input embedding tables and the output vocabulary matrix."""

    total: int
    embedding: int

    @property
    def non_embedding(self) -> int:
        return self.total - self.embedding


def count_parameters(model: nn.Module) -> ParameterCount:
    """Count each distinct parameter once; buffers (the lift map) are not parameters."""
    seen = {identity(module, own): getattr(module, own).numel() for _, module, own in distinct_parameters(model)}
    tables: set[Hashable] = set()
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and not name.endswith("relative_attention_bias"):
            tables.add(identity(module, "weight"))
    output = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    if output is not None:
        tables.add(identity(output, "weight"))
    return ParameterCount(sum(seen.values()), sum(count for key, count in seen.items() if key in tables))


def removed_fraction(dense: nn.Module, small: nn.Module) -> float:
    """1 - (non-embedding parameters of `small` / of `dense`); residual maps are counted."""
    return 1.0 - count_parameters(small).non_embedding / count_parameters(dense).non_embedding


@dataclass(frozen=True)
class SizeTable:
    """Rows of (module, parameters before, parameters after); prints as a table."""

    rows: list[tuple[str, int, int]]

    def __str__(self) -> str:
        width = max(len(name) for name, _, _ in self.rows)
        lines = [f"{'module':<{width}}  {'before':>12}  {'after':>12}  {'removed':>8}"]
        for name, before, after in self.rows:
            removed = f"{1 - after / before:8.1%}" if before else "       -"
            lines.append(f"{name:<{width}}  {before:>12,}  {after:>12,}  {removed}")
        return "\n".join(lines)


_PLACES = (
    ("embeddings.", "embeddings"),
    ("shared.", "embeddings"),
    ("embed_tokens.", "embeddings"),
    ("pooler.", "pooler"),
    ("lm_head.", "head"),
    ("cls.", "head"),
    ("classifier.", "head"),
    ("classification_head.", "head"),
    ("qa_outputs.", "head"),
)


def _place(name: str) -> str:
    """`embeddings`, `encoder.3`, `decoder.0`, `pooler`, `head` or `other` for a parameter's name."""
    for marker, place in _PLACES:
        if name.startswith(marker) or f".{marker}" in name:
            return place
    parts = name.split(".")
    for i, part in enumerate(parts[:-1]):
        if part in ("layer", "block") and parts[i + 1].isdigit():
            stack = "decoder" if "decoder" in parts[:i] else "encoder"
            return f"{stack}.{parts[i + 1]}"
    return "other"


def size_table(dense: nn.Module, small: nn.Module) -> SizeTable:
    """Parameters before and after per module, then without embeddings, and in all."""
    before, after = _by_place(dense), _by_place(small)
    names = list(dict.fromkeys([*before, *after]))
    rows = [(name, before.get(name, 0), after.get(name, 0)) for name in names]
    dense_count, small_count = count_parameters(dense), count_parameters(small)
    rows.append(("without embeddings", dense_count.non_embedding, small_count.non_embedding))
    rows.append(("total", dense_count.total, small_count.total))
    return SizeTable(rows)


def _by_place(model: nn.Module) -> dict[str, int]:
    found: dict[str, int] = {}
    for name, module, own in distinct_parameters(model):  # shared parameters are named once
        place = _place(name)
        found[place] = found.get(place, 0) + getattr(module, own).numel()
    return found


def meta_count(model_class: Callable[[Any], PreTrainedModel], config: Any) -> ParameterCount:
    """Parameters that a model of this configuration would have; takes no memory."""
    with torch.device("meta"), no_init_weights():
        model = model_class(config)
    model.tie_weights()
    return count_parameters(model)
