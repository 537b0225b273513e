"""`calibrate`: one streaming pass over text that keeps two D x D sums per site and nothing else."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..architectures import Block, Site, blocks_of, dense_hidden_size, family_of, sites_of
from ..errors import TCSPError
from .fingerprint import DataFingerprint, model_fingerprint, sequence_hash
from .inputs import Batch, InputOptions, batches, count_sequences
from .objectives import Draws, objective_of
from .sample import NAMES, TokenSample
from .statistics import Calibration, SiteStatistics

_PANEL = 128
_HALF_LOSS_SCALE = 1024.0  # keeps float16 gradients away from underflow; divided out again
_MASKED_FRACTION = 0.15


def calibrate(
    model: PreTrainedModel,
    data: Any,
    *,
    tokenizer: Any = None,
    batch_size: int = 32,
    max_length: int | None = None,
    max_sequences: int | None = None,
    text_columns: str | tuple[str, ...] | None = None,
    fisher: bool = True,
    pooling: str = "mean",
    max_target_length: int = 32,
    sample_tokens: int = 65_536,
    seed: int = 0,
    progress: bool | None = None,
) -> Calibration:
    """Collect the second moments of a dense model's hidden states, and of their gradients, without labels.

    One forward (and, with `fisher`, one backward) pass. Memory does not grow with the amount of data.

    Args:
        model: a dense BERT, T5 or mT5 model with any supported head. It is left as it was.
        data: `list[str]` (or pairs of strings), a `datasets.Dataset` or `IterableDataset` with text columns or
            `input_ids`, or a `DataLoader` of batches. Class labels are never read. For sequence-to-sequence language
            models the second text of a pair (or `labels`) is the decoder's input; without one the model's own greedy
            output is.
        tokenizer: the model's; needed for texts.
        batch_size: sequences per forward pass.
        max_length: tokens per sequence; the model's own limit (512 for T5) when None.
        max_sequences: stop after so many sequences.
        text_columns: one or two column names; found by name when None.
        fisher: also collect Gamma, the second moment of the gradients; `subspace="balanced"` needs it.
        pooling: for models without a head: `"mean"`, `"cls"` or `"pooler"`.
        max_target_length: longest decoder input, in tokens.
        sample_tokens: keep a sample of the token sequences of at most this many tokens beside the statistics: the
            refit of `compress` reads it. 0 keeps none (nothing of the text is stored then).
        seed: of the outputs that are drawn from the model's own distribution.
        progress: show a bar; None shows it on a terminal only.

    Returns:
        The statistics, on the CPU, in float64.

    Raises:
        TCSPError: an unsupported model, empty or unusable data, or a NaN or infinity in the hidden states.
    """
    family, head = family_of(model)
    for name, value in (
        ("batch_size", batch_size),
        ("max_sequences", max_sequences),
        ("max_length", max_length),
    ):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise TCSPError(f"{name} is {value!r}; it must be a positive integer.")
    name, objective = objective_of(model, pooling)
    if isinstance(text_columns, str):
        text_columns = (text_columns,)
    config = model.config
    limit = config.max_position_embeddings if family == "bert" else 512
    options = InputOptions(
        tokenizer=tokenizer,
        batch_size=batch_size,
        max_length=limit if max_length is None else min(max_length, limit) if family == "bert" else max_length,
        max_sequences=max_sequences,
        text_columns=text_columns,
        max_target_length=max_target_length,
        targets=family == "t5" and head == "ForConditionalGeneration",
        pad_token_id=config.pad_token_id or 0,
        vocab_size=config.vocab_size,
    )
    result = Calibration(
        model_fingerprint=model_fingerprint(model),
        source_model=str(getattr(config, "_name_or_path", "") or type(model).__name__),
        model_type=config.model_type,
        hidden_size=dense_hidden_size(model),
        objective=name if fisher else "none",
        seed=seed,
    )
    recorder = _Recorder(sites_of(model), result.hidden_size, fisher, blocks_of(model))
    fingerprint = DataFingerprint()
    sample = TokenSample(sample_tokens)
    mask_token = getattr(tokenizer, "mask_token_id", None) if name in ("masked_lm", "pretraining") else None
    scale = _HALF_LOSS_SCALE if model.dtype == torch.float16 else 1.0
    bar = tqdm(
        total=count_sequences(data, max_sequences),
        unit="seq",
        desc="calibrate",
        disable=None if progress is None else not progress,
    )
    with _ready(model), recorder.attached(model), bar:
        for batch in batches(data, options):
            keys = _sequence_keys(batch, seed)
            draws = Draws(keys)
            inputs = _prepare(model, head, batch, draws, mask_token, max_target_length)
            extra = {key: inputs.pop(key) for key in ("masked_positions",) if key in inputs}
            recorder.start(inputs, scale)
            with torch.set_grad_enabled(fisher):
                outputs = model(**inputs)
                if fisher:
                    likelihood = objective(model, outputs, {**inputs, **extra}, draws)
                    if likelihood.requires_grad:
                        (likelihood * scale).backward()
            recorder.stop()
            for key in keys:
                fingerprint.add(key)
            for rows in _rows(inputs):
                sample.add(sequence_hash(rows["input_ids"], seed), rows)
            result.sequences += len(keys)
            bar.update(len(keys))
    if result.sequences == 0:
        raise TCSPError("The calibration data is empty: give at least one sequence.")
    result.data_fingerprint = str(fingerprint)
    result.sites = recorder.statistics()
    result.sample = sample
    return result


@contextmanager
def _ready(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode without parameter gradients; everything is put back afterwards."""
    training = [module for module in model.modules() if module.training]
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval()
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)
        for module in training:
            module.training = True


