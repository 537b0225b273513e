"""Sentence embeddings of dense and compressed encoders, and retrieval with them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from ..calibration.objectives import first_tokens
from ..errors import TCSPError
from ..tasks.inputs import input_length, right_padding


def encoder_below(model: Any) -> Any:
    """The model without its head, as `embed` takes it.

    Raises:
        TCSPError: it has a decoder.
    """
    body = model.base_model
    if body.config.is_encoder_decoder:
        raise TCSPError(
            f"{type(model).__name__} is no sentence encoder, it has a decoder: give an encoder alone (T5EncoderModel)."
        )
    return body


@torch.no_grad()
def embed(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    batch_size: int = 32,
    max_length: int = 256,
    pooling: str = "mean",
    progress: bool | None = False,
    description: str = "embed",
) -> torch.Tensor:
    """Pooled (`"mean"`, or `"cls"`: the first token), L2-normalised embeddings (texts, D) in the dense model's space.

    A compressed model's pooled output is mapped back with `model.lift`: once per text, after pooling (the map is
    affine, and so is the mean). Longer texts than the model has positions for are cut, whatever `max_length` is.
    """
    tokenizer, max_length = right_padding(tokenizer), input_length(model, max_length)
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    found: list[torch.Tensor | None] = [None] * len(texts)
    bar = tqdm(total=len(texts), unit="text", desc=description, disable=None if progress is None else not progress)
    with bar:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = tokenizer(
                [texts[i] for i in chosen],
                padding=True,
                truncation=True,
                max_length=max_length,
                return_tensors="pt",
            ).to(model.device)
            hidden = model(**batch).last_hidden_state
            if pooling == "cls":
                pooled = first_tokens(hidden, batch["attention_mask"])
            else:
                weights = batch["attention_mask"].to(hidden).unsqueeze(-1)
                pooled = (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)
            if hasattr(model, "lift"):
                pooled = model.lift(pooled)
            for i, row in zip(chosen, nn.functional.normalize(pooled.float(), dim=-1).cpu(), strict=True):
                found[i] = row
            bar.update(len(chosen))
    return torch.stack([row for row in found if row is not None])


def recall_at(
    queries: torch.Tensor, documents: torch.Tensor, answers: Sequence[int], ranks: Sequence[int]
) -> list[float]:
    """Share of queries (q, D) whose document is among the `rank` nearest of documents (d, D) by inner product."""
    scores = queries @ documents.T
    wanted = scores.gather(1, torch.tensor(answers).unsqueeze(1))
    position = (~(scores < wanted)).sum(1) - 1  # what is as near as the document, or not a number, counts before it
    return [float((position < rank).float().mean()) for rank in ranks]
