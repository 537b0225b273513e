"""ONNX graphs of dense and compressed models, checked against PyTorch by ONNX Runtime (extra `[onnx]`).

One graph, `model.onnx`, for a model that runs in one pass; `encoder_model.onnx`, `decoder_model.onnx` (the first step)
and `decoder_with_past_model.onnx` (one more token) for a sequence-to-sequence model, with the names of inputs and
outputs that other readers of such folders know. Batch and lengths are dynamic.

The graphs come from `torch.onnx.export` itself. transformers' own exporters call it too, but their interface differs
between 5.17 and 5.23, 5.23's needs torch 2.11, and they print to standard output; on the one model tried with 5.23's, a
BERT classifier, they agreed with PyTorch as well as this does (below 1e-6).
"""

import contextlib
import copy
import importlib
import logging
import math
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from ..errors import TCSPError
from ..modeling_tcsp import CACHE

Tensors = dict[str, torch.Tensor]
Runner = Callable[[dict[str, np.ndarray], list[str]], list[np.ndarray]]
"""What another runtime does with a graph: inputs by name and names of outputs -> outputs."""
_TRACED = (2, 7)
_CHECKED = ((2, 7), (1, 1), (3, 16))
"""(batch, length) at which a graph is compared with PyTorch."""


def require_onnx() -> Any:
    """onnxruntime, after making sure that all of the extra is there.

    Raises:
        TCSPError: a package is missing; the message names the extra.
    """
    try:
        for name in ("onnx", "onnxscript"):
            importlib.import_module(name)
        return importlib.import_module("onnxruntime")
    except ImportError as error:
        raise TCSPError(f"ONNX needs {error.name}: pip install 'tcsp_hf[onnx]'.") from error


@dataclass(frozen=True)
class Graph:
    """What one file holds: see `graphs_of`.

    Attributes:
        name: of the file, without its suffix.
        make: gives random inputs for a batch and a length.
        run: outputs by name from the model and inputs by name.
        axes: names of the dynamic axes of every input.
    """

    name: str
    make: Callable[[int, int], Tensors]
    run: Callable[[Any, Tensors], Tensors]
    axes: Callable[[str], dict[int, str]]


