"""What was cut, layer by layer, as a configuration tells it."""

from dataclasses import dataclass
from typing import Any

from ..configuration_tcsp_bert import TCSPBertConfig
from ..configuration_tcsp_t5 import TCSPT5Config


@dataclass(frozen=True)
class LayerCut:
    """Sizes of one layer, in the order of its parts (self-attention, cross-attention, feed-forward).

    `sites` holds (width, kept energy or None) of the normalised streams that belong to the layer; the other lists are
    empty for a row that has no such part (the embeddings, a stack's last norm).
    """

    name: str
    sites: list[tuple[int, float | None]]
    neurons: list[int]
    heads: list[int]
    qk: list[int]
    vo: list[int]


@dataclass(frozen=True)
class DenseSizes:
    """The same sizes in the dense model, equal in all layers."""

    hidden_size: int
    neurons: int
    heads: int
    head_size: int


def dense_sizes(config: Any) -> DenseSizes:
    """Of the model that was compressed."""
    if isinstance(config, TCSPBertConfig):
        return DenseSizes(
            config.dense_hidden_size, config.intermediate_size, config.num_attention_heads, config.dense_head_dim
        )
    return DenseSizes(config.dense_hidden_size, config.d_ff, config.num_heads, config.d_kv)


def layer_cuts(config: Any) -> list[LayerCut]:
    """One row a layer, in the order of the forward pass."""
    kept = {site["name"]: site["kept_energy"] for site in (config.projection or {}).get("sites", [])}
    sites: dict[str, list[tuple[int, float | None]]] = {}
    for name, width in config.site_widths().items():
        layer = name.rpartition(".")[0] or name
        sites.setdefault(name if name.endswith(".final") else layer, []).append((width, kept.get(name)))
    row = _bert_row if isinstance(config, TCSPBertConfig) else _t5_row
    return [row(config, name, own) for name, own in sites.items()]


def _bert_row(config: TCSPBertConfig, name: str, sites: list[tuple[int, float | None]]) -> LayerCut:
    if not name.startswith("layer."):
        return LayerCut(name, sites, [], [], [], [])
    i = int(name.split(".")[1])
    return LayerCut(
        name,
        sites,
        [config.intermediate_size_of(i)],
        [config.attention_heads_of(i)],
        [config.qk_head_size_of(i)],
        [config.vo_head_size_of(i)],
    )


def _t5_row(config: TCSPT5Config, name: str, sites: list[tuple[int, float | None]]) -> LayerCut:
    stack, part = name.split(".")
    if part == "final":
        return LayerCut(name, sites, [], [], [], [])
    i = int(part)
    groups = [stack] if stack == "encoder" else [stack, "cross"]
    return LayerCut(
        name,
        sites,
        [config.intermediate_size_of(stack, i)],
        [config.attention_heads_of(group, i) for group in groups],
        [config.qk_head_size_of(group, i) for group in groups],
        [config.vo_head_size_of(group, i) for group in groups],
    )
