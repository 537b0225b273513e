"""A compressed encoder as a sentence-transformers folder (extra `[sentence-transformers]`).

The modules are: the compressed encoder, the source's pooling over its k entries, a linear module with the weights of
`model.lift`, and whatever followed the pooling in the source. Pooling by weights that sum to one commutes with an
affine map, so lifting once per text equals pooling lifted states, and embeddings stay in the dense model's space:
indexes made by the dense model stay valid.
"""

import json
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import cached_file

from ..architectures import family_of
from ..errors import TCSPError
from ..loading import load_tokenizer, resolve_name

_AFFINE = ("cls", "mean", "weightedmean", "lasttoken")
"""Poolings that commute with the lift; not so a maximum, nor a sum divided by the root of the length."""
_PLAIN = ("mean", "cls")
"""Those that `calibrate` knows, too."""
_RERANKER_FILES = ("config_sentence_transformers.json", "modules.json", "sentence_bert_config.json")
logger = logging.getLogger("tcsp_hf")


def require_sentence_transformers() -> Any:
    """The library.

    Raises:
        TCSPError: it is not installed; the message names the extra.
    """
    try:
        import sentence_transformers
    except ImportError as error:
        raise TCSPError("This needs sentence-transformers: pip install 'tcsp_hf[sentence-transformers]'.") from error
    return sentence_transformers


def load_source(name: str | os.PathLike[str]) -> Any | None:
    """The SentenceTransformer of a folder or of a name on the Hub; None if that is a plain encoder.

    Raises:
        TCSPError: sentence-transformers is missing, or its pooling does not commute with the lift.
    """
    library = require_sentence_transformers()
    path = resolve_name(str(name))
    found = cached_file(path, "modules.json", _raise_exceptions_for_missing_entries=False)
    if found is None:
        return None
    source = library.SentenceTransformer(path, device="cpu")
    _check_modules(source)
    return source


def _lowers(source: Any | None) -> bool:
    """Whether a source lowers its texts, whatever the tokenizer in its folder does."""
    return source is not None and bool(getattr(source[0], "do_lower_case", False))


def tokenizer_of(source: Any | None, name: str) -> Any:
    """The tokenizer in a model's folder, as the source reads its texts with it.

    Raises:
        TCSPError: see `load_tokenizer`.
    """
    return source.tokenizer if source is not None and _lowers(source) else load_tokenizer(name)


def _check_modules(source: Any) -> tuple[str, ...]:
    """The pooling modes of a source that is an encoder and then a pooling.

    Raises:
        TCSPError: it is built otherwise, or pools by what does not commute with an affine map.
    """
    names = [type(module).__name__ for module in source]
    if names[:2] != ["Transformer", "Pooling"]:
        raise TCSPError(f"The modules of the SentenceTransformer are {names}; needed: Transformer, Pooling, ...")
    mode = source[1].pooling_mode
    modes = (mode,) if isinstance(mode, str) else tuple(mode)
    wrong = [mode for mode in modes if mode not in _AFFINE]
    if wrong:
        raise TCSPError(
            f"The pooling mode is {wrong[0]!r}, which does not commute with the lift to the dense space; possible: "
            f"{', '.join(_AFFINE)}."
        )
    return modes


def require_encoder(dense: PreTrainedModel) -> None:
    """Before the long work of compressing it.

    Raises:
        TCSPError: the dense model is no encoder without a head.
    """
    family, head = family_of(dense)
    if head not in ("EncoderModel", "Model") or (family, head) == ("t5", "Model"):
        raise TCSPError(
            f"{type(dense).__name__} has a head or a decoder: sentence embeddings need a BertModel or a "
            "T5EncoderModel. (A reranker is a sequence classifier: compress it without --sentence-transformer.)"
        )


def check_pooling(pooling: str, source: Any | None) -> None:
    """Before the long work of compressing the model.

    Raises:
        TCSPError: a plain encoder (`source` is None) would be written with another pooling than mean and cls.
    """
    if source is None and pooling not in _PLAIN:
        raise TCSPError(
            f"pooling is {pooling!r}; a plain encoder becomes a sentence-transformers folder with one of "
            f"{', '.join(_PLAIN)}."
        )