def _sequence_keys(batch: Batch, seed: int) -> list[int]:
    """One number per sequence, from its real tokens and the seed alone."""
    ids = batch["input_ids"]
    mask = batch.get("attention_mask")
    keep = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    return [sequence_hash(row[kept].tolist(), seed) for row, kept in zip(ids, keep, strict=True)]


def _rows(inputs: Batch) -> list[dict[str, list[int]]]:
    """The real tokens of every sequence of a batch; the choices of a multiple-choice question are sequences."""
    flat = {name: value.reshape(-1, value.shape[-1]).cpu() for name, value in inputs.items() if value.dim() > 1}
    rows: list[dict[str, list[int]]] = [{} for _ in flat["input_ids"]]
    for name in NAMES:
        if name in flat:
            mask = flat["decoder_attention_mask" if name.startswith("decoder") else "attention_mask"].bool()
            for row, values, kept in zip(rows, flat[name], mask, strict=True):
                row[name] = values[kept].tolist()
    return rows


def _prepare(
    model: Any,
    head: str,
    batch: Batch,
    draws: Draws,
    mask_token: int | None,
    max_target_length: int,
) -> Batch:
    """Inputs on the model's device, with masks filled in, decoder inputs made, and tokens masked for MLM heads."""
    device = model.get_input_embeddings().weight.device
    inputs = {name: value.to(device) for name, value in batch.items()}
    inputs.setdefault("attention_mask", torch.ones_like(inputs["input_ids"]))
    if mask_token is not None:
        chosen = draws.uniform(inputs["input_ids"].shape[1]).to(device) < _MASKED_FRACTION
        chosen &= inputs["attention_mask"].bool()
        inputs["input_ids"] = inputs["input_ids"].masked_fill(chosen, mask_token)
        inputs["masked_positions"] = chosen
    if model.config.is_encoder_decoder:
        _add_decoder_inputs(model, head, inputs, max_target_length)
    inputs.pop("labels", None)
    return inputs


def _add_decoder_inputs(model: PreTrainedModel, head: str, inputs: Batch, max_target_length: int) -> None:
    if "decoder_input_ids" in inputs:
        inputs.setdefault("decoder_attention_mask", torch.ones_like(inputs["decoder_input_ids"]))
        return
    start = model.config.decoder_start_token_id
    if start is None:
        start = model.config.pad_token_id or 0
    if head != "ForConditionalGeneration":
        # as these heads do themselves: the decoder reads its own encoder's input, shifted
        target, mask = inputs["input_ids"], inputs["attention_mask"]
    elif "labels" in inputs:
        mask = (inputs["labels"] != -100).long()
        target = inputs["labels"].masked_fill(mask == 0, model.config.pad_token_id or 0)
    else:
        target, mask = _greedy(model, inputs, max_target_length)
    first = torch.full_like(target[:, :1], start)
    inputs["decoder_input_ids"] = torch.cat([first, target[:, :-1]], dim=1)
    inputs["decoder_attention_mask"] = mask


def _greedy(model: Any, inputs: Batch, max_target_length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The model's own greedy output (batch, length) and the mask of its real tokens, the end token included."""
    with torch.no_grad():
        generated = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=max_target_length,
            do_sample=False,
            num_beams=1,
        )
    target = generated[:, 1:]
    ends = model.config.eos_token_id
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    ended = torch.isin(target, torch.tensor(ends, dtype=target.dtype, device=target.device)).long()
    mask = (ended.cumsum(1) - ended == 0).long()
    return target, mask


