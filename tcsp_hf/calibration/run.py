"""`calibrate`: one streaming pass over text that keeps two D x D sums per site and nothing else."""

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..architectures import Site, blocks_of, dense_hidden_size, family_of, sites_of, writing_options
from ..errors import TCSPError
from ..modes import check_device, check_gradients, evaluating, kept_settings, own_defaults
from ..offload import device_of, forgetting
from ..ranks import rank_and_size
from .checkpoint import Checkpoint
from .divergence import MASKED_FRACTION
from .fingerprint import DataFingerprint, model_fingerprint, sequence_hash
from .inputs import Batch, InputOptions, batches, count_sequences
from .objectives import Draws, objective_of
from .recorder import Recorder
from .sample import NAMES, TokenSample
from .statistics import Calibration

logger = logging.getLogger("tcsp_hf")

_HALF_LOSS_SCALE = 1024.0  # keeps float16 gradients away from underflow; divided out again


class NoData(TCSPError):
    """The data holds no sequence."""


@own_defaults()
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
    pooling: str | None = None,
    max_target_length: int = 32,
    sample_tokens: int = 65_536,
    seed: int = 0,
    progress: bool | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 64,
    sites: Sequence[str] | None = None,
) -> Calibration:
    """Collect the second moments of a dense model's hidden states, and of their gradients, without labels.

    One forward (and, with `fisher`, one backward) pass. Memory does not grow with the amount of data.

    Args:
        model: a dense BERT, T5 or mT5 model with any supported head. It is left as it was. Its weights may lie on
            "cpu" or "disk" (`device_map`): they are read when a layer's turn comes, and with `fisher` every layer
            runs twice, so that one batch's gradients do not hold them all.
        data: `list[str]` (or pairs of strings), a `datasets.Dataset` or `IterableDataset` with text columns or
            `input_ids`, or a `DataLoader` of batches. Class labels are never read. For sequence-to-sequence language
            models the second text of a pair (or `labels`) is the decoder's input; without one the model's own greedy
            output is.
        tokenizer: the model's; needed for texts.
        batch_size: sequences per forward pass.
        max_length: tokens per sequence; the model's own limit (512 for T5) when None.
        max_sequences: stop after so many sequences.
        text_columns: one or two column names; found by name when None (for a sequence-to-sequence language model only
            one, as which of two is the target is not known).
        fisher: also collect Gamma, the second moment of the gradients; `subspace="balanced"` needs it.
        pooling: for models without a head: `"mean"`, `"cls"` or `"pooler"`. None: what sentence-transformers' files
            beside the checkpoint name, where there are any; else the mean.
        max_target_length: longest decoder input, in tokens.
        sample_tokens: keep a sample of the token sequences of at most this many tokens beside the statistics: the
            refit of `compress` reads it. 0 keeps none (nothing of the text is stored then).
        seed: of the outputs that are drawn from the model's own distribution.
        progress: show a bar; None shows it on a terminal only.
        checkpoint: a folder where the sums are written as they grow. A run that was killed and is started again with
            the same model, data and arguments goes on from there, and gives what an uninterrupted one gives, to the
            last bit. The folder is left as it is at the end; another calibration needs another one.
        checkpoint_every: batches between two writes.
        sites: names of the sites to collect, or patterns as `"layer.0.*"`; all when None. For runs that share the
            memory of a wide model, or the inspection of a few sites: `Calibration.join` puts the runs together, and
            `compress` needs every site.

    Returns:
        The statistics, on the CPU, in float64.

    Raises:
        TCSPError: an unsupported model, empty or unusable data, a NaN or infinity in the hidden states, or a
            checkpoint of another model, of other data or arguments.
    """
    family, head = family_of(model)
    check_device(model)
    check_gradients(model)
    for name, value in (
        ("batch_size", batch_size),
        ("max_sequences", max_sequences),
        ("max_length", max_length),
        ("max_target_length", max_target_length),
        ("checkpoint_every", checkpoint_every),
    ):
        optional = name in ("max_sequences", "max_length")
        if not (value is None and optional) and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise TCSPError(f"{name} is {value!r}; it must be a positive integer.")
    for name, value in (("sample_tokens", sample_tokens), ("seed", seed)):
        if isinstance(value, bool) or not isinstance(value, int) or (name == "sample_tokens" and value < 0):
            raise TCSPError(f"{name} is {value!r}; it must be a whole number.")
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
        type_vocab_size=config.type_vocab_size if family == "bert" else None,
        position_count=config.max_position_embeddings if family == "bert" else None,
    )
    result = Calibration(
        model_fingerprint=model_fingerprint(model),
        source_model=_name_of(model),
        model_type=config.model_type,
        hidden_size=dense_hidden_size(model),
        objective=name if fisher else "none",
        seed=seed,
    )
    fingerprint = DataFingerprint()
    sample = TokenSample(sample_tokens)
    masked = name in ("masked_lm", "pretraining")
    mask_token = getattr(tokenizer, "mask_token_id", None) if masked else None
    if masked and mask_token is None:
        logger.warning(
            "No mask token is known, so this masked-LM head is calibrated on tokens that are not masked: pass the "
            "model's own tokenizer as tokenizer=."
        )
    scale = _HALF_LOSS_SCALE if model.dtype == torch.float16 else 1.0
    chosen = _chosen_sites(model, sites)
    recorder = Recorder(chosen, result.hidden_size, fisher, blocks_of(model), scale)
    saved: Checkpoint | None = None
    if checkpoint is not None:
        arguments = {
            "model_fingerprint": result.model_fingerprint,
            "dtype": str(model.dtype),
            "objective": result.objective,
            "seed": seed,
            "batch_size": batch_size,
            "max_length": options.max_length,
            "max_target_length": max_target_length,
            "mask_token": mask_token,
            "sample_tokens": sample_tokens,
        }
        if sites is not None:
            arguments["sites"] = [site.name for site in chosen]
        rank, ranks = rank_and_size()
        saved = Checkpoint(checkpoint, arguments, checkpoint_every, f"of-{ranks}-rank-{rank}")
        if saved.found.batches:
            recorder.restore(saved.found.record["tokens"], saved.found.tensors)
            result.sequences = int(saved.found.record["sequences"])
            fingerprint = DataFingerprint(saved.found.record["data_fingerprint"])
            sample = TokenSample.from_tensors(saved.found.tensors)
    bar = tqdm(
        total=count_sequences(data, max_sequences),
        unit="seq",
        desc="calibrate",
        disable=None if progress is None else not progress,
    )
    with _ready(model), kept_settings(tokenizer), recorder.attached(model), forgetting(model), bar:
        for batch in batches(data, options):
            if head == "ForMultipleChoice" and batch["input_ids"].dim() == 2:
                raise TCSPError(
                    "A multiple-choice model reads several texts together, but the data gives single ones: give a "
                    "DataLoader of batches whose input_ids are (batch, choices, length)."
                )
            if saved is not None and saved.is_done(batch):
                bar.update(batch["input_ids"].shape[:-1].numel())
                continue
            keys = _sequence_keys(batch, seed)
            draws = Draws(keys)
            inputs = _prepare(model, head, batch, draws, mask_token, max_target_length)
            extra = {key: inputs.pop(key) for key in ("masked_positions",) if key in inputs}
            recorder.start(inputs)
            no_cache = {"use_cache": False} if "decoder_input_ids" in inputs else {}  # nothing is generated
            with torch.set_grad_enabled(fisher):
                outputs = model(**inputs, **no_cache, return_dict=True)
                recorder.forward_is_over()
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
            if saved is not None and saved.is_due():
                tokens, sums = recorder.state()
                record = {"tokens": tokens, "sequences": result.sequences, "data_fingerprint": str(fingerprint)}
                saved.write(record, {**sums, **sample.tensors()})
    if saved is not None:
        saved.finish()
    if result.sequences == 0:
        raise NoData("The calibration data is empty or only padding: give at least one sequence.")
    result.data_fingerprint = str(fingerprint)
    result.sites = recorder.statistics()
    result.sample = sample
    return result


