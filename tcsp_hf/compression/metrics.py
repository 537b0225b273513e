"""What errors count: by direction (Gamma), by token, and by how much the tokens of a sequence agree (coherence)."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from ..architectures import family_of, sites_of
from ..calibration import Calibration
from ..calibration.divergence import model_inputs
from ..offload import device_of
from .check import objective_name
from .least_squares import Segments
from .subspace import symmetric_root

IDLE_WEIGHT = 0.02  # of tokens that the output does not read
FLOOR = 0.3  # of the identity beside Gamma, in units of its mean eigenvalue
_ROWS_PER_REGRESSOR = 3


class Metrics:
    """The weights of errors at the sites of one dense model, from its calibration."""

    def __init__(
        self, dense: PreTrainedModel, stats: Calibration, probe: Sequence[dict[str, torch.Tensor]] | None = None
    ) -> None:
        """probe: a few padded batches, from which a T5's stream scales are taken."""
        self.stats = stats
        self.device = device_of(dense)
        self.full = stats.hidden_size
        self.family, _ = family_of(dense)
        self.sites = {site.name: site for site in sites_of(dense)}
        names = [name for name in self.sites if name != "mlm_head"]
        layers = dense.config.num_hidden_layers
        # what reads the pooler or the first token sees only that token of the last layer
        first = ("classification", "embedding-cls", "embedding-pooler")
        reads_first = self.family == "bert" and objective_name(dense, stats) in first
        self._idle = set(names[2 * layers - 1 :]) if reads_first else set()
        regressors = self.full + int(dense.config.intermediate_size if self.family == "bert" else dense.config.d_ff)
        self.segment_tokens = stats.sample.tokens // (_ROWS_PER_REGRESSOR * regressors)
        self._squares: dict[str, float] = dict.fromkeys(names, 1.0)
        if self.family == "t5" and probe:
            self._measure_squares(dense, probe)

    def _measure_squares(self, dense: PreTrainedModel, probe: Sequence[dict[str, torch.Tensor]]) -> None:
        sums: dict[str, list[float]] = {name: [0.0, 0.0] for name in self._squares}
        with torch.no_grad(), self.recording(list(self._squares)) as scales:
            for batch in probe:
                dense(**model_inputs(dense, batch), return_dict=True)
                for name, total in sums.items():
                    mask = batch[self.mask_name(name)].bool()
                    rows = scales[name].reshape(mask.shape)[mask].double().square()
                    total[0] += float(rows.sum())
                    total[1] += len(rows)
        self._squares = {name: max(total / max(1.0, count), 1e-30) for name, (total, count) in sums.items()}

    def mask_name(self, name: str) -> str:
        """The model input that marks the real tokens of a site."""
        return "attention_mask" if self.sites[name].stack == "encoder" else "decoder_attention_mask"

    @contextmanager
    def recording(self, names: Sequence[str]) -> Iterator[dict[str, torch.Tensor]]:
        """Within, a forward pass of the dense model leaves here, by site, what its norm divides by (..., tokens)."""
        found: dict[str, torch.Tensor] = {}

        def keep(name: str, args: Any) -> None:
            stream = args[0].float()
            if self.family == "bert":
                stream = stream - stream.mean(-1, keepdim=True)
            found[name] = (stream.square().mean(-1) + 1e-12).sqrt()

        def hook(name: str) -> Any:
            return lambda _module, args: keep(name, args)

        handles = [self.sites[name].norm.register_forward_pre_hook(hook(name)) for name in names]
        try:
            yield found
        finally:
            for handle in handles:
                handle.remove()

    # --- directions ----------------------------------------------------------------------------------------------

    def fisher(self, name: str) -> torch.Tensor | None:
        """Gamma (D, D) for an error of the sum before norm `name`, in units of its normalised stream.

        In a BERT that is the site's own Gamma. In a T5 the error stays in the stream, and every later norm of the
        stack sees it, smaller as the stream grows: the sum over them. None without gradients.
        """
        if self.stats.sites[name].fisher_sum is None:
            return None
        if self.family == "bert":
            return self.stats.sites[name].fisher.to(self.device)
        total = torch.zeros(self.full, self.full, dtype=torch.float64)
        for later in self._later(name):
            total += self.stats.sites[later].fisher * (self._squares[name] / self._squares[later])
        return total.to(self.device)

    def _later(self, name: str) -> list[str]:
        names = [other for other in self._squares if self.sites[other].stack == self.sites[name].stack]
        return names[names.index(name) :]

    def matrix(self, name: str) -> torch.Tensor:
        """Gamma with a floor, divided by its mean eigenvalue; the identity without gradients."""
        identity = torch.eye(self.full, dtype=torch.float64, device=self.device)
        fisher = self.fisher(name)
        mean = 0.0 if fisher is None else float(fisher.trace()) / self.full
        return identity if fisher is None or mean <= 0.0 else fisher / mean + FLOOR * identity

    def unit(self, name: str) -> float:
        """Mean eigenvalue of the site's own Gamma, for a metric with a floor; 1 without gradients."""
        site = self.stats.sites[name]
        return 1.0 if site.fisher_sum is None else float(site.fisher.trace()) / self.full / (1.0 + FLOOR)

    def root(self, name: str) -> torch.Tensor:
        """Square root (D, D) of Gamma with a floor, in its own units: losses in nats."""
        fisher = self.fisher(name)
        scale = 1.0 if fisher is None else float(fisher.trace()) / self.full / (1.0 + FLOOR)
        return symmetric_root(scale * self.matrix(name))

    def query(self, name: str, heads: int, size: int) -> torch.Tensor:
        """Second moment (H, d, d) of the gradient of each head's query, with a floor; `name`: where it writes."""
        site = self.stats.sites[name]
        identity = torch.eye(size, dtype=torch.float64, device=self.device)
        if site.query_fisher_sum is None:
            return identity.expand(heads, size, size)
        gradient = site.query_fisher_sum.to(self.device) / site.tokens
        floor = FLOOR * gradient.diagonal(dim1=1, dim2=2).mean(-1)[:, None, None]
        return (gradient + floor * identity) / (1.0 + FLOOR)

    # --- tokens --------------------------------------------------------------------------------------------------

    def token_weights(self, name: str, mask: torch.Tensor) -> torch.Tensor:
        """Weights (tokens,) of the real tokens of a batch, mask (batch, length)."""
        weights = torch.ones(mask.shape, device=mask.device)
        if name in self._idle:
            weights[:, 1:] = IDLE_WEIGHT
        return weights[mask.bool()]

    def coherence(self, name: str) -> float:
        """See `SiteStatistics.coherence`; of the later sites' mean, by their weight, in a T5."""
        if self.segment_tokens < 2:
            return 0.0  # single tokens: nothing to add up
        if self.family == "bert":
            return self.stats.sites[name].coherence
        later = [self.stats.sites[other] for other in self._later(name)]
        weights = [0.0 if site.fisher_sum is None else float(site.fisher_sum.trace()) for site in later]
        total = sum(weights)
        return sum(w * site.coherence for w, site in zip(weights, later, strict=True)) / total if total > 0 else 0.0

    def segments(self, lengths: Sequence[int]) -> Segments | None:
        """Sequences of these lengths, one after the other, cut into pieces of about `segment_tokens` tokens."""
        return Segments.of(lengths, self.segment_tokens, self.device) if self.segment_tokens >= 2 else None
