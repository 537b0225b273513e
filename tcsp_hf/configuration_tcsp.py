# Copyright 2026 The tcsp_hf developers. Licensed under the Apache License, Version 2.0.
"""`TCSPConfig`: what every compressed model's configuration has in common.

It carries the *projection* (where the model comes from, which subspace it lives in, what was kept) and the strict
validation of sizes. The matrices themselves ride in the safetensors file beside the weights, never in JSON.
"""

import copy
import difflib
import math
import os
from collections.abc import Sequence
from inspect import getattr_static
from typing import Any, ClassVar

import torch
from transformers import PreTrainedConfig

METHOD_VERSION = 1
"""Version of the checkpoint format and of the method; a checkpoint from a newer one is refused."""

MAX_SIZE = 1 << 20
"""Upper bound of any width in a configuration: refuses absurd sizes before memory is taken."""

MAX_PARAMETERS = 1 << 36
"""Upper bound of a model's parameters, roughly counted: above the largest T5, far below what widths alone allow."""

MAX_LABELS = 1 << 16

_FLAGS = (
    "use_cache",
    "is_encoder_decoder",
    "is_decoder",
    "add_cross_attention",
    "tie_word_embeddings",
    "return_dict",
    "output_attentions",
    "use_return_dict",
)

_PROBLEMS = (None, "regression", "single_label_classification", "multi_label_classification")
PROJECTION_KINDS = ("shared", "per_site")
SUBSPACES = ("pca", "balanced")

_PROJECTION_FIELDS: dict[str, tuple[type, ...]] = {
    "method_version": (int,),
    "source_model": (str,),
    "source_revision": (str, type(None)),
    "source_model_type": (str,),
    "source_hidden_size": (int,),
    "source_parameters": (int,),
    "source_non_embedding_parameters": (int,),
    "kind": (str,),
    "subspace": (str,),
    "epsilon": (float, int, type(None)),
    "sites": (list,),
    "calibration": (dict,),
}
_PROJECTION_OPTIONAL: dict[str, tuple[type, ...]] = {"options": (dict,), "removed": (float, int)}
_SITE_FIELDS: dict[str, tuple[type, ...]] = {
    "name": (str,),
    "hidden_size": (int,),
    "kept_energy": (float, int),
}
_CALIBRATION_FIELDS: dict[str, tuple[type, ...]] = {
    "sequences": (int,),
    "tokens": (int,),
    "data_fingerprint": (str,),
    "model_fingerprint": (str,),
    "seed": (int,),
}


def _check_fields(
    where: str,
    value: dict[str, Any],
    required: dict[str, tuple[type, ...]],
    optional: dict[str, tuple[type, ...]],
) -> None:
    """Raise ValueError unless `value` has every required field, no unknown one, and the right types."""
    known = {**required, **optional}
    for name in value:
        if name not in known:
            raise ValueError(f"{where} has the unknown field {name!r}; allowed: {', '.join(sorted(known))}.")
    for name in required:
        if name not in value:
            raise ValueError(f"{where} lacks the field {name!r}.")
    for name, item in value.items():
        wrong_bool = isinstance(item, bool) and bool not in known[name]
        if wrong_bool or not isinstance(item, known[name]):
            allowed = " or ".join("null" if t is type(None) else t.__name__ for t in known[name])
            raise ValueError(f"{where}.{name} is {item!r}; it must be of type {allowed}.")


def check_choice(name: str, value: Any, allowed: Sequence[Any]) -> None:
    """Raise ValueError naming the field, the value and what is allowed."""
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; allowed: {', '.join(map(repr, allowed))}.")


def check_size(name: str, value: Any, minimum: int = 1, maximum: int = MAX_SIZE) -> None:
    """Raise ValueError unless `value` is an integer (never a bool) in [minimum, maximum]."""
    if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= maximum:
        raise ValueError(f"{name} is {value!r}; it must be an integer from {minimum} to {maximum}.")


def check_sizes(name: str, values: Any, length: int, minimum: int = 1, maximum: int = MAX_SIZE) -> None:
    """Raise ValueError unless `values` is None or a list of `length` integers in [minimum, maximum]."""
    if values is None:
        return
    if not isinstance(values, (list, tuple)):
        raise ValueError(f"{name} is {values!r}; it must be null or a list of {length} integers.")
    if len(values) != length:
        raise ValueError(f"{name} has {len(values)} entries; this model needs {length}.")
    for i, value in enumerate(values):
        check_size(f"{name}[{i}]", value, minimum, maximum)


def check_number(name: str, value: Any, minimum: float, maximum: float = math.inf) -> None:
    """Raise ValueError unless `value` is a finite number in [minimum, maximum]."""
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not good or not minimum <= value <= maximum:
        raise ValueError(f"{name} is {value!r}; it must be a finite number from {minimum} to {maximum}.")


def _check_kind(name: str, value: Any, kind: type) -> None:
    """Raise ValueError unless `value` is None or of the kind: a list of names or a dictionary."""
    good = value is None or isinstance(value, kind)
    if not good or (kind is list and not all(isinstance(entry, str) for entry in value or ())):
        raise ValueError(f"{name} is {value!r}; it must be {'a list of names' if kind is list else 'a dictionary'}.")


