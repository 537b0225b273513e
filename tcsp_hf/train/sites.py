"""Hidden states of a dense and a compressed model in the same coordinates, site by site.

At site s the compressed model carries `z_s` (k entries), the dense one `n_s` (D entries). The target of `z_s` is
`E_s' n_s`. `E_s` is solved in closed form right after compression, `min ||z_s - E_s' n_s||²` over a few thousand
tokens: this recovers the encoder of a projection, and it also holds after a refit, on any axis and for a compressed
model that was loaded from a folder.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ..architectures import sites_of, t5_sites
from ..modes import evaluating

_RIDGE = 1e-3  # of the mean eigenvalue of the second moment
_TOKENS_PER_DIMENSION = 16
Batch = dict[str, Any]
States = dict[str, torch.Tensor]


def compressed_norms(model: Any) -> dict[str, nn.Module]:
    """Site name -> the module whose output is the site's `z`, of a compressed model."""
    if model.config.model_type == "tcsp_t5":
        return {site.name: site.norm for site in t5_sites(model)}
    base = model.base_model
    norms = {"embeddings": base.embeddings.norm}
    for i, layer in enumerate(base.encoder.layer):
        norms[f"layer.{i}.attention"] = layer.attention.output.norm
        norms[f"layer.{i}.output"] = layer.output.norm
    return norms


