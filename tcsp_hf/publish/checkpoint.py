"""Reads a compressed checkpoint from its folder without loading its weights, and says whether it is complete."""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from .. import modeling_tcsp_bert, modeling_tcsp_t5
from ..configuration_tcsp import TCSPConfig
from ..configuration_tcsp_bert import TCSPBertConfig
from ..errors import TCSPError

_SAVE_AGAIN = "save it again with model.save_pretrained(folder)"
_LONGEST_NAME = 128
_FLOATS = ("F64", "F32", "F16", "BF16")
_RELATIVE_IMPORT = re.compile(r"^\s*from\s+\.(\w+)\s+import", re.MULTILINE)


@dataclass(frozen=True)
class Checkpoint:
    """A complete compressed checkpoint.

    Attributes:
        folder: where it lies.
        config: its configuration, validated.
        model: the model on the meta device: every shape, no weights.
        bytes: size of the weight files.
    """

    folder: Path
    config: Any
    model: PreTrainedModel
    bytes: int

    @property
    def class_name(self) -> str:
        return type(self.model).__name__

    @property
    def head(self) -> str:
        """`"Model"`, `"ForMaskedLM"`, ...: the class name without its family."""
        return re.sub(r"^TCSP(Bert|T5)", "", self.class_name)

    @property
    def auto_class(self) -> str:
        """The Auto class of the task."""
        return getattr(type(self.model), "_auto_class", None) or "AutoModel"

    @property
    def has_tokenizer(self) -> bool:
        return (self.folder / "tokenizer_config.json").is_file()


def read_checkpoint(folder: str | os.PathLike[str]) -> Checkpoint:
    """Read the configuration and the headers of the weights.

    Raises:
        TCSPError: the folder is no compressed checkpoint, or something is missing or damaged: a weight, a shard, a
            code file, an entry of `auto_map`. The message names it and the remedy.
    """
    path = Path(folder)
    if not path.is_dir():
        raise TCSPError(f"{path} is not a folder: name the folder that model.save_pretrained wrote.")
    if not (path / "config.json").is_file():
        raise TCSPError(f"{path} has no config.json, so it is no checkpoint: {_SAVE_AGAIN}.")
    try:
        config = TCSPConfig.from_pretrained(path)
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise TCSPError(f"{path} is no compressed checkpoint: {error}") from error
    model_class = _model_class(path, config)
    _check_code(path, config, model_class)
    shapes, size = _weights(path)
    model = _on_meta(model_class, config, shapes)
    _check_weights(path, model, shapes)
    return Checkpoint(path, config, model, size)


def _model_class(path: Path, config: TCSPConfig) -> Any:
    module = modeling_tcsp_bert if isinstance(config, TCSPBertConfig) else modeling_tcsp_t5
    names = config.architectures or []
    known = [name for name in getattr(module, "__all__", []) if not name.endswith("PreTrainedModel")]
    if len(names) != 1 or names[0] not in known:
        allowed = ", ".join(known)
        raise TCSPError(f"{path / 'config.json'} has architectures={names!r}; allowed: {allowed}; {_SAVE_AGAIN}.")
    return getattr(module, names[0])


def _check_code(path: Path, config: Any, model_class: Any) -> None:
    """The whole `auto_map`, and every file that it names or that such a file imports."""
    found, expected = getattr(config, "auto_map", None) or {}, model_class.auto_map
    missing = sorted(set(expected) - set(found))
    if missing:
        raise TCSPError(f"{path / 'config.json'} has no auto_map entry for {missing[0]}: {_SAVE_AGAIN}.")
    waiting = sorted({str(target).split(".")[0] for target in found.values()})
    seen: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        if not name.isidentifier() or len(name) > _LONGEST_NAME:
            raise TCSPError(
                f"{path / 'config.json'} names {name[:80]!r} in auto_map, which is no module: {_SAVE_AGAIN}."
            )
        file = path / f"{name}.py"
        if not file.is_file():
            raise TCSPError(f"{path} lacks {file.name}, which trust_remote_code=True needs: {_SAVE_AGAIN}.")
        waiting += _RELATIVE_IMPORT.findall(file.read_text(encoding="utf-8"))


def weight_files(path: Path) -> list[str]:
    """Names of the weight files: `model.safetensors`, or the shards and their index.

    Raises:
        TCSPError: there are none, or the index is damaged or names a file outside the folder.
    """
    index = path / SAFE_WEIGHTS_INDEX_NAME
    if (path / SAFE_WEIGHTS_NAME).is_file():
        return [SAFE_WEIGHTS_NAME]
    if not index.is_file():
        raise TCSPError(f"{path} has neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME}: {_SAVE_AGAIN}.")
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise TCSPError(f"{index} is damaged ({error}): {_SAVE_AGAIN}.") from error
    for name in names:
        plain = isinstance(name, str) and Path(name).name == name and len(name) <= _LONGEST_NAME and name.isprintable()
        if not plain or not (path / name).is_file():
            raise TCSPError(f"{index} names the shard {str(name)[:80]!r}, which is not in the folder: {_SAVE_AGAIN}.")
    return [*names, SAFE_WEIGHTS_INDEX_NAME]


def _weights(path: Path) -> tuple[dict[str, tuple[int, ...]], int]:
    """Shape of every stored tensor, and the bytes of all weight files."""
    shapes: dict[str, tuple[int, ...]] = {}
    names = [name for name in weight_files(path) if name != SAFE_WEIGHTS_INDEX_NAME]
    for name in names:
        try:
            with safe_open(path / name, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 - not a dict
                    found = file.get_slice(key)
                    if found.get_dtype() not in _FLOATS:
                        raise TCSPError(f"{key} in {path / name} holds {found.get_dtype()}; {_SAVE_AGAIN}.")
                    shapes[key] = tuple(found.get_shape())
        except (SafetensorError, OSError) as error:
            raise TCSPError(f"{path / name} is damaged ({error}): {_SAVE_AGAIN}.") from error
    return shapes, sum((path / name).stat().st_size for name in names)


def _on_meta(model_class: Any, config: TCSPConfig, shapes: dict[str, tuple[int, ...]]) -> PreTrainedModel:
    bare = model_class.__name__ == "TCSPBertModel" and not any(name.startswith("pooler.") for name in shapes)
    try:
        with torch.device("meta"):
            model: PreTrainedModel = model_class(config, **({"add_pooling_layer": False} if bare else {}))
    except ValueError as error:  # what only models check
        raise TCSPError(f"The configuration fits no model: {error}") from error
    model.tie_weights()
    return model


def _check_weights(path: Path, model: PreTrainedModel, shapes: dict[str, tuple[int, ...]]) -> None:
    """Every tensor is stored, under one of its names if it is tied, with the right shape."""
    names: dict[int, list[str]] = {}
    wanted = model.state_dict(keep_vars=True)
    for name, tensor in wanted.items():
        names.setdefault(id(tensor), []).append(name)
    for tied in names.values():
        if not any(name in shapes for name in tied):
            raise TCSPError(f"The weights in {path} lack {tied[0]}: the checkpoint was cut short, {_SAVE_AGAIN}.")
    for name, tensor in wanted.items():
        if name in shapes and shapes[name] != tuple(tensor.shape):
            raise TCSPError(
                f"{name} in {path} has the shape {shapes[name]}, but the configuration says {tuple(tensor.shape)}: "
                f"{_SAVE_AGAIN}."
            )