class TCSPConfig(PreTrainedConfig):
    """Base of `TCSPBertConfig` and `TCSPT5Config`.

    Args:
        projection (`dict`, *optional*):
            Provenance of the projection: `method_version`, `source_model`, `source_revision`,
            `source_model_type`, `source_hidden_size`, parameter counts of the source, `kind`
            (`"shared"` or `"per_site"`), `subspace` (`"pca"` or `"balanced"`), `epsilon`, `sites` (list of
            `{name, hidden_size, kept_energy}`), and `calibration` (`sequences`, `tokens`, fingerprints, `seed`).
            None for a model that was not made by compression (random weights, a test).

    Raises:
        ValueError: an unknown or contradictory value; the message names the field, the value and what is allowed.

    `TCSPConfig.from_pretrained(path)` returns the subclass that the checkpoint's `model_type` names.
    """

    model_type: ClassVar[str] = "tcsp"
    subclasses: ClassVar[dict[str, type["TCSPConfig"]]] = {}
    own_prefixes: ClassVar[tuple[str, ...]] = ("projection", "source_hidden")

    projection: dict[str, Any] | None = None

    def __init_subclass__(cls, *args: Any, **kwargs: Any) -> None:
        super().__init_subclass__(*args, **kwargs)
        TCSPConfig.subclasses[cls.model_type] = cls

    def __post_init__(self, **kwargs: Any) -> None:
        self._refuse_misspelled(kwargs)
        self._check_inherited({**{name: getattr(self, name, None) for name in self.__dataclass_fields__}, **kwargs})
        super().__post_init__(**kwargs)
        if self.projection is not None:
            self.projection = copy.deepcopy(self.projection)
        self.check()

    def _refuse_misspelled(self, kwargs: dict[str, Any]) -> None:
        """Refuse an unknown keyword that looks like one of ours: a typing error would otherwise be silent.

        Other unknown keywords stay allowed, as in every transformers configuration (other libraries use them).
        """
        for name in kwargs:
            meant = self.looks_like(name)
            if meant:
                raise ValueError(
                    f"{type(self).__name__} has no field {name!r} (value {kwargs[name]!r}); allowed: "
                    f"{', '.join(meant)}."
                )

    @classmethod
    def looks_like(cls, name: str) -> list[str]:
        """Our own fields that an unknown keyword may be meant for; none where it may stand as another library's."""
        own = sorted(field for field in cls.__dataclass_fields__ if field.startswith(cls.own_prefixes))
        if name in cls.__dataclass_fields__ or name.startswith("_") or hasattr(cls, name):
            return []
        close = difflib.get_close_matches(name, own, n=1, cutoff=0.85)
        return close or (own if name.startswith(cls.own_prefixes) else [])

    def _check_inherited(self, given: dict[str, Any]) -> None:
        """Refuse values that transformers' own configuration would take, to fail on them later or read them wrongly.

        Args:
            given: every declared field, and every other keyword.
        """
        for name in _FLAGS:
            value = given.get(name)
            if value is not None and not isinstance(value, bool):
                raise ValueError(f"{name} is {value!r}; it must be true or false.")
        layers = given.get("output_hidden_states")  # transformers takes a layer, or several, too
        for value in layers if isinstance(layers, (list, tuple)) else [layers]:
            if value is not None and not isinstance(value, int):
                raise ValueError(f"output_hidden_states is {layers!r}; it must be true, false or a list of layers.")
        for name in ("dtype", "torch_dtype"):
            value = given.get(name)
            known = isinstance(value, str) and isinstance(getattr(torch, value, None), torch.dtype)
            if value is not None and not known and not isinstance(value, torch.dtype):
                raise ValueError(f"{name} is {value!r}; it must be the name of a number format, as 'float32'.")
        if "num_labels" in given:
            check_size("num_labels", given["num_labels"], minimum=0, maximum=MAX_LABELS)  # each gets a name at once
        for name in ("attn_implementation", "_attn_implementation", "experts_implementation"):
            if not isinstance(given.get(name), (str, dict, type(None))):
                raise ValueError(f"{name} is {given[name]!r}; it must be a name, as 'sdpa'.")
        check_size("chunk_size_feed_forward", given.get("chunk_size_feed_forward", 0), minimum=0)
        check_choice("problem_type", given.get("problem_type"), _PROBLEMS)
        for name in ("architectures", "id2label", "label2id", "auto_map"):
            _check_kind(name, given.get(name), list if name == "architectures" else dict)
        for key in given.get("id2label") or {}:
            if not isinstance(key, int) and not (isinstance(key, str) and key.isdecimal() and len(key) < 10):
                raise ValueError(f"id2label has the key {key!r}; it must be a number.")
        for name in ("per_layer_config", "layer_types", "rope_scaling", "rope_parameters"):
            if given.get(name) is not None:
                raise ValueError(f"{name} is {given[name]!r}; {type(self).__name__} has no such thing, leave it out.")
        for name in given.keys() - self.__dataclass_fields__.keys() - {"model_type"}:
            found = getattr_static(type(self), name, None)
            settable = isinstance(found, property) and found.fset is not None
            if name.startswith("__") or not (found is None or settable):
                raise ValueError(f"{type(self).__name__} has no field {name!r}; the name is taken, leave it out.")

    def check_readable(self) -> None:
        """Raise ValueError where what would be saved could not be loaded; attributes may have been set since."""
        type(self).from_dict(self.to_dict())

    def check_token(self, name: str) -> None:
        """Raise ValueError unless the field is None or an entry of the vocabulary."""
        value = getattr(self, name)
        if value is not None:
            check_size(name, value, minimum=0, maximum=self.vocab_size - 1)

    def check_activation(self, name: str, value: Any) -> None:
        """Raise ValueError unless `value` is an activation that transformers knows, or a function. Models check it."""
        from transformers.activations import ACT2FN  # imports much that a configuration does not need

        if not (isinstance(value, str) and value in ACT2FN) and not callable(value):
            raise ValueError(f"{name} is {value!r}; allowed: {', '.join(sorted(ACT2FN))}.")

    def check_parameters(self, count: int) -> None:
        """Raise ValueError if the model would have an absurd number of parameters, before it is built."""
        if count > MAX_PARAMETERS:
            raise ValueError(
                f"vocab_size, the widths and the number of layers together make {count:,} parameters or more; at most "
                f"{MAX_PARAMETERS:,} are allowed."
            )

    def site_widths(self) -> dict[str, int]:
        """Name and width of every site, in the order of the forward pass."""
        raise NotImplementedError(f"{type(self).__name__} is abstract: use TCSPBertConfig or TCSPT5Config.")

    def check(self) -> None:
        """Validate every field against the others. Called at construction, by the models, and before saving.

        Raises:
            ValueError: names the field, the value and what is allowed.
        """
        if self.projection is None:
            return
        if not isinstance(self.projection, dict):
            raise ValueError(f"projection is {self.projection!r}; it must be null or a dictionary.")
        version = self.projection.get("method_version")
        if isinstance(version, int) and not isinstance(version, bool) and version > METHOD_VERSION:
            raise ValueError(
                f"projection.method_version is {version}, but this version of tcsp_hf reads up to {METHOD_VERSION}: "
                "install a newer tcsp_hf, or load with trust_remote_code=True to use the code beside the checkpoint."
            )
        _check_fields("projection", self.projection, _PROJECTION_FIELDS, _PROJECTION_OPTIONAL)
        check_size("projection.method_version", version)
        check_size("projection.source_hidden_size", self.projection["source_hidden_size"])
        check_choice("projection.kind", self.projection["kind"], PROJECTION_KINDS)
        check_choice("projection.subspace", self.projection["subspace"], SUBSPACES)
        _check_fields("projection.calibration", self.projection["calibration"], _CALIBRATION_FIELDS, {})
        for i, site in enumerate(self.projection["sites"]):
            where = f"projection.sites[{i}]"
            if not isinstance(site, dict):
                raise ValueError(f"{where} is {site!r}; it must be a dictionary.")
            _check_fields(where, site, _SITE_FIELDS, {})
            check_size(f"{where}.hidden_size", site["hidden_size"])
            check_number(f"{where}.kept_energy", site["kept_energy"], -math.inf, 1.0)  # oblique: can be below 0
        if type(self) is TCSPConfig:
            return
        stated = {site["name"]: site["hidden_size"] for site in self.projection["sites"]}
        expected = self.site_widths()
        if stated != expected:
            name = next(
                n for n in [*expected, *stated] if stated.get(n) != expected.get(n)
            )  # the first site on which the two disagree
            raise ValueError(
                f"projection.sites says that site {name!r} has width {stated.get(name)}, "
                f"but the sizes of the model give {expected.get(name)}."
            )
        declared = getattr(self, "source_hidden_size", None)
        if declared is not None and declared != self.projection["source_hidden_size"]:
            raise ValueError(
                f"source_hidden_size is {declared}, but projection.source_hidden_size is "
                f"{self.projection['source_hidden_size']}: the two must agree."
            )

    def save_pretrained(self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any) -> None:
        self.check()
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> Any:  # type: ignore[override]
        """As `PreTrainedConfig.from_pretrained`; on `TCSPConfig` itself, the right subclass."""
        if cls is TCSPConfig:
            config_dict, kwargs = cls.get_config_dict(pretrained_model_name_or_path, **kwargs)
            return cls.from_dict(config_dict, **kwargs)
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As `PreTrainedConfig.from_dict`; on `TCSPConfig` itself, the subclass that `model_type` names."""
        if cls is TCSPConfig:
            model_type = config_dict.get("model_type")
            known = sorted(name for name in TCSPConfig.subclasses if name != cls.model_type)
            if model_type not in known:
                raise ValueError(
                    f"model_type is {model_type!r}, which is no compressed model; allowed: {', '.join(known)}."
                )
            return TCSPConfig.subclasses[model_type].from_dict(config_dict, **kwargs)
        return super().from_dict(config_dict, **kwargs)


__all__ = ["TCSPConfig"]
