"""Compiled and exported models: one graph, and what the model itself computes."""

import shutil

import pytest
import torch
import transformers
from common import (
    ONE_SOURCE_CASES,
    UNEVEN,
    VOCABULARY,
    Case,
    find,
    largest_difference,
    make_dense,
    make_inputs,
    make_uneven,
    outputs,
    rounding_error,
)

from tcsp_hf import modeling_tcsp

T5 = UNEVEN["t5"]


@pytest.mark.parametrize("case", [find("bert-ForSequenceClassification"), find("t5-EncoderModel")], ids=str)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compile_without_graph_breaks(case: Case, backend):
    model = make_uneven(case)
    inputs = make_inputs(case)
    expected = outputs(case, model, inputs)
    torch._dynamo.reset()
    try:
        found = outputs(case, _Compiled(model, backend), inputs)
    except torch._dynamo.exc.Unsupported:
        # with torch 2.6 transformers' own wrappers cannot be compiled whole: then its models cannot either
        with pytest.raises(torch._dynamo.exc.Unsupported):
            torch.compile(make_dense(case), fullgraph=True, backend=backend)(**inputs)
        pytest.skip(f"transformers {transformers.__version__} with torch {torch.__version__} breaks graphs itself")
    assert largest_difference(expected, found) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("case", ONE_SOURCE_CASES, ids=str)
def test_every_class_compiles_without_graph_breaks(case: Case):
    model = make_uneven(case)
    inputs = make_inputs(case)
    if case.head == "ForConditionalGeneration":
        inputs["use_cache"] = False
    torch._dynamo.reset()
    expected = outputs(case, model, inputs)
    assert largest_difference(expected, outputs(case, _Compiled(model, "aot_eager"), inputs)) <= 1e-5


class _Compiled:
    """A compiled model that still has a configuration and a lift."""

    def __init__(self, model: torch.nn.Module, backend: str) -> None:
        self._forward = torch.compile(model, fullgraph=True, backend=backend)
        self.config, self.lift = model.config, model.lift

    def __call__(self, **inputs):
        return self._forward(**inputs)


@pytest.mark.parametrize("case", [find("bert-ForSequenceClassification"), find("t5-EncoderModel")], ids=str)
def test_export(case: Case):
    model = make_uneven(case)
    inputs = make_inputs(case)
    batch = torch.export.Dim("batch", min=2, max=64)
    shapes = {name: {0: batch} for name in inputs}
    program = torch.export.export(model, (), inputs, dynamic_shapes=shapes, strict=False)
    other = {name: torch.cat([value, value.flip(0)]) for name, value in inputs.items()}
    with torch.no_grad():
        tolerance = max(1e-5, 4.0 * rounding_error(case, model, other))
        assert torch.allclose(program.module()(**other)[0], model(**other)[0], atol=tolerance)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="PyTorch compiles C++ for it")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch's compiler, of what it calls itself
@pytest.mark.parametrize("case", [find("bert-Model"), find("t5-EncoderModel")], ids=str)
def test_flex_attention(case: Case):
    # T5's encoder alone, with all heads: PyTorch's CPU code for other lengths and head counts does not compile
    fields = {"encoder_layer_kept_heads": None} if case.family == "t5" else {}
    model = make_uneven(case, **fields)
    inputs = make_inputs(case)
    expected = outputs(case, model, inputs)
    model.set_attn_implementation("flex_attention")
    assert largest_difference(expected, outputs(case, model, inputs)) <= 1e-4


@pytest.mark.skipif(not hasattr(torch.compiler, "is_exporting"), reason="transformers needs it to be compiled")
@pytest.mark.parametrize("case", [find("bert-Model"), find("t5-EncoderModel")], ids=str)
def test_compiled_batches_in_parts_where_their_size_is_fixed(case: Case, monkeypatch: pytest.MonkeyPatch):
    model, graphs = make_uneven(case), []

    def kept(graph: torch.fx.GraphModule, _: list[torch.Tensor]):
        graphs.append(graph)
        return graph.forward

    def parted(graph: torch.fx.GraphModule) -> bool:
        return any(node.target is torch.cat for node in graph.graph.nodes)

    monkeypatch.setattr(modeling_tcsp, "_ROWS", 18)
    # the first size of a graph is fixed in it, the later ones are not; the last would be six parts
    for batch, length, parts in ((4, 9, True), (6, 9, False), (3, 7, False), (9, 9, False), (6, 11, False)):
        if (batch, length) in ((4, 9), (6, 11)):
            torch._dynamo.reset()
            compiled = torch.compile(model, backend=kept)
        ids = torch.randint(5, VOCABULARY, (batch, length))
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        tolerance = max(1e-5, 4.0 * rounding_error(case, model, inputs))
        found = outputs(case, compiled, inputs)
        assert parted(graphs[-1]) == parts, (batch, length)
        assert largest_difference(outputs(case, model, inputs), found) <= tolerance
