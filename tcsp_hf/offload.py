"""Dense models whose weights stay in their file, or on another device, until a layer's turn comes.

`from_pretrained(..., device_map=...)` leaves parameters on the meta device and hangs accelerate's hooks on the modules,
which bring the values for the length of a call. What reads weights between calls asks here.
"""

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from .errors import TCSPError


def _hooks(module: nn.Module) -> list[Any]:
    """accelerate's hooks on a module that say where it computes."""
    hook = getattr(module, "_hf_hook", None)
    found = getattr(hook, "hooks", (hook,))
    return [one for one in found if getattr(one, "execution_device", None) is not None]


def is_offloaded(model: nn.Module) -> bool:
    """Whether any parameter has its values elsewhere."""
    return any(parameter.device.type == "meta" for parameter in model.parameters())


def read_tensor(module: nn.Module, name: str) -> torch.Tensor:
    """The values of a module's own parameter or buffer, in its dtype, wherever they are.

    Raises:
        TCSPError: it is on the meta device, and no hook knows its values.
    """
    value: torch.Tensor = getattr(module, name)
    if value.device.type != "meta":
        return value.detach()
    for hook in _hooks(module):
        if getattr(hook, "weights_map", None) is not None:
            found: torch.Tensor = hook.weights_map[name]
            return found.detach().to(value.dtype)
    raise TCSPError(
        f"A {type(module).__name__} of the model has its {name} on the meta device and no values for it: load the "
        "model with from_pretrained (with or without device_map)."
    )


def identity(module: nn.Module, name: str) -> Hashable:
    """Equal for parameters that are tied, unequal for others.

    The hooks put a new object on the meta device after every call, so objects say nothing there; where the values come
    from does.
    """
    value = getattr(module, name)
    if not isinstance(value, torch.Tensor) or value.device.type != "meta":
        return id(value)
    for hook in _hooks(module):
        weights = getattr(hook, "weights_map", None)
        full = f"{getattr(weights, 'prefix', '')}{name}"
        source = getattr(weights, "dataset", weights)
        stored = getattr(source, "index", {}).get(full, {})
        if "safetensors_file" in stored:
            return stored["safetensors_file"], stored.get("weight_name", full)
        held = getattr(source, "state_dict", source) or {}
        if full in held:
            return held[full].data_ptr()
    return id(value)


def distinct_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Every parameter, tied ones once, as `named_parameters` orders them: its name, its module and its name there."""
    seen: set[Hashable] = set()
    for place, module in model.named_modules():
        for name, value in module._parameters.items():
            if value is not None and identity(module, name) not in seen:
                seen.add(identity(module, name))
                yield f"{place}.{name}" if place else name, module, name


def device_of(model: PreTrainedModel) -> torch.device:
    """Where a model takes its inputs and computes.

    Raises:
        TCSPError: it computes on several devices.
    """
    devices = {torch.device(hook.execution_device) for module in model.modules() for hook in _hooks(module)}
    devices |= {parameter.device for parameter in model.parameters()} - {torch.device("meta")}
    if len(devices) > 1:
        names = ", ".join(sorted(map(str, devices)))
        raise TCSPError(
            f"The model computes on several devices ({names}): load it on one, with device_map leaving on 'cpu' or "
            "'disk' what does not fit."
        )
    return next(iter(devices), torch.device("meta"))


@contextmanager
def forgetting(model: PreTrainedModel) -> Iterator[None]:
    """Within, layers of an offloaded model keep only their inputs for the backward pass, and are run again there.

    Otherwise the graph of one batch would hold every layer's weights. Models that are not offloaded stay as they are.
    """
    layers: list[Any] = list(_layers(model)) if is_offloaded(model) else []
    before = [vars(layer).get("forward") for layer in layers]
    for layer in layers:
        layer.forward = _run_again(layer.forward)
    try:
        yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            put_forward_back(layer, own)


def put_forward_back(module: nn.Module, own: Any) -> None:
    """Undo an assignment to `module.forward`; own: what `vars(module)` held before, None for nothing."""
    if own is None:
        vars(module).pop("forward", None)
    else:
        module.forward = own


def _run_again(forward: Any) -> Any:
    def run(*args: Any, **kwargs: Any) -> Any:
        return (
            checkpoint(forward, *args, use_reentrant=False, **kwargs)
            if torch.is_grad_enabled()
            else forward(*args, **kwargs)
        )

    return run


def _layers(model: Any) -> Iterator[nn.Module]:
    base = model.base_model
    for stack in (getattr(base, name) for name in ("encoder", "decoder") if hasattr(base, name)):
        yield from stack.layer if hasattr(stack, "layer") else stack.block
