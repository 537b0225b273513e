# Copyright 2026 The tcsp_hf developers. Licensed under the Apache License, Version 2.0.
"""What every compressed model has in common: checkpoints that load anywhere, and the way back to the dense space."""

import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import nn
from torch.fx.experimental.symbolic_shapes import statically_known_true
from transformers import PreTrainedConfig, activations
from transformers.dynamic_module_utils import custom_object_save
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

CACHE = "cache" if "cache" in BaseModelOutputWithPastAndCrossAttentions.__dataclass_fields__ else "past_key_values"
"""What transformers calls a decoder's keys and values, as an argument and in outputs: `cache` from 5.24 on."""
_HUB_OPTIONS = (
    *("repo_id", "private", "token", "revision", "create_pr", "commit_message", "commit_description", "tags"),
    *("tokenizer", "overwrite"),
)


class TCSPPreTrainedMixin:
    """Mixed in before transformers' `PreTrainedModel` by both families.

    Saving writes the family's whole `auto_map` and copies the modeling files beside the weights, so that any Auto
    class loads any task's checkpoint with `trust_remote_code=True` where this package is not installed.
    """

    # `config`, `config_class`, `named_parameters` come with PreTrainedModel: hence what the type checker ignores here
    auto_map: ClassVar[dict[str, str]] = {}
    optional_weights: ClassVar[tuple[str, ...]] = ()
    """Prefixes of weights that a checkpoint may lack; transformers warns of them."""
    publisher: ClassVar[Callable[..., str] | None] = None
    """Set by the package: pushes checks and the model card along. None in the code beside a checkpoint."""
    accepts_loss_kwargs: ClassVar[bool] = False
    """For `Trainer`: losses are means over the batch, so that steps which add up to one are to be averaged."""
    doubt: str | None = None
    """Set by `compress` on a model whose outputs are not what was predicted: why it is not saved unless forced."""

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As `PreTrainedModel.from_pretrained`; a checkpoint of this very class must hold every one of its weights.

        With `output_loading_info=True` it is the caller who looks at `missing_keys`. A checkpoint of another task's
        class loads too: a head of the same name and another width (`classifier`) starts anew, as transformers says.

        Raises:
            ValueError: some are missing, where transformers alone would warn and go on with random ones.
        """
        try:
            model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        except RuntimeError:
            saved_as = cls._saved_as(*args, **kwargs)
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

    @classmethod
    def _saved_as(
        cls, pretrained_model_name_or_path: Any = None, *args: Any, config: Any = None, **kwargs: Any
    ) -> list[str]:
        """The classes that a checkpoint names; none where the weights were given without one."""
        path = pretrained_model_name_or_path if config is None else config
        if path is None:
            return []
        if not isinstance(config, PreTrainedConfig):  # the Auto classes hand it on
            names = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")
            chosen = {name: kwargs[name] for name in names if name in kwargs}
            config = cls.config_class.from_pretrained(path, **chosen)  # type: ignore[attr-defined]
        return list(config.architectures or ())

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], *args: Any, force: bool = False, **kwargs: Any
    ) -> None:
        """As `PreTrainedModel.save_pretrained`, after validating the configuration and the weights.

        Raises:
            ValueError: the configuration contradicts itself; or, unless `force`, a weight is NaN or infinite, or the
                model's outputs went wrong when it was compressed (see `doubt`). Nothing is written then.
        """
        self.config.check()  # type: ignore[attr-defined]
        self.config.check_readable()  # type: ignore[attr-defined]
        if not force:
            self._refuse_nan()
            if self.doubt is not None:
                raise ValueError(
                    f"{self.doubt} Nothing was saved: save_pretrained(..., force=True) saves it all the same."
                )
        self.config.auto_map = dict(self.auto_map)  # type: ignore[attr-defined]
        options: dict[str, Any] = {}
        push = TCSPPreTrainedMixin.publisher is not None and kwargs.pop("push_to_hub", False)
        if push:
            options = {name: kwargs.pop(name) for name in _HUB_OPTIONS if name in kwargs}
            options.setdefault("repo_id", os.path.basename(os.path.normpath(save_directory)))
            if "max_shard_size" in kwargs:  # of both
                options["max_shard_size"] = kwargs["max_shard_size"]
        super().save_pretrained(save_directory, *args, **kwargs)
        if args[0] if args else kwargs.get("is_main_process", True):
            self._save_code(save_directory)
            if push:
                self.push_to_hub(**options)

    def _initialize_weights(self, module: nn.Module, *args: Any) -> None:
        """As transformers', which passes by modules without parameters of their own in code that it takes for foreign
        (classes with an `_auto_class`): an attention's or a head's linears would start at the wrong scale."""
        super()._initialize_weights(module)

    def _save_code(self, folder: str | os.PathLike[str]) -> None:
        """The files that `auto_map` names: transformers copies those of its own class, not of what it extends."""
        ours = {entry.split(".")[0] for entry in self.auto_map.values()}
        own = next(kind for kind in type(self).__mro__ if kind.__module__.rpartition(".")[2] in ours)
        if own is not type(self) or getattr(self, "_auto_class", None) is None:
            custom_object_save(own, folder)

    def _refuse_nan(self) -> None:
        for name, parameter in self.named_parameters():  # type: ignore[attr-defined]
            small = parameter.is_floating_point() and parameter.element_size() == 1
            values = parameter.float() if small else parameter  # float8 has no isfinite
            if parameter.device.type != "meta" and not bool(torch.isfinite(values).all()):
                raise ValueError(
                    f"{name} holds a NaN or an infinity, so nothing was saved: save_pretrained(..., force=True) saves "
                    "it all the same."
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
    """Queries, keys and values (batch, heads, length, size) with zeros up to one size, where they must be even.

    The fused attention of a processor takes equal sizes only; uneven ones go another way that is several times slower.
    Flash attention takes no wider values (transformers would cut them). Zeros change neither scores nor the first
    entries of the context.
    """
    size = max(query.shape[-1], value.shape[-1])
    fused = backend == "sdpa" and query.device.type == "cpu" and query.shape[-2] != 1 and not _is_exporting()
    if query.shape[-1] == value.shape[-1] or not (fused or "flash" in (backend or "")):
        return query, key, value

    def padded(part: torch.Tensor) -> torch.Tensor:
        missing = size - part.shape[-1]
        return nn.functional.pad(part, (0, missing)) if missing else part

    return padded(query), padded(key), padded(value)


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module is of this very class, and nothing (a hook, an offload, an adapter) hangs on its call."""
    own = vars(module)
    return type(module) is kind and not ("forward" in own or own["_forward_hooks"] or own["_forward_pre_hooks"])