class _Flat(nn.Module):
    """The model with a list of tensors in and a tuple of tensors out."""

    def __init__(self, model: nn.Module, graph: Graph, names: list[str]) -> None:
        super().__init__()
        self.model = model
        self.graph = graph
        self.names = names

    def forward(self, tensors: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        return tuple(self.graph.run(self.model, dict(zip(self.names, tensors, strict=True))).values())


def export_onnx(
    model: PreTrainedModel,
    folder: str | os.PathLike[str],
    *,
    tolerance: float = 1e-4,
    progress: bool | None = False,
) -> dict[str, float]:
    """Write a model's ONNX graphs into a folder, after ONNX Runtime gave what PyTorch gives.

    Args:
        model: a dense or compressed BERT or T5 in float32, in evaluation mode.
        folder: existing or new; files of the same names must not be there.
        tolerance: largest difference of any output that is accepted, relative to the output's largest entry where
            that is above 1. A model whose own rounding error in PyTorch (float32 against float64, on the same inputs)
            is above a quarter of it may differ by four times that error.
        progress: show a bar; None shows it on a terminal only.

    Returns:
        File name -> largest difference found.

    Raises:
        TCSPError: a package of the extra is missing, the model cannot be exported, or a graph differs by more than
            the tolerance; nothing is written then.
    """
    runtime = require_onnx()
    target = Path(folder)
    if model.dtype != torch.float32:
        raise TCSPError(f"The model is in {model.dtype}: load it with dtype=torch.float32 for the export to ONNX.")
    graphs = graphs_of(model)
    for graph in graphs:
        if (target / f"{graph.name}.onnx").exists():
            raise TCSPError(f"{target / graph.name}.onnx exists: name another folder.")
    found: dict[str, float] = {}
    hidden = None if progress is None else not progress
    with tempfile.TemporaryDirectory() as temporary, torch.no_grad():
        for graph in tqdm(graphs, desc="ONNX", unit="graph", disable=hidden):
            path = Path(temporary) / f"{graph.name}.onnx"
            _write(model.eval(), graph, path)
            found[path.name] = check_graph(_session(runtime, path), model, graph, path.name, tolerance)
        target.mkdir(parents=True, exist_ok=True)
        for path in sorted(Path(temporary).iterdir()):
            (target / path.name).write_bytes(path.read_bytes())
    return found


# Which graphs ---------------------------------------------------------------------------------------------------------


def graphs_of(model: Any) -> list[Graph]:
    """The graphs of a model.

    Raises:
        TCSPError: an unsupported family.
    """
    family = str(model.config.model_type).removeprefix("tcsp_").removeprefix("m")
    if family not in ("bert", "t5"):
        raise TCSPError(f"{type(model).__name__} cannot be exported to ONNX: only BERT and T5 models can.")
    if type(model).__name__.endswith("ForConditionalGeneration"):
        return [_encoder_graph(model), _decoder_graph(model, first=True), _decoder_graph(model, first=False)]
    return [_single_graph(model, family)]


def _ids(model: Any, *shape: int) -> torch.Tensor:
    return torch.randint(2, model.config.vocab_size, shape, device=model.device)


def _mask(ids: torch.Tensor) -> torch.Tensor:
    """Every second sequence is padded on the right."""
    mask = torch.ones_like(ids)
    mask[1::2, ..., ids.shape[-1] // 2 + 1 :] = 0
    return mask


def _only_tensors(outputs: Any) -> Tensors:
    return {name: value for name, value in outputs.items() if isinstance(value, torch.Tensor)}


def _single_graph(model: Any, family: str) -> Graph:
    choices = (2,) if type(model).__name__.endswith("ForMultipleChoice") else ()
    alone = type(model).__name__.endswith("T5EncoderModel")
    needs_decoder_inputs = family == "t5" and type(model).__name__.endswith("T5Model")

    def make(batch: int, length: int) -> Tensors:
        ids = _ids(model, batch, *choices, length)
        eos = getattr(model.config, "eos_token_id", None)
        if family == "t5" and isinstance(eos, int):
            ids[ids == eos] = eos + 1
            ids[..., -1] = eos  # the head of a T5 classifier reads there
        inputs = {"input_ids": ids, "attention_mask": _mask(ids)}
        if family == "bert":
            inputs["token_type_ids"] = torch.randint(0, model.config.type_vocab_size, ids.shape, device=ids.device)
        if needs_decoder_inputs:
            inputs["decoder_input_ids"] = _ids(model, batch, length + 1)
        return inputs

    def run(traced: Any, inputs: Tensors) -> Tensors:
        cache = {"use_cache": False} if family == "t5" else {}
        called = traced.get_encoder() if alone else traced  # transformers' T5EncoderModel hands no return_dict on to it
        return _only_tensors(called(**inputs, **cache, return_dict=True))

    def axes(name: str) -> dict[int, str]:
        if name == "decoder_input_ids":
            return {0: "batch", 1: "decoder_sequence"}
        return {0: "batch", 1: "choices", 2: "sequence"} if choices else {0: "batch", 1: "sequence"}

    return Graph("model", make, run, axes)


def _encoder_graph(model: Any) -> Graph:
    def make(batch: int, length: int) -> Tensors:
        ids = _ids(model, batch, length)
        return {"input_ids": ids, "attention_mask": _mask(ids)}

    def run(traced: Any, inputs: Tensors) -> Tensors:
        return {"last_hidden_state": traced.get_encoder()(**inputs, return_dict=True).last_hidden_state}

    return Graph("encoder_model", make, run, lambda name: {0: "batch", 1: "encoder_sequence"})


def cache_names(layers: int, prefix: str, kinds: tuple[str, ...] = ("decoder", "encoder")) -> list[str]:
    """Names of a decoder's keys and values in the graphs: `past_key_values.0.decoder.key`, ..."""
    return [f"{prefix}.{i}.{kind}.{part}" for i in range(layers) for kind in kinds for part in ("key", "value")]


def _decoder_graph(model: Any, first: bool) -> Graph:
    """The decoder: without a cache, or with one and a single new token."""
    layers = len(model.decoder.block)
    encoder = _encoder_graph(model)

    def start(batch: int, length: int) -> Tensors:
        inputs = encoder.make(batch, length)
        return {
            "decoder_input_ids": _ids(model, batch, length),
            "encoder_hidden_states": encoder.run(model, inputs)["last_hidden_state"],
            "encoder_attention_mask": inputs["attention_mask"],
        }

    def make(batch: int, length: int) -> Tensors:
        inputs = start(batch, length)
        if first:
            return inputs
        past = list(run(model, inputs).values())[1:]
        names = cache_names(layers, "past_key_values")
        return {
            "decoder_input_ids": _ids(model, batch, 1),
            "encoder_attention_mask": inputs["encoder_attention_mask"],
            **dict(zip(names, past, strict=True)),
        }

    def run(traced: Any, inputs: Tensors) -> Tensors:
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        past = [inputs[name] for name in cache_names(layers, "past_key_values") if name in inputs]
        for i in range(len(past) // 4):
            cache.self_attention_cache.update(past[4 * i], past[4 * i + 1], i)
            cache.cross_attention_cache.update(past[4 * i + 2], past[4 * i + 3], i)
            cache.is_updated[i] = True
        memory = inputs.get("encoder_hidden_states")
        if memory is None:  # the cache has its keys and values: only its shape is asked for
            batch, length = inputs["encoder_attention_mask"].shape
            memory = past[0].new_zeros(batch, length, 1)
        found = traced(
            encoder_outputs=BaseModelOutput(last_hidden_state=memory),
            attention_mask=inputs["encoder_attention_mask"],
            decoder_input_ids=inputs["decoder_input_ids"],
            **{CACHE: cache},
            use_cache=True,
            return_dict=True,
        )
        caches: dict[str, Any] = {"decoder": cache.self_attention_cache, "encoder": cache.cross_attention_cache}
        if past:
            del caches["encoder"]  # unchanged
        outputs = {"logits": found.logits}
        for i in range(layers):
            for kind, kept in caches.items():
                outputs[f"present.{i}.{kind}.key"] = kept.layers[i].keys
                outputs[f"present.{i}.{kind}.value"] = kept.layers[i].values
        return outputs

    def axes(name: str) -> dict[int, str]:
        if name == "decoder_input_ids":
            return {0: "batch", 1: "decoder_sequence"} if first else {0: "batch"}
        if name.startswith("past_key_values"):
            return {0: "batch", 2: "past_sequence" if ".decoder." in name else "encoder_sequence"}
        return {0: "batch", 1: "encoder_sequence"}

    return Graph("decoder_model" if first else "decoder_with_past_model", make, run, axes)


# Writing and checking -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _calm() -> Iterator[None]:
    """Silence what PyTorch's exporter says about itself."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    inner = logging.getLogger("torch.onnx._internal.exporter._registration")
    inner_level = inner.level
    inner.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="# The axis name", category=UserWarning)
            warnings.filterwarnings("ignore", module="copyreg", category=FutureWarning)
            yield
    finally:
        logger.setLevel(level)
        inner.setLevel(inner_level)


def _write(model: PreTrainedModel, graph: Graph, path: Path) -> None:
    """Trace and save one graph.

    Raises:
        TCSPError: PyTorch cannot trace the model.
    """
    inputs = graph.make(*_TRACED)
    outputs = list(graph.run(model, inputs))
    longest = getattr(model.config, "max_position_embeddings", None)
    dims: dict[str, Any] = {}
    for name in inputs:
        for axis in graph.axes(name).values():
            dims.setdefault(axis, torch.export.Dim(axis, max=longest if axis == "sequence" else None))
    shapes = [{i: dims[axis] for i, axis in graph.axes(name).items()} for name in inputs]
    try:
        with _calm():
            program = torch.onnx.export(
                _Flat(model, graph, list(inputs)).eval(),
                (list(inputs.values()),),
                input_names=list(inputs),
                output_names=outputs,
                dynamic_shapes=(shapes,),
                dynamo=True,
                verbose=False,
            )
    except (RuntimeError, ValueError, torch.onnx.errors.OnnxExporterError) as error:
        raise TCSPError(f"{type(model).__name__} cannot be exported to ONNX: {str(error)[:300]}") from error
    assert program is not None  # of dynamo=True
    program.save(str(path))


def _checked_inputs(graph: Graph) -> Iterator[Tensors]:
    """The same random inputs each time, at a few batches and lengths."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for batch, length in _CHECKED:
            yield graph.make(batch, length)


def _distance(reference: torch.Tensor, found: torch.Tensor) -> float:
    """Largest difference, relative to the reference's largest entry if that is above 1; infinite for other shapes."""
    if reference.shape != found.shape:
        return float("inf")
    return float((reference - found).abs().max()) / max(1.0, float(reference.abs().max()))


def _session(runtime: Any, path: Path) -> Runner:
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    read = {value.name for value in session.get_inputs()}

    def run(inputs: dict[str, np.ndarray], outputs: list[str]) -> list[np.ndarray]:
        return session.run(outputs, {name: value for name, value in inputs.items() if name in read})

    return run


def check_graph(run: Runner, model: PreTrainedModel, graph: Graph, name: str, tolerance: float) -> float:
    """The largest difference of a graph that another runtime reads, over all outputs and a few batches and lengths.

    Args:
        run: gives the outputs with these names; inputs that the graph does not have are left out by it.
        name: of the file, for the message.
        tolerance: see `export_onnx`.

    Raises:
        TCSPError: the difference is above the tolerance.
    """
    difference = _difference(run, model, graph)
    if not difference <= tolerance and not difference <= 4.0 * _rounding(model, graph):
        raise TCSPError(
            f"{name} differs from PyTorch by {difference:.1e}, above the tolerance of {tolerance:.0e}: "
            "nothing was written."
        )
    return difference


def _difference(run: Runner, model: PreTrainedModel, graph: Graph) -> float:
    differences = [0.0]
    for inputs in _checked_inputs(graph):
        expected = graph.run(model, inputs)
        fed = {name: value.cpu().numpy() for name, value in inputs.items()}
        for value, output in zip(expected.values(), run(fed, list(expected)), strict=True):
            differences.append(_distance(value.detach().cpu(), torch.from_numpy(output)))
    return math.nan if any(map(math.isnan, differences)) else max(differences)


def _rounding(model: PreTrainedModel, graph: Graph) -> float:
    """Largest difference between the model in float32 and in float64, on the inputs of `_difference`."""
    exact = copy.deepcopy(model).double()
    differences = [0.0]
    for inputs in _checked_inputs(graph):
        doubled = {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}
        references = graph.run(exact, doubled)
        for value, reference in zip(graph.run(model, inputs).values(), references.values(), strict=True):
            differences.append(_distance(reference, value.double()))
    return max(differences)
