"""Hooks on the sites' norms: second moments going forward, gradients coming back, in the model's own passes."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..architectures import Block, Site
from ..errors import TCSPError
from ..offload import read_tensor
from .inputs import Batch
from .statistics import SiteStatistics
from .sums import OuterSums, exact


@dataclass(frozen=True)
class _Tokens:
    """The real tokens of a batch: `mask` (sequences, length), and their places (n,) in it; None where all are real."""

    mask: torch.Tensor
    places: torch.Tensor | None
    count: int

    @classmethod
    def of(cls, mask: torch.Tensor) -> "_Tokens":
        mask = mask.reshape(-1, mask.shape[-1]).bool()
        places = mask.reshape(-1).nonzero().squeeze(-1)
        count = len(places)
        return cls(mask, None if count == mask.numel() else places, count)

    def rows(self, states: torch.Tensor) -> torch.Tensor:
        """(n, width) of the real tokens, from (sequences, length, width)."""
        flat = states.reshape(-1, states.shape[-1])
        return flat if self.places is None else flat.index_select(0, self.places)


class Recorder:
    """Sums over every site of one model, filled by its forward and backward passes between `start` and `stop`."""

    def __init__(self, sites: list[Site], size: int, fisher: bool, blocks: list[Block], scale: float = 1.0) -> None:
        """scale: what the likelihood is multiplied with before its backward pass."""
        self._sites = sites
        self._size = size
        self._fisher = fisher
        self._moments = OuterSums(size)
        self._fishers = OuterSums(size)  # of gradients with respect to the norms' outputs, times the loss scale
        self._common: dict[str, torch.Tensor] = {}
        names = {site.name for site in sites}
        self._queries = [block for block in blocks if block.attends and block.writes in names] if fisher else []
        self._query_fishers: dict[str, torch.Tensor] = {}
        self._counts = {site.name: 0 for site in sites}
        self._tokens: dict[str, _Tokens] = {}
        self._scale = scale
        self._weights = {site.name: read_tensor(site.norm, "weight") for site in sites} if fisher else {}
        self._active = False

    @contextmanager
    def attached(self, model: PreTrainedModel) -> Iterator[None]:
        handles = [site.norm.register_forward_hook(partial(self._forward, site)) for site in self._sites]
        heads = int(model.config.num_attention_heads)
        for block in self._queries:
            handles.append(block.inner[0].register_forward_hook(partial(self._query_forward, block, heads)))
        for module in {id(m): m for m in _embeddings(model)}.values():
            # gradients with respect to hidden states need no gradient of any parameter
            handles.append(module.register_forward_hook(lambda _m, _a, output: self._root(output)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def start(self, inputs: Batch) -> None:
        """Record the passes over this batch, until `forward_is_over` and `stop`."""
        self._tokens = {"encoder": _Tokens.of(inputs["attention_mask"])}
        if "decoder_attention_mask" in inputs:
            self._tokens["decoder"] = _Tokens.of(inputs["decoder_attention_mask"])
        self._active = True

    def forward_is_over(self) -> None:
        """What layers do from here on, they do again for the backward pass: it was recorded."""
        self._active = False

    def stop(self) -> None:
        """The batch is over.

        Raises:
            TCSPError: it brought a NaN or an infinity; the message names the site.
        """
        self._active = False
        name = self._moments.first_not_finite() or self._fishers.first_not_finite()
        if name is not None:
            raise TCSPError(
                f"The hidden states or gradients at site {name!r} hold a NaN or an infinity: check the weights, or "
                "load the model in float32."
            )

    def state(self) -> tuple[dict[str, int], dict[str, torch.Tensor]]:
        """Tokens of every site, and all sums as they are, on the CPU: what `restore` takes."""
        groups = self._groups()
        tensors = {f"{kind}:{name}": value.cpu() for kind, group in groups.items() for name, value in group.items()}
        return dict(self._counts), tensors

    def restore(self, counts: dict[str, int], tensors: dict[str, torch.Tensor]) -> None:
        """Go on from a `state` of the same model and arguments."""
        self._counts = {site.name: int(counts[site.name]) for site in self._sites}
        for kind, group in self._groups().items():
            for site in self._sites:
                if f"{kind}:{site.name}" in tensors:
                    group[site.name] = tensors[f"{kind}:{site.name}"]

    def _groups(self) -> dict[str, dict[str, torch.Tensor]]:
        return {
            "moments": self._moments.upper,
            "fishers": self._fishers.upper,
            "queries": self._query_fishers,
            "common": self._common,
        }

    def statistics(self) -> dict[str, SiteStatistics]:
        found: dict[str, SiteStatistics] = {}
        for site in self._sites:
            if self._counts[site.name] == 0:
                raise TCSPError(f"No token passed the site {site.name!r}: the calibration data holds only padding.")
            fisher = common = None
            if self._fisher:
                weight = self._weights[site.name].to("cpu", torch.float64) / self._scale
                fisher = weight.unsqueeze(-1) * self._fishers.whole(site.name) * weight
                fisher = torch.triu(fisher) + torch.triu(fisher, 1).T  # symmetric to the last bit
                common = self._common.get(site.name, torch.zeros((), dtype=torch.float64)).cpu()
            query = self._query_fishers.get(site.name)
            found[site.name] = SiteStatistics(
                self._counts[site.name],
                self._moments.whole(site.name),
                fisher,
                None if query is None else query.cpu(),
                common,
            )
        return found

    def _root(self, output: torch.Tensor) -> torch.Tensor | None:
        if not (self._active and self._fisher):
            return None
        return output.detach().requires_grad_(True)

    def _forward(self, site: Site, module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
        if not self._active:
            return
        tokens = self._tokens[site.stack]
        with torch.no_grad():
            self._moments.add(site.name, site.normalise(_at_least_float32(tokens.rows(args[0].detach()))))
        self._counts[site.name] += tokens.count
        if self._fisher and output.requires_grad:
            output.register_hook(partial(self._backward, site))

    def _backward(self, site: Site, gradient: torch.Tensor) -> None:
        tokens = self._tokens[site.stack]
        wide = _at_least_float32(gradient)
        self._fishers.add(site.name, tokens.rows(wide))  # the norm's weight is multiplied in at the end
        sums = (tokens.mask.to(wide).unsqueeze(1) @ wide).squeeze(1) * (self._weights[site.name].to(wide) / self._scale)
        energy = sums.square().sum(-1) / tokens.mask.sum(1).clamp(min=1)
        _add(self._common, site.name, energy.sum())

    def _query_forward(
        self, block: Block, heads: int, module: nn.Module, args: tuple[Any, ...], output: torch.Tensor
    ) -> None:
        if self._active and output.requires_grad:
            output.register_hook(partial(self._query_backward, block, heads))

    def _query_backward(self, block: Block, heads: int, gradient: torch.Tensor) -> None:
        wide = exact(self._tokens[block.stack].rows(_at_least_float32(gradient)) / self._scale)
        rows = wide.view(wide.shape[0], heads, wide.shape[1] // heads).transpose(0, 1)
        _add(self._query_fishers, block.writes, rows.mT @ rows)


def _embeddings(model: PreTrainedModel) -> Iterator[nn.Module]:
    """The modules whose outputs are the roots of the graph."""
    yield model.get_input_embeddings()
    for stack in ("encoder", "decoder"):
        table = getattr(getattr(model.base_model, stack, None), "embed_tokens", None)
        if table is not None:
            yield table


def _at_least_float32(values: torch.Tensor) -> torch.Tensor:
    return values if values.dtype == torch.float64 else values.float()


def _add(sums: dict[str, torch.Tensor], name: str, value: torch.Tensor) -> None:
    """Add to a float64 sum."""
    sums[name] = sums[name].to(value.device) + value if name in sums else value.double()