def is_watched(module: nn.Module) -> bool:
    """Whether a hook, an offload or another forward hangs on a module."""
    return not is_plain(module, type(module))


_transforms = getattr(torch._C._functorch, "peek_interpreter_stack", lambda: None)
"""The innermost of the running `torch.func` transforms, which know few functions that overwrite; None outside."""


def may_overwrite() -> bool:
    """Whether a result that nobody else holds may be overwritten, rather than being recorded by someone."""
    return (
        not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()  # type: ignore[attr-defined]
        and not torch.nn.modules.module._global_forward_hooks
        and _transforms() is None
    )


def _gelu_tanh(states: torch.Tensor) -> torch.Tensor:
    return torch.ops.aten.gelu_(states, approximate="tanh")


_IN_PLACE: dict[type[nn.Module], Callable[[torch.Tensor], torch.Tensor]] = {
    activations.GELUActivation: torch.ops.aten.gelu_,
    activations.NewGELUActivation: _gelu_tanh,  # the same function, written out in eight passes there
    nn.ReLU: torch.relu_,
}
if hasattr(activations, "GELUTanh"):  # not in older versions
    _IN_PLACE[activations.GELUTanh] = _gelu_tanh


def _in_place(activation: Any) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """The activation as a function that overwrites its argument; None where there is none."""
    kind = type(activation)
    if kind not in _IN_PLACE or not is_plain(activation, kind):
        return None
    own = getattr(activation, "act", nn.functional.gelu)  # these classes can be told to write their function out
    return _IN_PLACE[kind] if own is nn.functional.gelu or kind is not activations.GELUActivation else None


def product(linear: nn.Module, states: torch.Tensor) -> torch.Tensor:
    """`linear(states)`; compiled for a processor, the bias is added apart, in the pass that reads the product anyway.

    As part of the product it would be copied into the result's memory first.
    """
    bias = getattr(linear, "bias", None)
    if not torch.compiler.is_compiling() or _is_exporting() or bias is None or not is_plain(linear, nn.Linear):
        return linear(states)
    if states.device.type != "cpu" or not states.dtype == bias.dtype == torch.float32:
        return linear(states)
    written = nn.functional.linear(states, linear.weight)
    return written + bias.to(written.dtype)  # autocast may have lowered it


