"""What processors do faster, written over, in parts or laid out anew, gives what the plain way gives."""

import copy
from typing import Any

import pytest
import torch
import transformers
from common import (
    ONE_SOURCE_CASES,
    Case,
    find,
    largest_difference,
    make_inputs,
    make_labels,
    make_uneven,
    outputs,
    rounding_error,
)

from tcsp_hf import modeling_tcsp, modeling_tcsp_bert, modeling_tcsp_t5

per_case = pytest.mark.parametrize("case", ONE_SOURCE_CASES, ids=str)


@pytest.mark.parametrize("case", [find("bert-Model"), find("t5-Model")], ids=str)
def test_fast_paths_change_nothing(case: Case) -> None:
    """Heads that are padded for the fused attention, and maps that are added in place, against the plain way."""
    inputs = make_inputs(case)
    model = make_uneven(case, torch.float64)
    model.set_attn_implementation("sdpa")
    fast = outputs(case, model, inputs)
    model.set_attn_implementation("eager")  # no padding
    hooks = [m.register_forward_hook(lambda *_: None) for m in model.modules() if isinstance(m, torch.nn.Linear)]
    assert largest_difference(outputs(case, model, inputs), fast) < 1e-10  # hooked linears are not added in place
    for hook in hooks:
        hook.remove()
    assert largest_difference(outputs(case, model, inputs), fast) < 1e-10


@per_case
def test_results_written_over_and_large_batches_in_parts(case: Case):
    """What a processor does without gradients is what it does with them."""
    model, inputs = make_uneven(case), make_inputs(case)
    with pytest.MonkeyPatch.context() as patched:
        for module in (modeling_tcsp, modeling_tcsp_bert, modeling_tcsp_t5):
            patched.setattr(module, "may_overwrite", lambda: False)
        expected, tolerance = outputs(case, model, inputs), max(1e-4, 4.0 * rounding_error(case, model, inputs))
    assert largest_difference(expected, outputs(case, model, inputs)) <= tolerance
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(modeling_tcsp, "_ROWS", 1)  # every sequence alone
        assert largest_difference(expected, outputs(case, model, inputs)) <= tolerance


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_python", "relu", "silu"])
def test_activations_written_over_their_argument(activation: str):
    linear, act, states = torch.nn.Linear(4, 6), transformers.activations.ACT2FN[activation], torch.randn(5, 4)
    with torch.no_grad():
        expected = act(linear(states))
        assert torch.allclose(modeling_tcsp.activate(act, linear, states), expected, atol=1e-6)


def test_layout_for_decoding_keeps_values_and_files(tmp_path):
    case = find("t5-ForConditionalGeneration")
    model, inputs = make_uneven(case), make_inputs(case)
    expected, before = outputs(case, model, inputs), copy.deepcopy(model).state_dict()
    model.generate(inputs["input_ids"], max_new_tokens=3)
    moved = [name for name, value in model.named_parameters() if not value.is_contiguous()]
    assert "lm_head.weight" in moved and not any("embed" in name or "encoder." in name for name in moved)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert largest_difference(expected, outputs(case, model, inputs)) <= 1e-4
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert all(torch.equal(value, before[name]) and value.is_contiguous() for name, value in again.state_dict().items())


GENERATING = find("t5-ForConditionalGeneration")


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_generating_between_steps_does_not_change_the_training(mode: str) -> None:
    """Optimizers with fused kernels expect a weight's layout to stay what it was at the first step."""
    inputs = make_inputs(GENERATING)
    batch = {**inputs, **make_labels(GENERATING, inputs)}
    found = []
    for generates in (False, True):
        model = make_uneven(GENERATING, torch.float32, dropout_rate=0.0).train(mode == "train")
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
        for _ in range(4):
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if generates:
                model.eval().generate(inputs["input_ids"], max_new_tokens=2)
                model.train(mode == "train")
        found.append({name: value.clone() for name, value in model.state_dict().items()})
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_weights_are_ordinary_again_after_generating() -> None:
    inputs = make_inputs(GENERATING)
    model = make_uneven(GENERATING, torch.float32)
    with torch.inference_mode():
        model.generate(inputs["input_ids"], max_new_tokens=2)
    assert not all(weight.is_contiguous() for weight in model.parameters()), "nothing was laid out"
    assert all(value.is_contiguous() for value in model.state_dict().values())
    model.generate(inputs["input_ids"], max_new_tokens=2)
    model(**inputs, **make_labels(GENERATING, inputs)).loss.backward()
    assert all(weight.grad.is_contiguous() for weight in model.parameters() if weight.grad is not None)
    torch.nn.utils.parameters_to_vector(model.parameters())
    model.generate(inputs["input_ids"], max_new_tokens=2)  # within a step
    assert all(weight.is_contiguous() for weight in model.parameters())


def test_dropout_alone_may_be_training() -> None:
    """Monte Carlo dropout: the model in evaluation mode, its dropouts not."""
    model = make_uneven(find("t5-EncoderModel"), torch.float32)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Dropout):
            module.train("DenseReluDense" in name)
            module.p = 0.5
    inputs = make_inputs(find("t5-EncoderModel"))
    with torch.no_grad():
        one, other = (model(**inputs).last_hidden_state for _ in range(2))
    assert not torch.equal(one, other)


def test_what_a_hook_saw_stays_as_it_was() -> None:
    """Of a dropout, whose result would be written over; and a hook on all modules."""
    case = find("bert-Model")
    model, inputs = make_uneven(case), make_inputs(case)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def keep(module: Any, args: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor):
            seen.append((output, output.clone()))

    own = [layer.output.dropout.register_forward_hook(keep) for layer in model.encoder.layer]
    outputs(case, model, inputs)
    for hook in own:
        hook.remove()
    with torch.nn.modules.module.register_module_forward_hook(keep):
        outputs(case, model, inputs)
    assert len(seen) > 20 and all(torch.equal(tensor, copied) for tensor, copied in seen)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.jit, by torch.func itself
def test_function_transforms_without_gradients() -> None:
    case = find("bert-ForSequenceClassification")
    model, ids = make_uneven(case), make_inputs(case)["input_ids"]
    model.set_attn_implementation("eager")
    states = model.get_input_embeddings()(ids).detach()
    with torch.no_grad():
        together = torch.func.vmap(lambda one: model(inputs_embeds=one[None]).logits[0])(states)
        alone = torch.stack([model(inputs_embeds=one[None]).logits[0] for one in states])
        _, change = torch.func.jvp(lambda x: model(inputs_embeds=x).logits, (states,), (torch.ones_like(states),))
    assert torch.allclose(together, alone, atol=1e-5)
    assert bool(change.abs().sum() > 0)


@pytest.mark.parametrize("sizes", [(4, 8), (8, 4)], ids=str)
def test_flash_attention_gets_even_heads(sizes: tuple[int, int]) -> None:
    """transformers pads narrow values for it, and cuts wide ones."""
    for backend in ("flash_attention_2", "kernels-community/flash-attn"):
        parts = [torch.ones(1, 2, 3, size) for size in (sizes[0], sizes[0], sizes[1])]
        padded = modeling_tcsp.even_heads(backend, *parts)
        assert [part.shape[-1] for part in padded] == [8, 8, 8]
        assert all(torch.equal(new[..., : old.shape[-1]], old) for new, old in zip(padded, parts, strict=True))
        assert not any(new[..., old.shape[-1] :].any() for new, old in zip(padded, parts, strict=True))
