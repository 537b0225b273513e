"""Which pooling an encoder was made for, where its folder or repository says so."""

import json
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

POOLINGS = ("mean", "cls", "pooler")


def declared_pooling(name: str) -> str | None:
    """What sentence-transformers' files beside a model name: `"cls"` for the first token alone, else `"mean"`.

    None where there are no such files, or they cannot be read or reached.

    Args:
        name: a folder, or a name on the Hub.
    """
    modules = _read(name, "modules.json")
    for module in modules if isinstance(modules, list) else []:
        if isinstance(module, dict) and str(module.get("type", "")).rpartition(".")[2] == "Pooling":
            folder = module.get("path")
            if not isinstance(folder, str) or Path(folder).name != folder:
                return None  # files elsewhere are not read
            settings = _read(name, str(Path(folder, "config.json")))
            return None if not isinstance(settings, dict) else "cls" if _modes(settings) == ["cls"] else "mean"
    return None


def pooling_of_model(model: Any, pooling: str | None) -> str:
    """`pooling`, or, where it is None, what the files beside the model's checkpoint name, else the mean."""
    name = str(getattr(model.config, "_name_or_path", "") or "")
    return pooling or (declared_pooling(name) if name else None) or "mean"


def _modes(settings: dict[str, Any]) -> list[str]:
    """The pooling modes, as sentence-transformers 6 writes them (a name or names) or earlier ones (a flag each)."""
    mode = settings.get("pooling_mode")
    if mode is not None:
        return [mode] if isinstance(mode, str) else list(mode) if isinstance(mode, list) else []
    flags = [key.removeprefix("pooling_mode_") for key, value in settings.items() if value is True]
    return ["cls" if flag == "cls_token" else flag for flag in flags if flag != "include_prompt"]


def _read(name: str, file: str) -> Any:
    try:
        place = cached_file(
            name,
            file,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        return None if place is None else json.loads(Path(place).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