class _Recorder:
    """Hooks on the sites' norms: second moments going forward, gradients coming back."""

    def __init__(self, sites: list[Site], size: int, fisher: bool, blocks: list[Block]) -> None:
        self._sites = sites
        self._size = size
        self._fisher = fisher
        self._moments: dict[str, torch.Tensor] = {}
        self._fishers: dict[str, torch.Tensor] = {}
        self._common = {site.name: 0.0 for site in sites}
        self._queries = [block for block in blocks if block.attends] if fisher else []
        self._query_fishers: dict[str, torch.Tensor] = {}
        self._tokens = {site.name: 0 for site in sites}
        self._masks: dict[str, torch.Tensor] = {}
        self._scale = 1.0
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

    def start(self, inputs: Batch, scale: float) -> None:
        length = inputs["attention_mask"].shape[-1]
        self._masks = {"encoder": inputs["attention_mask"].reshape(-1, length).bool()}
        if "decoder_attention_mask" in inputs:
            self._masks["decoder"] = inputs["decoder_attention_mask"].bool()
        self._scale = scale
        self._active = True

    def stop(self) -> None:
        self._active = False

    def statistics(self) -> dict[str, SiteStatistics]:
        found: dict[str, SiteStatistics] = {}
        for site in self._sites:
            tokens = self._tokens[site.name]
            if tokens == 0:
                raise TCSPError(f"No token passed the site {site.name!r}: the calibration data holds only padding.")
            fisher = None
            if self._fisher:
                empty = torch.zeros(self._size, self._size, dtype=torch.float64)
                fisher = _symmetric(self._fishers.get(site.name, empty))
            query = self._query_fishers.get(site.name)
            found[site.name] = SiteStatistics(
                tokens,
                _symmetric(self._moments[site.name]),
                fisher,
                None if query is None else query.cpu(),
                torch.tensor(self._common[site.name], dtype=torch.float64) if self._fisher else None,
            )
        return found

    def _query_forward(
        self, block: Block, heads: int, module: nn.Module, args: tuple[Any, ...], output: torch.Tensor
    ) -> None:
        if self._active and output.requires_grad:
            output.register_hook(partial(self._query_backward, block, heads))

    def _query_backward(self, block: Block, heads: int, gradient: torch.Tensor) -> None:
        name = block.writes
        wide = (gradient.double() / self._scale)[self._masks[block.stack]]
        rows = wide.view(wide.shape[0], heads, wide.shape[1] // heads).transpose(0, 1)
        outer = rows.mT @ rows
        self._query_fishers[name] = self._query_fishers[name] + outer if name in self._query_fishers else outer

    def _root(self, output: torch.Tensor) -> torch.Tensor | None:
        if not (self._active and self._fisher):
            return None
        return output.detach().requires_grad_(True)

    def _forward(self, site: Site, module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
        if not self._active:
            return
        with torch.no_grad():
            stream = args[0].detach()
            rows = site.normalise(stream if stream.dtype == torch.float64 else stream.float())
            rows = rows[self._masks[site.stack]]
            self._tokens[site.name] += rows.shape[0]
            _add_outer(self._moments, site.name, rows, self._size)
        if self._fisher and output.requires_grad:
            output.register_hook(partial(self._backward, site, module))

    def _backward(self, site: Site, module: Any, gradient: torch.Tensor) -> None:
        wide = gradient if gradient.dtype == torch.float64 else gradient.float()
        weight = module.weight.detach()
        mask = self._masks[site.stack]
        scaled = wide * (weight.to(wide) / self._scale)
        _add_outer(self._fishers, site.name, scaled[mask], self._size)
        sums = (scaled * mask.unsqueeze(-1)).sum(1)
        lengths = mask.sum(1).clamp(min=1)
        self._common[site.name] += float((sums.double().square().sum(-1) / lengths).sum())


def _embeddings(model: PreTrainedModel) -> Iterator[nn.Module]:
    """The modules whose outputs are the roots of the graph."""
    yield model.get_input_embeddings()
    for stack in ("encoder", "decoder"):
        table = getattr(getattr(model.base_model, stack, None), "embed_tokens", None)
        if table is not None:
            yield table


def _add_outer(sums: dict[str, torch.Tensor], name: str, rows: torch.Tensor, size: int) -> None:
    """Add rows' rows (rows (tokens, D)) to the upper panels of a float64 sum.

    Raises:
        TCSPError: a NaN or an infinity among the rows; the message names the site.
    """
    if not torch.isfinite(rows.sum()):
        raise TCSPError(
            f"The hidden states or gradients at site {name!r} hold a NaN or an infinity: check the weights, or "
            "load the model in float32."
        )
    if rows.device.type == "mps":  # has no float64
        rows = rows.cpu()
    if name not in sums:
        sums[name] = torch.zeros(size, size, dtype=torch.float64, device=rows.device)
    wide = rows.double()
    for start in range(0, size, _PANEL):
        stop = min(start + _PANEL, size)
        sums[name][start:stop, start:].addmm_(wide[:, start:stop].T, wide[:, start:])


def _symmetric(upper: torch.Tensor) -> torch.Tensor:
    upper = torch.triu(upper.cpu())
    return upper + torch.triu(upper, 1).T