def activate(activation: Any, linear: nn.Module, states: torch.Tensor) -> torch.Tensor:
    """`activation(linear(states))`, written over the linear's result where that is nobody else's.

    The result is the widest tensor of a layer: on a processor a second one of its size costs as much as the function.
    """
    wide = product(linear, states)
    change = _in_place(activation) if may_overwrite() and is_plain(linear, nn.Linear) else None
    return activation(wide) if change is None else change(wide)


def rms_normalise(states: torch.Tensor, weight: torch.Tensor, eps: float, overwrite: bool = False) -> torch.Tensor:
    """`weight * x / sqrt(mean(x²) + eps)` over the last entries; over `states` themselves with `overwrite`.

    Computed in the weight's dtype: under autocast that is float32, as it is for a stock model's norms.
    """
    if states.dtype != weight.dtype:
        states = states.to(weight.dtype)  # of two dtypes PyTorch has no fused norm
    if states.dtype not in (torch.float32, torch.float64) or states.device.type != "cpu" or not may_overwrite():
        return nn.functional.rms_norm(states, weight.shape, weight, eps)
    # what rms_norm is made of on a processor, without its copies
    scale = torch.linalg.vector_norm(states, dim=-1, keepdim=True)
    scale.square_().mul_(1.0 / states.shape[-1]).add_(eps).rsqrt_()
    return (states.mul_(scale) if overwrite else states * scale).mul_(weight)


_ROWS = 1024
"""Tokens that a processor takes at a time (measured; larger parts touch fresh memory, smaller ones waste time)."""
_COMPILED_PARTS = 4
"""Most parts under `torch.compile`, which compiles every one of them anew."""


def sequences_at_a_time(layer: nn.Module, states: torch.Tensor, masks: Sequence[Any]) -> int | None:
    """Sequences of a large batch that a layer takes at a time on a processor; None where all go at once.

    What lies within a layer is several times wider than its states (batch, length, width). In parts it stays in memory
    that is in use already; fresh memory costs more than the arithmetic on it. Only where nobody watches the parts.
    Under `torch.compile` only for a few parts, and where batch and length are fixed in the graph.

    Args:
        masks: tensors whose first dimension is the batch or 1, or None.
    """
    if states.device.type != "cpu" or layer.training or torch.is_grad_enabled() or torch.jit.is_tracing():  # type: ignore[attr-defined]
        return None
    batch, length = states.shape[:2]
    compiling = torch.compiler.is_compiling()
    if compiling and (_is_exporting() or not statically_known_true(batch * length > _ROWS)):
        return None
    if batch * length <= _ROWS or batch == 1:
        return None
    count = max(1, _ROWS // length)
    if compiling and batch > _COMPILED_PARTS * count:
        return None
    known = all(mask is None or (isinstance(mask, torch.Tensor) and mask.shape[0] in (1, batch)) for mask in masks)
    if not known or any(is_watched(module) for module in layer.modules() if module is not layer):
        return None
    return count


def split_mask(mask: torch.Tensor | None, count: int, parts: int) -> Sequence[torch.Tensor | None]:
    """The mask of every part; one that all sequences share goes to each."""
    return [mask] * parts if mask is None or mask.shape[0] == 1 else mask.split(count)


@torch.inference_mode(False)  # or the weights would be inference tensors for good
@torch.no_grad()
def lay_out_for_rows(linears: Iterable[nn.Linear]) -> None:
    """Store weights (out, in) column by column where that reads one row, or a few, faster; values stay as they are.

    A product with one row reads the whole weight once. On a processor, where out > in, it runs at up to twice the
    bandwidth this way (measured), and no slower with many rows. Not in the middle of a training step.
    """
    for linear in linears:
        weight = linear.weight
        if (
            type(linear) is not nn.Linear
            or is_watched(linear)
            or weight.device.type != "cpu"
            or weight.grad is not None
        ):
            continue
        own = weight.untyped_storage().nbytes() == weight.numel() * weight.element_size()
        if own and weight.is_contiguous() and weight.is_floating_point() and linear.out_features > linear.in_features:
            weight.data = weight.data.t().contiguous().t()


@torch.inference_mode(False)
@torch.no_grad()
def lay_out_as_ever(linears: Iterable[nn.Linear]) -> None:
    """Take `lay_out_for_rows` back: optimizers with fused kernels, and whoever views weights, expect rows."""
    for linear in linears:
        if type(linear) is nn.Linear and not linear.weight.is_contiguous():
            linear.weight.data = linear.weight.data.contiguous()


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