def to_sentence_transformer(
    model: PreTrainedModel, tokenizer: Any, source: Any | None = None, pooling: str = "mean"
) -> Any:
    """A `sentence_transformers.SentenceTransformer` around a compressed encoder, with embeddings in the dense space.

    Args:
        model: a compressed encoder without a head (`TCSPBertModel`, `TCSPT5EncoderModel`).
        tokenizer: its tokenizer.
        source: the dense model's SentenceTransformer, whose pooling, later modules, prompts and maximal length are
            taken over; None for `pooling` and normalisation. It is left untouched.
        pooling: `"mean"` or `"cls"`, of a model without a source.

    Returns:
        The model on the CPU; `save_pretrained(folder)` writes it.

    Raises:
        TCSPError: sentence-transformers is missing, or the model or the source's pooling does not fit.
    """
    library = require_sentence_transformers()
    from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer

    if type(model).__name__ not in ("TCSPBertModel", "TCSPT5EncoderModel"):
        raise TCSPError(
            f"{type(model).__name__} is no compressed encoder without a head: sentence embeddings need a "
            "TCSPBertModel or a TCSPT5EncoderModel."
        )
    check_pooling(pooling, source)
    modes = (pooling,) if source is None else _check_modules(source)
    with tempfile.TemporaryDirectory() as folder:  # the library builds its first module from a folder
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        encoder = Transformer(folder, do_lower_case=_lowers(source))
    size = int(model.config.hidden_size)
    include_prompt = True if source is None else source[1].include_prompt
    pooling = Pooling(size, modes[0] if len(modes) == 1 else modes, include_prompt=include_prompt)
    rest = [Normalize()] if source is None else list(source)[2:]
    made = library.SentenceTransformer(
        modules=[encoder, pooling, _lift(model, len(modes), Dense), *rest],
        device="cpu",
        **({} if source is None else _settings(source)),
    )
    if source is not None and source.max_seq_length is not None:
        made.max_seq_length = source.max_seq_length
    return made.eval()


def _lift(model: Any, copies: int, dense: Any) -> nn.Module:
    """A linear module from `copies` pooled vectors side by side to as many in the dense space."""
    lift = model.lift
    with torch.no_grad():
        size = int(model.config.hidden_size)
        bias = lift(torch.zeros(1, size, dtype=model.dtype, device=model.device))[0]
        weight = (lift(torch.eye(size, dtype=model.dtype, device=model.device)) - bias).T
        weight = torch.block_diag(*[weight] * copies).float().cpu().contiguous()
        bias = bias.repeat(copies).float().cpu()
    return dense(*weight.shape[::-1], activation_function=nn.Identity(), init_weight=weight, init_bias=bias)


def reranker_settings(name: str) -> dict[str, str]:
    """What sentence-transformers 6 reads beside a reranker (file name -> text), so that a compressed one scores alike.

    The files say which function follows the logits, and the prompts; before version 6 config.json said it. Empty for
    any other model, and (with a warning) where they name code of somebody else's: loading a compressed model with
    `trust_remote_code=True` would trust that as well.

    Args:
        name: folder or Hub name of the model.

    Raises:
        TCSPError: a file cannot be read.
    """
    path, found = resolve_name(name), {}
    for file in _RERANKER_FILES:
        place = cached_file(path, file, _raise_exceptions_for_missing_entries=False)
        if place is None:
            return {}
        found[file] = Path(place).read_text(encoding="utf-8")
    settings, parts = (_parsed(found[file], name) for file in _RERANKER_FILES[:2])
    if not isinstance(settings, dict) or settings.get("model_type") != "CrossEncoder":
        return {}
    named = [part.get("type") if isinstance(part, dict) else part for part in parts]
    foreign = [kind for kind in named if not str(kind).startswith("sentence_transformers.")]
    function = settings.get("activation_fn")
    if function is not None and not str(function).startswith("torch."):
        foreign.append(function)
    if foreign:
        logger.warning("%s is a reranker with code of its own (%s): its settings are not taken over.", name, foreign[0])
        return {}
    return found


def _parsed(text: str, name: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise TCSPError(f"What sentence-transformers reads beside {name!r} is damaged: {error}") from error


def _settings(source: Any) -> dict[str, Any]:
    names = ("prompts", "default_prompt_name", "similarity_fn_name", "truncate_dim")
    return {name: getattr(source, name) for name in names if getattr(source, name, None) is not None}


def save_sentence_transformer(
    model: PreTrainedModel,
    tokenizer: Any,
    source: Any | None,
    folder: str | os.PathLike[str],
    pooling: str = "mean",
) -> None:
    """Write `to_sentence_transformer` into a folder that `SentenceTransformer(folder)` loads.

    Raises:
        TCSPError: see `to_sentence_transformer`.
    """
    made = to_sentence_transformer(model, tokenizer, source, pooling)
    made.save_pretrained(str(Path(folder)), create_model_card=False)