@contextmanager
def recorded(modules: dict[str, tuple[nn.Module, Callable[[tuple[Any, ...], Any], torch.Tensor]]]) -> Iterator[States]:
    """Run forward passes inside; afterwards the yielded dictionary holds what each function made of its module's
    arguments and output."""
    states: States = {}

    def hook(name: str, function: Callable[[tuple[Any, ...], Any], torch.Tensor]) -> Callable[..., None]:
        def keep(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            states[name] = function(args, output)

        return keep

    handles = [module.register_forward_hook(hook(name, function)) for name, (module, function) in modules.items()]
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()


def record_compressed(model: Any, names: Iterable[str]) -> Any:
    """`recorded` for the sites' `z` (batch, length, k) of a compressed model."""
    norms = compressed_norms(model)
    return recorded({name: (norms[name], lambda args, output: output) for name in names})


def record_dense(model: Any, encoders: dict[str, torch.Tensor] | None = None) -> Any:
    """`recorded` for the sites' `n` (batch, length, D) of a dense model, or with encoders for `E' n`."""

    def function(site: Any) -> Callable[[tuple[Any, ...], Any], torch.Tensor]:
        def made(args: tuple[Any, ...], output: Any) -> torch.Tensor:
            normalised = site.normalise(args[0].float())
            return normalised if encoders is None else normalised @ encoders[site.name]

        return made

    sites = [site for site in sites_of(model) if encoders is None or site.name in encoders]
    return recorded({site.name: (site.norm, function(site)) for site in sites})


def token_masks(inputs: Batch) -> dict[str, torch.Tensor]:
    """Stack -> which tokens are real: (sequences, length) booleans."""
    ids = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"][..., 0]
    mask = inputs.get("attention_mask")
    mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    masks = {"encoder": mask.reshape(-1, mask.shape[-1])}
    labels, decoder = inputs.get("labels"), inputs.get("decoder_input_ids")
    if inputs.get("decoder_attention_mask") is not None:
        masks["decoder"] = inputs["decoder_attention_mask"].bool()
    elif labels is not None and labels.dim() == 2:
        masks["decoder"] = labels != -100
    elif decoder is not None:
        masks["decoder"] = torch.ones_like(decoder, dtype=torch.bool)
    return masks


def mask_of(site: str, masks: dict[str, torch.Tensor], rows: torch.Tensor) -> torch.Tensor:
    """The mask that fits a site's states (sequences, length, ...)."""
    mask = masks.get("decoder" if site.startswith("decoder") else "encoder")
    if mask is None or mask.shape != rows.shape[:2]:
        mask = torch.ones(rows.shape[:2], dtype=torch.bool, device=rows.device)
    return mask


@dataclass
class SiteSums:
    """Sums over tokens, in float64: what the encoders are solved from. Sums of shards add up.

    Attributes:
        moments: site -> sum of `n n'` (D, D).
        products: site -> sum of `n z'` (D, k).
        tokens: site -> number of tokens.
    """

    moments: States
    products: States
    tokens: dict[str, int]

    @classmethod
    @torch.no_grad()
    def collect(cls, dense: Any, small: Any, batches: Iterable[Batch]) -> "SiteSums":
        """Run both models on batches of inputs, until there are enough tokens."""
        known = {site.name for site in sites_of(dense)}
        shared = [name for name in compressed_norms(small) if name in known]
        sums = cls({}, {}, dict.fromkeys(shared, 0))
        enough = _TOKENS_PER_DIMENSION * int(dense.config.hidden_size)
        with evaluating(dense, small):
            for inputs in batches:
                with record_dense(dense) as normalised, record_compressed(small, shared) as carried:
                    dense(**inputs)
                    small(**inputs)
                masks = token_masks(inputs)
                for name in [name for name in shared if name in carried and name in normalised]:
                    mask = mask_of(name, masks, carried[name])
                    sums._add(name, normalised[name][mask], carried[name][mask])
                if min(sums.tokens.values()) >= enough:
                    break
        return sums

    def _add(self, name: str, normalised: torch.Tensor, carried: torch.Tensor) -> None:
        n, z = normalised.to("cpu", torch.float64), carried.to("cpu", torch.float64)
        for sums, value in ((self.moments, n.T @ n), (self.products, n.T @ z)):
            sums[name] = sums[name] + value if name in sums else value
        self.tokens[name] += len(n)


@dataclass
class SiteTargets:
    """How a dense model's states become a compressed one's targets.

    Attributes:
        encoders: site -> `E` (D, k) float32.
        scales: site -> mean of `||E' n||²` over tokens, which the errors are measured in.
    """

    encoders: dict[str, torch.Tensor]
    scales: dict[str, float]

    @classmethod
    def solve(cls, parts: list[SiteSums]) -> "SiteTargets":
        """Every site's encoder from the sums of all shards, by ridge regression."""
        encoders, scales = {}, {}
        for name in {name: None for part in parts for name in part.moments}:
            holders = [part for part in parts if name in part.moments]
            moment = torch.stack([part.moments[name] for part in holders]).sum(0)
            product = torch.stack([part.products[name] for part in holders]).sum(0)
            shift = _RIDGE * moment.diagonal().mean()
            encoder = torch.linalg.solve(moment + shift * torch.eye(len(moment), dtype=moment.dtype), product)
            encoders[name] = encoder.float().contiguous()
            tokens = sum(part.tokens[name] for part in holders)
            scales[name] = float((encoder * (moment @ encoder)).sum()) / tokens
        return cls(encoders, scales)

    def to(self, device: torch.device) -> "SiteTargets":
        return SiteTargets({name: encoder.to(device) for name, encoder in self.encoders.items()}, self.scales)

    def save(self, path: Path) -> None:
        scales = {f"{name}.scale": torch.tensor(scale, dtype=torch.float64) for name, scale in self.scales.items()}
        save_file({**{name: encoder.cpu() for name, encoder in self.encoders.items()}, **scales}, path)

    @classmethod
    def load(cls, path: Path) -> "SiteTargets":
        tensors = load_file(path)
        scales = {name.removesuffix(".scale"): float(t) for name, t in tensors.items() if name.endswith(".scale")}
        return cls({name: tensor for name, tensor in tensors.items() if name in scales}, scales)

    def loss(self, targets: States, carried: States, masks: dict[str, torch.Tensor]) -> torch.Tensor:
        """Mean over sites of the squared error relative to the target's mean square, over real tokens."""
        losses = []
        for name, target in targets.items():
            mask = mask_of(name, masks, target).to(target).unsqueeze(-1)
            error = (carried[name].float() - target).square() * mask
            losses.append(error.sum() / (mask.sum().clamp(min=1) * self.scales[name]))
        return torch.stack(losses).mean()
