"""Other libraries' ways to make, load or adapt a model, tried on a dense and on a compressed classifier."""

import copy
import importlib
import io
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import TCSPError
from .latency import alternate, random_inputs
from .scoring import Task

Make = Callable[[PreTrainedModel], Any]


@dataclass(frozen=True)
class Way:
    """One way.

    Attributes:
        package: what has to be installed for it; None for what PyTorch has itself.
        make: gives a model with the same inputs and outputs, and leaves the one it is given as it is.
    """

    package: str | None
    make: Make


def _as_it_is(model: PreTrainedModel) -> Any:
    return model


def _dynamic_int8(model: PreTrainedModel) -> Any:
    from torch.ao.quantization import quantize_dynamic

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # in favour of torchao
        return quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)


def _torchao(config: str) -> Make:
    def make(model: PreTrainedModel) -> Any:
        quantization: Any = importlib.import_module("torchao.quantization")
        changed = copy.deepcopy(model)
        quantization.quantize_(changed, getattr(quantization, config)())
        return changed

    return make


def _from_pretrained(options: Callable[[], dict[str, Any]]) -> Make:
    def make(model: PreTrainedModel) -> Any:
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            return type(model).from_pretrained(folder, **options()).eval()

    return make


def _bitsandbytes(**fields: Any) -> Make:
    def options() -> dict[str, Any]:
        from transformers import BitsAndBytesConfig

        return {"quantization_config": BitsAndBytesConfig(**fields), "device_map": {"": "cpu"}}

    return _from_pretrained(options)


def _compiled(model: PreTrainedModel) -> Any:
    torch._dynamo.reset()
    return torch.compile(copy.deepcopy(model), dynamic=True)


WAYS: Mapping[str, Way] = {
    "as it is": Way(None, _as_it_is),
    "dynamic int8": Way(None, _dynamic_int8),
    "torchao int8": Way("torchao", _torchao("Int8DynamicActivationInt8WeightConfig")),
    "torchao int8 weights": Way("torchao", _torchao("Int8WeightOnlyConfig")),
    "bitsandbytes int8": Way("bitsandbytes", _bitsandbytes(load_in_8bit=True)),
    "bitsandbytes nf4": Way("bitsandbytes", _bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4")),
    "torch.compile": Way(None, _compiled),
    "device map": Way(None, _from_pretrained(lambda: {"device_map": "auto"})),
}


def choose_ways(names: list[str] | None) -> dict[str, Way]:
    """The named ways, or those whose packages are installed; `as it is` always comes first.

    Raises:
        TCSPError: there is none of that name, or its package is missing.
    """
    found = {"as it is": WAYS["as it is"]}
    for name in WAYS if names is None else names:
        if name not in WAYS:
            raise TCSPError(f"There is no way {name!r}; allowed: {', '.join(WAYS)}.")
        package = WAYS[name].package
        if package is not None and importlib.util.find_spec(package) is None:
            if names is None:
                continue
            raise TCSPError(f"{name} needs {package}: pip install {package}.")
        found[name] = WAYS[name]
    return found


def stored_bytes(model: Any) -> int:
    """What `torch.save` writes of the state."""
    buffer = io.BytesIO()
    torch.save(getattr(model, "_orig_mod", model).state_dict(), buffer)
    return buffer.tell()


@torch.no_grad()
def compare_ways(
    models: Mapping[str, PreTrainedModel],
    ways: Mapping[str, Way],
    task: Task[Any],
    tokenizer: Any,
    *,
    batch: int = 8,
    length: int = 128,
    rounds: int = 11,
    progress: bool | None = False,
) -> list[dict[str, Any]]:
    """Every way on every model: bytes, score, distance to the first model as it is, and speed against that.

    A way that fails has the reason in `error` and nothing else. All latencies come from one alternating run of one
    batch of random tokens.

    Raises:
        TCSPError: a model does not even run as it is.
    """
    reference: Any = None
    rows: list[dict[str, Any]] = []
    calls: dict[str, Callable[[], Any]] = {}
    inputs = random_inputs(next(iter(models.values())), batch, length)
    for way, entry in ways.items():
        for name, model in models.items():
            row: dict[str, Any] = {"model": name, "way": way}
            rows.append(row)
            try:
                made = entry.make(model)
                outputs = task.outputs(made, tokenizer, progress, f"{name}, {way}")
                made(**inputs)
            except Exception as error:  # whatever another library has to say
                row["error"] = f"{type(error).__name__}: {str(error).strip()[:300]}"
                if reference is None or entry.make is _as_it_is:
                    raise TCSPError(f"The {name} model, {way}, cannot be scored or timed: {row['error']}") from error
                continue
            reference = outputs if reference is None else reference
            score = task.score(reference, outputs)
            row |= {"bytes": stored_bytes(made), task.score_name: score.score, "distance": score.distance}
            row["agreement"] = score.agreement
            calls[f"{name}, {way}"] = _call(made, inputs)
    times = alternate(calls, rounds)
    base = next(iter(times.values())).median
    for row in rows:
        if "error" not in row:
            row["ms"] = times[f"{row['model']}, {row['way']}"].median
            row["speedup"] = base / row["ms"]
    return rows


def _call(model: Any, inputs: dict[str, torch.Tensor]) -> Callable[[], Any]:
    return lambda: model(**inputs)


def adapt(
    model: PreTrainedModel, train: Callable[[PreTrainedModel], None], inputs: dict[str, torch.Tensor]
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """LoRA of rank 8 on all linears (extra `[peft]`): trained, saved, loaded on the untouched model, and merged.

    Args:
        model: a sequence classifier; a copy is trained.
        train: trains what has gradients, in place.
        inputs: to compare the merged model with the adapter on.

    Returns:
        The merged model, and figures: trained parameters, bytes of the adapter, and the largest differences of the
        logits after loading and after merging.

    Raises:
        TCSPError: peft is not installed.
    """
    try:
        peft: Any = importlib.import_module("peft")
    except ImportError as error:
        raise TCSPError("LoRA needs peft: pip install 'tcsp_hf[peft]'.") from error
    config = peft.LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16, target_modules="all-linear")
    wrapped = peft.get_peft_model(copy.deepcopy(model), config)
    trained = int(wrapped.get_nb_trainable_parameters()[0])
    train(wrapped.get_base_model())
    wrapped.eval()
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        wrapped.save_pretrained(folder)
        size = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model), folder).eval()
        expected = wrapped(**inputs).logits
        reloaded = float((loaded(**inputs).logits - expected).abs().max())
        merged = loaded.merge_and_unload()
        after = float((merged(**inputs).logits - expected).abs().max())
    facts = {"trained": trained, "adapter_bytes": size, "reloaded": reloaded, "merged": after}
    return merged, facts