def _name_of(model: PreTrainedModel) -> str:
    """What it was loaded by; of a folder the whole path, which means the same from everywhere."""
    name = str(getattr(model.config, "_name_or_path", "") or type(model).__name__)
    return os.path.abspath(name) if os.path.isdir(name) else name


def _chosen_sites(model: PreTrainedModel, patterns: Sequence[str] | None) -> list[Site]:
    """Sites whose names fit any of the patterns.

    Raises:
        TCSPError: a pattern that fits no site.
    """
    every = sites_of(model)
    if patterns is None:
        return every
    wanted = [patterns] if isinstance(patterns, str) else list(patterns)
    for pattern in wanted or [""]:
        if not any(fnmatchcase(site.name, pattern) for site in every):
            raise TCSPError(f"sites names {pattern!r}, which fits none of {', '.join(site.name for site in every)}.")
    return [site for site in every if any(fnmatchcase(site.name, pattern) for pattern in wanted)]


@contextmanager
def _ready(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode without parameter gradients; everything is put back afterwards."""
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        with evaluating(model):
            yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)


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
    device = device_of(model)
    # (a batch made in inference mode cannot be kept for the backward pass)
    inputs = {name: (value.clone() if value.is_inference() else value).to(device) for name, value in batch.items()}
    inputs.setdefault("attention_mask", torch.ones_like(inputs["input_ids"]))
    if mask_token is not None:
        chosen = draws.uniform(inputs["input_ids"].shape[1]).to(device) < MASKED_FRACTION
        chosen &= inputs["attention_mask"].bool()
        inputs["input_ids"] = inputs["input_ids"].masked_fill(chosen, mask_token)
        inputs["masked_positions"] = chosen
    if model.config.is_encoder_decoder:
        _add_decoder_inputs(model, head, inputs, max_target_length)
    inputs.pop("labels", None)
    return inputs


def _add_decoder_inputs(model: PreTrainedModel, head: str, inputs: Batch, max_target_length: int) -> None:
    if "decoder_input_ids" in inputs:
        if "decoder_attention_mask" not in inputs:
            inputs["decoder_attention_mask"] = _decoder_mask(inputs, model.config.pad_token_id or 0)
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


def _decoder_mask(inputs: Batch, pad: int) -> torch.Tensor:
    """Mask (batch, length) of the real decoder inputs: those that have a label; without labels, all but the pads at the
    end (the first one may be a pad that starts the output)."""
    ids, labels = inputs["decoder_input_ids"], inputs.get("labels")
    if labels is not None and labels.shape == ids.shape:
        return (labels != -100).long()
    real = (ids != pad).long()
    real[:, 0] = 1
    return (real.flip(1).cumsum(1).flip(1) > 0).long()


def _greedy(model: Any, inputs: Batch, max_target_length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The model's own greedy output (batch, length) and the mask of its real tokens, the end token included."""
    with torch.no_grad():
        generated = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=max_target_length,
            do_sample=False,
            num_beams=1,
            num_return_sequences=1,
            return_dict_in_generate=False,
            **writing_options(model),
        )
    target = generated[:, 1:]
    ends = model.generation_config.eos_token_id  # where `generate` ends
    ends = model.config.eos_token_id if ends is None else ends
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    ended = torch.isin(target, torch.tensor(ends, dtype=target.dtype, device=target.device)).long()
    mask = (ended.cumsum(1) - ended == 0).long()
    return target, mask
