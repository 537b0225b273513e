# Copyright 2026 The tcsp_hf developers. Licensed under the Apache License, Version 2.0.
"""What every compressed model has in common: checkpoints that load anywhere, and the way back to the dense space."""

import os
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

CACHE = "cache" if "cache" in BaseModelOutputWithPastAndCrossAttentions.__dataclass_fields__ else "past_key_values"
"""What transformers calls a decoder's keys and values, as an argument and in outputs: `cache` from 5.24 on."""
_HUB_OPTIONS = ("repo_id", "private", "token", "revision", "create_pr", "commit_message", "tokenizer", "overwrite")


class TCSPPreTrainedMixin:
    """Mixed in before transformers' `PreTrainedModel` by both families.

    Saving writes the family's whole `auto_map` and copies the modeling files beside the weights, so that any Auto
    class loads any task's checkpoint with `trust_remote_code=True` where this package is not installed.
    """

    auto_map: ClassVar[dict[str, str]] = {}
    optional_weights: ClassVar[tuple[str, ...]] = ()
    """Prefixes of weights that a checkpoint may lack; transformers warns of them."""
    publisher: ClassVar[Callable[..., str] | None] = None
    """Set by the package: pushes checks and the model card along. None in the code beside a checkpoint."""

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As `PreTrainedModel.from_pretrained`; a checkpoint of this very class must hold every one of its weights.

        With `output_loading_info=True` it is the caller who looks at `missing_keys`. A checkpoint of another task's
        class loads too: a head of the same name and another width (`classifier`) starts anew, as transformers says.

        Raises:
            ValueError: some are missing, where transformers alone would warn and go on with random ones.
        """
        saved_as = getattr(kwargs.get("config"), "architectures", None)  # the Auto classes hand the configuration on
        try:
            model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        except RuntimeError:
            if not saved_as or cls.__name__ in saved_as or "ignore_mismatched_sizes" in kwargs:
                raise
            model, info = super().from_pretrained(
                *args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
            )
            names = [entry if isinstance(entry, str) else entry[0] for entry in info["mismatched_keys"]]
            if not names or not all(name.startswith(("classifier.", "qa_outputs.")) for name in names):
                raise  # more than a head differs
        if output_loading_info:
            return model, info
        missing = sorted(name for name in info["missing_keys"] if not name.startswith(cls.optional_weights))
        if missing and kwargs.get("state_dict") is None and cls.__name__ in (model.config.architectures or ()):
            raise ValueError(
                f"The checkpoint lacks {missing[0]} ({len(missing)} of the weights of {cls.__name__} in all): it was "
                "truncated or altered. Make or download it again."
            )
        return model

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], *args: Any, allow_nan: bool = False, **kwargs: Any
    ) -> None:
        """As `PreTrainedModel.save_pretrained`, after validating the configuration and the weights.

        Raises:
            ValueError: the configuration contradicts itself, or a weight is NaN or infinite and `allow_nan` is False;
                nothing is written then.
        """
        self.config.check()  # type: ignore[attr-defined]
        if not allow_nan:
            self._refuse_nan()
        self.config.auto_map = dict(self.auto_map)  # type: ignore[attr-defined]
        options: dict[str, Any] = {}
        push = TCSPPreTrainedMixin.publisher is not None and kwargs.pop("push_to_hub", False)
        if push:
            options = {name: kwargs.pop(name) for name in _HUB_OPTIONS if name in kwargs}
            options.setdefault("repo_id", os.path.basename(os.path.normpath(save_directory)))
        super().save_pretrained(save_directory, *args, **kwargs)
        if push:
            self.push_to_hub(**options)

    def _refuse_nan(self) -> None:
        for name, parameter in self.named_parameters():  # type: ignore[attr-defined]
            if parameter.device.type != "meta" and not bool(torch.isfinite(parameter).all()):
                raise ValueError(
                    f"{name} holds a NaN or an infinity, so nothing was saved: save_pretrained(..., allow_nan=True) "
                    "saves it all the same."
                )

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """As `PreTrainedModel.push_to_hub`, with the checks and the model card of `tcsp_hf.publish.push`.

        Takes `tokenizer=` and `overwrite=` as well. In the code beside a checkpoint it is transformers' own.

        Raises:
            ValueError: see `tcsp_hf.publish.push`; nothing was committed then.
        """
        publisher = TCSPPreTrainedMixin.publisher
        if publisher is None:
            return super().push_to_hub(repo_id, **kwargs)
        return publisher(self, repo_id, **kwargs)


_is_exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)  # torch 2.6 has only the second


def even_heads(
    backend: str | None, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values (batch, heads, length, size) with zeros up to one size, where that is faster.

    The fused attention of a processor takes equal sizes only; uneven ones go another way that is several times slower.
    Zeros change neither scores nor the first entries of the context.
    """
    size = max(query.shape[-1], value.shape[-1])
    even = query.shape[-1] == value.shape[-1]
    if even or backend != "sdpa" or query.device.type != "cpu" or query.shape[-2] == 1 or _is_exporting():
        return query, key, value

    def padded(part: torch.Tensor) -> torch.Tensor:
        missing = size - part.shape[-1]
        return nn.functional.pad(part, (0, missing)) if missing else part

    return padded(query), padded(key), padded(value)


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module is of this very class, and nothing (a hook, an offload, an adapter) hangs on its call."""
    own = vars(module)
    return type(module) is kind and not ("forward" in own or own["_forward_hooks"] or own["_forward_pre_hooks"])


class TCSPLift(nn.Module):
    """Affine map from a site's coordinates back to the dense hidden states: `h = z @ weight.T + bias`.

    `weight` (D, k) is the site's decoder with the dense norm's weight folded in, `bias` (D,) the dense norm's bias.
    Both are buffers: the map describes the compression, it is not trained.
    """

    weight: torch.Tensor
    bias: torch.Tensor

    def __init__(self, hidden_size: int, dense_hidden_size: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.eye(dense_hidden_size, hidden_size))
        self.register_buffer("bias", torch.zeros(dense_hidden_size))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(hidden_states, self.weight, self.bias)
