"""Number formats, device maps, copies."""

import copy

import pytest
import torch
from common import ONE_SOURCE_CASES, UNEVEN, Case, find, largest_difference, make_inputs, make_uneven, outputs

per_case = pytest.mark.parametrize("case", ONE_SOURCE_CASES, ids=str)
BOTH = [find("bert-ForMaskedLM"), find("t5-ForConditionalGeneration")]
both = pytest.mark.parametrize("case", BOTH, ids=str)
T5 = UNEVEN["t5"]


@per_case
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(case: Case, dtype, tmp_path):
    model = make_uneven(case, **({"initializer_factor": 0.3} if case.family == "t5" else {}))
    inputs = make_inputs(case)
    expected = outputs(case, model, inputs)
    model.save_pretrained(tmp_path)
    half = type(model).from_pretrained(tmp_path, dtype=dtype)
    assert half.dtype == dtype
    for name, value in outputs(case, half, inputs).items():
        assert torch.isfinite(value).all()
        assert float((value.float() - expected[name]).norm() / expected[name].norm()) <= 0.05, name


def test_t5_keeps_its_feed_forward_output_in_float32(tmp_path):
    """As transformers' own T5 in float16; everything else is half."""
    model = make_uneven(find("t5-ForConditionalGeneration"))
    model.save_pretrained(tmp_path)
    half = type(model).from_pretrained(tmp_path, dtype=torch.float16)
    wide = [name for name, parameter in half.named_parameters() if parameter.dtype == torch.float32]
    assert wide and all(".wo." in name for name in wide)


@both
@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}, "auto"], ids=str)
def test_device_map(case: Case, device_map, tmp_path):
    model = make_uneven(case)
    model.save_pretrained(tmp_path)
    placed = type(model).from_pretrained(tmp_path, device_map=device_map)
    inputs = make_inputs(case)
    on = {name: value.to(placed.device) for name, value in inputs.items()}
    found = {name: value.cpu() for name, value in outputs(case, placed, on).items()}
    assert largest_difference(outputs(case, model, inputs), found) <= 1e-3


def test_a_deep_copy_is_independent():
    case = find("bert-Model")
    model = make_uneven(case)
    inputs = make_inputs(case)
    expected = outputs(case, model, inputs)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert largest_difference(expected, outputs(case, model, inputs)) == 0.0
