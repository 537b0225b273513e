"""Configurations, counts and models of one dense model's compressed family."""

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from ..architectures import blocks_of, dense_hidden_size, sites_of
from ..calibration import Calibration
from ..configuration_tcsp import METHOD_VERSION, TCSPConfig
from ..configuration_tcsp_bert import TCSPBertConfig
from ..configuration_tcsp_t5 import TCSPT5Config
from ..errors import TCSPError
from ..offload import device_of
from . import bert, t5
from .memory import give_back
from .plan import BlockShape, Costs, Sizes
from .sizes import ParameterCount, count_parameters, meta_count
from .subspace import Kept
from .weights import Tensors

logger = logging.getLogger("tcsp_hf")

_NOT_COPIED = (
    "model_type",
    "architectures",
    "transformers_version",
    "auto_map",
    "dtype",
    "torch_dtype",
    "_name_or_path",
    "position_embedding_type",
    "layer_types",
    "per_layer_config",
    "rope_scaling",
    "rope_parameters",
)


@dataclass
class Builder:
    """Builds what a dense model can be compressed to, for one kind of projection."""

    dense: PreTrainedModel
    family: str
    head: str
    kind: str
    multiple_of: int
    mlm_size: int | None = None  # of the masked-LM head's own site; the embeddings' width when None

    @property
    def full(self) -> int:
        return dense_hidden_size(self.dense)

    @cached_property
    def sites(self) -> list[str]:
        """Names of all sites, in the order of the forward pass."""
        return [site.name for site in sites_of(self.dense)]

    @cached_property
    def groups(self) -> list[list[str]]:
        """Sites that share one subspace: one group for every entry of `Sizes.hidden`, the masked-LM head's apart."""
        if self.family == "bert":
            main = [name for name in self.sites if name != bert.MLM_SITE]
            return [main] if self.kind == "shared" else [[name] for name in main]
        if self.kind == "shared":
            return [self.sites]
        stacks = [[name for name in self.sites if name.startswith(stack)] for stack in ("encoder.", "decoder.")]
        return [stack for stack in stacks if stack]

    @property
    def model_class(self) -> Callable[[Any], PreTrainedModel]:
        made = (bert if self.family == "bert" else t5).model_class(self.head)
        bare = self.family == "bert" and self.head == "Model" and self.dense.pooler is None
        return partial(made, add_pooling_layer=False) if bare else made

    # --- sizes ---------------------------------------------------------------------------------------------------

    def round_up(self, size: int, quiet: bool = False) -> int:
        """The next multiple, at most D."""
        rounded = min(-(-size // self.multiple_of) * self.multiple_of, self.full)
        if rounded != size and not quiet:
            logger.warning(
                "hidden_size %d was rounded up to %d, a multiple of %d (multiple_of=1 keeps it).",
                size,
                rounded,
                self.multiple_of,
            )
        return rounded

    def widths(self, sizes: Sizes) -> dict[str, int]:
        """Width by site name; the masked-LM head is beside the groups."""
        widths = {name: size for members, size in zip(self.groups, sizes.hidden, strict=True) for name in members}
        head = sizes.hidden[0] if self.mlm_size is None else self.mlm_size
        return {name: widths.get(name, head) for name in self.sites}

    def config(self, sizes: Sizes, kept_heads: list[list[int]] | None = None) -> TCSPConfig:
        """kept_heads: indices, for every attention block; the first ones when None (for counting)."""
        own: dict[str, Any]
        config_class: type[TCSPConfig]
        widths = self.widths(sizes)
        if self.family == "bert":
            own, config_class = bert.config_fields(self.dense, widths, sizes), TCSPBertConfig
        else:
            own_bases = self.kind == "per_site" and "decoder.final" in widths
            kept = [list(range(count)) for count in sizes.heads] if kept_heads is None else kept_heads
            own = t5.config_fields(self.dense, widths, own_bases, sizes, kept)
            config_class = TCSPT5Config
        # other libraries' fields come along, but for those that would be taken for misspelled ones of ours, such as
        # pooler_fc_size in the first multilingual BERTs
        fields = {
            name: value
            for name, value in self.dense.config.to_dict().items()
            if name not in _NOT_COPIED and not config_class.looks_like(name)
        }
        config = config_class(**{**fields, **own})
        config._attn_implementation = self.dense.config._attn_implementation
        return config

    def count(self, sizes: Sizes) -> ParameterCount:
        """Parameters that the model of these sizes would have."""
        return meta_count(self.model_class, self.config(sizes))

    def dense_sizes(self) -> Sizes:
        """The dense model's own sizes."""
        return self._costs_of_blocks(None).dense()

    def costs(self, lengths: dict[str, float] | None = None) -> Costs:
        """lengths: mean tokens of a sequence, by stack; 1 each when None (FLOPs mean nothing then)."""
        fixed, per_hidden = self._elsewhere
        return replace(self._costs_of_blocks(lengths), fixed=fixed, per_hidden=per_hidden)

    @cached_property
    def _elsewhere(self) -> tuple[int, tuple[int, ...]]:
        """`Costs.fixed` and `per_hidden`: counted on models of such sizes rather than listed head by head."""
        blocks = self._costs_of_blocks(None)
        dense = blocks.dense()
        whole = self.count(dense).non_embedding - blocks.parameters(dense)
        per_hidden = []
        for i in range(len(self.groups)):
            narrow = dense.copy()
            narrow.hidden[i] -= 1
            per_hidden.append(whole - self.count(narrow).non_embedding + blocks.parameters(narrow))
        return whole - self.full * sum(per_hidden), tuple(per_hidden)

    def _costs_of_blocks(self, lengths: dict[str, float] | None) -> Costs:
        """Without embeddings' norms and heads."""
        config = self.dense.config
        lengths = {"encoder": 1.0, "decoder": 1.0} if lengths is None else lengths
        index = {name: i for i, members in enumerate(self.groups) for name in members}
        memory = index.get("encoder.final", 0)
        shapes: list[BlockShape] = []
        counts = {True: 0, False: 0}
        for block in blocks_of(self.dense):
            keys = lengths["encoder" if block.kind == "cross" else block.stack]
            shapes.append(
                BlockShape(
                    attends=block.attends,
                    number=counts[block.attends],
                    reads=index[block.reads],
                    memory=memory if block.kind == "cross" else index[block.reads],
                    writes=index[block.writes],
                    inner=len(block.inner),
                    tokens=lengths[block.stack],
                    keys=keys,
                )
            )
            counts[block.attends] += 1
        bert_like = self.family == "bert"
        return Costs(
            full=self.full,
            heads=config.num_attention_heads,
            head_size=self.full // config.num_attention_heads if bert_like else config.d_kv,
            neurons=config.intermediate_size if bert_like else config.d_ff,
            widths=len(self.groups),
            blocks=tuple(shapes),
            bias=bert_like,
            maps=bert_like,
            per_hidden=(0,) * len(self.groups),
        )

    # --- models --------------------------------------------------------------------------------------------------

    def build(
        self,
        kept: dict[str, Kept],
        stats: Calibration,
        sizes: Sizes,
        kept_heads: list[list[int]] | None,
        tensors: Tensors,
        record: dict[str, Any],
    ) -> PreTrainedModel:
        """The compressed model of these sizes.

        Args:
            kept: of the subspace of every site, in the order of the forward pass.
            tensors: its state dict; emptied, so that no weight is held twice.
            record: more fields of `config.projection`.
        """
        config = self.config(sizes, kept_heads)
        count = count_parameters(self.dense)
        config.projection = {
            "method_version": METHOD_VERSION,
            "source_model": stats.source_model,
            "source_revision": getattr(self.dense.config, "_commit_hash", None),
            "source_model_type": self.dense.config.model_type,
            "source_hidden_size": self.full,
            "source_parameters": count.total,
            "source_non_embedding_parameters": count.non_embedding,
            "kind": self.kind,
            "sites": [
                {"name": name, "hidden_size": found.size, "kept_energy": round(found.energy, 6)}
                for name, found in kept.items()
                if name in config.site_widths()
            ],
            "calibration": stats.summary(),
            **record,
        }
        with no_init_weights():
            small = self.model_class(config)
        small.tie_weights()
        self._load(small, tensors)
        after = count_parameters(small).non_embedding
        small.config.projection["removed"] = round(1.0 - after / count.non_embedding, 6)
        if self.dense.can_generate():
            small.generation_config = copy.deepcopy(self.dense.generation_config)
        return small.eval()

    def _load(self, small: Any, tensors: Tensors) -> None:
        """Put the projected tensors into the model, in the dense model's dtypes, on its device."""
        give_back(sum(value.nbytes for value in tensors.values()))
        broken = [name for name, value in tensors.items() if not _is_finite(value)]
        if broken:
            raise TCSPError(f"The projected weights hold a NaN or an infinity: {broken[0]}. Check the dense weights.")
        small.to(dtype=self.dense.dtype)
        for name, parameter in small.named_parameters():
            if parameter.dtype != tensors.dtype_of(name):
                parameter.data = parameter.data.to(tensors.dtype_of(name))
        places = small.state_dict()
        missing, unexpected = sorted(places.keys() - tensors.keys()), sorted(tensors.keys() - places.keys())
        if missing or unexpected:
            raise TCSPError(f"The dense model is not laid out as expected: missing {missing}, unexpected {unexpected}.")
        for name, place in places.items():
            place.copy_(tensors.pop(name))
        small.to(device_of(self.dense))


def _is_finite(tensor: torch.Tensor) -> bool:
    """Whether no entry is a NaN or an infinity; nothing of the tensor's size is made."""
    return all(bool(end.isfinite()) for end in tensor.aminmax()) if tensor.numel() else True
