"""The compressed models do what transformers' own BERT and T5 do. Their sizes are uneven everywhere."""

import inspect

import pytest
import torch
import transformers
from common import (
    BERT_CASES,
    LAYERS,
    ONE_SOURCE_CASES,
    T5_CASES,
    UNEVEN,
    Case,
    D,
    find,
    largest_difference,
    make_inputs,
    make_labels,
    make_small,
    make_uneven,
    outputs,
    rounding_error,
)

import tcsp_hf
from tcsp_hf.modeling_tcsp import CACHE

per_case = pytest.mark.parametrize("case", ONE_SOURCE_CASES, ids=str)
BOTH = [find("bert-ForMaskedLM"), find("t5-ForConditionalGeneration")]
both = pytest.mark.parametrize("case", BOTH, ids=str)
SITES = UNEVEN["bert"]["site_hidden_sizes"]
BERT, T5 = UNEVEN["bert"], UNEVEN["t5"]


@per_case
def test_output_class_is_the_stock_one(case: Case):
    """Same output class and fields as the dense model, as a tuple too."""
    model = make_uneven(case)
    inputs = make_inputs(case)
    stock = make_small(case)
    with torch.no_grad():
        found, dense_fields = model(**inputs), stock(**inputs)
        as_tuple = model(**inputs, return_dict=False)
    assert type(found) is type(dense_fields) and list(found) == list(dense_fields)
    assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[0], found[0])


@per_case
def test_a_configuration_that_asks_for_tuples(case: Case, tmp_path):
    """`return_dict: false` in a `config.json` is for the caller: what is inside still reads by name."""
    model = make_uneven(case)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, return_dict=False, output_hidden_states=True).eval()
    inputs = make_inputs(case)
    inputs.update(make_labels(case, inputs))
    with torch.no_grad():
        expected, found = model(**inputs, output_hidden_states=True), again(**inputs)
        assert isinstance(found, tuple)
        for one, other in zip(found, expected.to_tuple(), strict=True):
            assert not isinstance(one, torch.Tensor) or torch.equal(one, other)
        if case.head == "ForConditionalGeneration":
            ids = inputs["input_ids"]
            written = [each.generate(ids, max_new_tokens=4, num_beams=2) for each in (model, again)]
            assert torch.equal(*written)
    assert again.config.return_dict is False


# Attention ----------------------------------------------------------------------------------------------------------


@per_case
def test_attention_back_ends_agree_and_switch(case: Case):
    model = make_uneven(case)
    inputs = make_inputs(case)
    assert model.config._attn_implementation == "sdpa"
    expected, error = outputs(case, model, inputs), rounding_error(case, model, inputs)
    model.set_attn_implementation("eager")
    assert all(
        module.config._attn_implementation == "eager" for module in model.modules() if hasattr(module, "scaling")
    )
    tolerance = max(1e-4, 1.5 * (error + rounding_error(case, model, inputs)))
    assert largest_difference(expected, outputs(case, model, inputs)) <= tolerance
    model.set_attn_implementation("sdpa")
    assert largest_difference(expected, outputs(case, model, inputs)) == 0.0


@both
def test_attention_back_end_is_chosen_at_load(case: Case, tmp_path):
    make_uneven(case).save_pretrained(tmp_path)
    model = case.auto_class.from_pretrained(tmp_path, attn_implementation="eager")
    assert model.config._attn_implementation == "eager"
    with torch.no_grad():
        assert model(**make_inputs(case), output_attentions=True).get("attentions", ()) is not None
    with pytest.raises(ValueError, match="nonsense"):
        case.auto_class.from_pretrained(tmp_path, attn_implementation="nonsense")


@pytest.mark.parametrize("case", BERT_CASES, ids=str)
def test_bert_hidden_states_and_attentions(case: Case):
    model = make_uneven(case)
    model.set_attn_implementation("eager")
    inputs = make_inputs(case)
    with torch.no_grad():
        found = model(**inputs, output_hidden_states=True, output_attentions=True)
    rows = inputs["input_ids"].numel() // 9
    assert [tuple(states.shape) for states in found.hidden_states] == [(rows, 9, SITES[i]) for i in (0, 2, 4)]
    heads = BERT["layer_attention_heads"]
    assert [tuple(weights.shape) for weights in found.attentions] == [(rows, n, 9, 9) for n in heads]
    for weights in found.attentions:
        assert torch.allclose(weights.sum(-1), torch.ones(()))
    if case.head == "Model":
        assert torch.equal(found.hidden_states[-1], found.last_hidden_state)


@pytest.mark.parametrize("case", [case for case in T5_CASES if case.decodes], ids=str)
def test_t5_hidden_states_and_attentions(case: Case):
    model = make_uneven(case)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        found = model(**make_inputs(case), output_hidden_states=True, output_attentions=True)
    shapes = {
        name: [tuple(tensor.shape) for tensor in found[name]]
        for name in found
        if name.endswith(("hidden_states", "attentions"))
    }
    assert shapes == {
        "encoder_hidden_states": [(3, 9, T5["encoder_hidden_size"])] * (LAYERS + 1),
        "decoder_hidden_states": [(3, 6, T5["d_model"])] * (LAYERS + 1),
        "encoder_attentions": [(3, len(kept), 9, 9) for kept in T5["encoder_layer_kept_heads"]],
        "decoder_attentions": [(3, len(kept), 6, 6) for kept in T5["decoder_layer_kept_heads"]],
        "cross_attentions": [(3, n, 6, 9) for n in T5["cross_layer_attention_heads"]],
    }


def test_t5_reads_its_encoder_once_given():
    case = find("t5-ForConditionalGeneration")
    model = make_uneven(case)
    inputs = make_inputs(case)
    with torch.no_grad():
        expected = model(**inputs)
        memory = model.get_encoder()(inputs["input_ids"], attention_mask=inputs["attention_mask"])
        del inputs["input_ids"]
        assert torch.equal(model(**inputs, encoder_outputs=memory).logits, expected.logits)


def test_t5_cache_gives_what_the_whole_sequence_gives():
    case = find("t5-ForConditionalGeneration")
    model = make_uneven(case, torch.float64)
    inputs = make_inputs(case)
    del inputs["decoder_attention_mask"]
    targets = inputs.pop("decoder_input_ids")
    with torch.no_grad():
        expected = model(**inputs, decoder_input_ids=targets).logits
        cache, steps = None, []
        for i in range(targets.shape[1]):
            found = model(**inputs, decoder_input_ids=targets[:, i : i + 1], use_cache=True, **{CACHE: cache})
            cache = found[CACHE]
            steps.append(found.logits)
    assert torch.allclose(torch.cat(steps, dim=1), expected, atol=1e-6)


@pytest.mark.parametrize("layers", [(1, 3), (3, 1)])
@pytest.mark.parametrize("how", [{}, {"num_beams": 2}, {"cache_implementation": "static"}], ids=str)
def test_t5_stacks_of_different_depths_generate(layers, how):
    """transformers 5.24 gives a stock T5 a cache of as many layers as its encoder has."""
    case = find("t5-ForConditionalGeneration")
    even = {name: None for name in T5 if "_layer_" in name}
    model = make_uneven(case, **{**even, "num_layers": layers[0], "num_decoder_layers": layers[1]})
    ids = make_inputs(case)["input_ids"]
    found = model.generate(ids, max_new_tokens=4, **how)
    assert torch.equal(found, model.generate(ids, max_new_tokens=4, use_cache=False, num_beams=how.get("num_beams", 1)))


@pytest.mark.parametrize("size", [3, 4, 20])
def test_bert_dropout_and_chunks_act_in_training_only(size):
    """Chunks of 9 tokens; the last may be shorter, or the only one."""
    case = find("bert-ForSequenceClassification")
    model = make_uneven(case, hidden_dropout_prob=0.5, chunk_size_feed_forward=size)
    inputs = make_inputs(case)
    expected = outputs(case, model, inputs)
    assert largest_difference(expected, outputs(case, model, inputs)) == 0.0
    assert largest_difference(expected, outputs(case, make_uneven(case), inputs)) <= 1e-5, "chunks change nothing"
    model.train()
    assert largest_difference(expected, outputs(case, model, inputs)) > 0.0


# Training -----------------------------------------------------------------------------------------------------------


def _enable_checkpointing(model: torch.nn.Module) -> None:
    """transformers renames it on its way to version 6."""
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()


def _gradients(case: Case, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    inputs = make_inputs(case)
    labels = make_labels(case, inputs)
    if labels:
        model(**inputs, **labels).loss.backward()
    else:
        found = model(**inputs)
        total = found.last_hidden_state.square().sum()
        if found.get("pooler_output") is not None:
            total = total + found.pooler_output.sum()
        total.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@per_case
def test_gradient_checkpointing(case: Case):
    """Every parameter gets a gradient, and checkpointing gives the same ones."""
    no_dropout = (
        {"dropout_rate": 0.0}
        if case.family == "t5"
        else {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    )
    model = make_uneven(case, torch.float64, **no_dropout).train()
    plain = _gradients(case, model)
    assert all(gradient is not None for gradient in plain.values())
    still = {name for name, gradient in plain.items() if float(gradient.abs().max()) < 1e-14}
    # a softmax over positions or choices does not see what is added to all: that gradient is zero, but for rounding
    unseen = {"ForQuestionAnswering": {"qa_outputs.bias"}, "ForMultipleChoice": {"classifier.bias"}}
    assert still == unseen.get(case.head, set())
    model.zero_grad()
    _enable_checkpointing(model)
    calls = []
    attention = next(module for module in model.modules() if hasattr(module, "scaling"))
    attention.register_forward_hook(lambda *_: calls.append(1))
    again = _gradients(case, model)
    assert len(calls) == 2, "forward, and once more going back"
    assert max(float((plain[name] - again[name]).abs().max()) for name in plain) <= 1e-12


# Refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["encoder_hidden_states", "encoder_attention_mask", "cache", "past_key_values"])
@pytest.mark.parametrize("head", ["Model", "ForMaskedLM", "ForTokenClassification"])
def test_bert_refuses_arguments_of_cross_attention(name, head):
    case = Case("bert", head)
    model = make_uneven(case)
    with pytest.raises((ValueError, TypeError), match=name):
        model(**make_inputs(case), **{name: torch.ones(3, 9)})


def test_t5_encoder_refuses_a_cache():
    case = find("t5-EncoderModel")
    model = make_uneven(case)
    with pytest.raises((ValueError, TypeError), match="use_cache"):
        model.encoder(**make_inputs(case), use_cache=True)


def test_every_class_is_public():
    for case in ONE_SOURCE_CASES:
        model_class = getattr(tcsp_hf, case.small_class_name)
        assert inspect.isclass(model_class) and issubclass(model_class, transformers.PreTrainedModel)
        assert model_class.config_class is (tcsp_hf.TCSPBertConfig if case.family == "bert" else tcsp_hf.TCSPT5Config)


# Lift -----------------------------------------------------------------------------------------------------------------


def test_lift_is_affine_and_not_trained():
    for case in (find("bert-Model"), find("t5-Model")):
        model = make_uneven(case)
        k = model.config.hidden_size
        eye, zero = torch.eye(k), torch.zeros(1, k)
        weight = (model.lift(eye) - model.lift(zero)).T
        assert weight.shape == (D, k)
        z = torch.randn(4, 5, k, generator=torch.Generator().manual_seed(0))
        assert torch.allclose(model.lift(z), z @ weight.T + model.lift(zero), atol=1e-5)
        assert not [name for name, _ in model.named_parameters() if "lift" in name]
        assert [name for name in model.state_dict() if "lift_map.weight" in name]


def test_lift_of_the_encoder_and_the_decoder():
    model = make_uneven(find("t5-Model"))
    assert model.lift(torch.ones(2, 3, T5["encoder_hidden_size"]), stack="encoder").shape == (2, 3, D)
    assert model.lift(torch.ones(2, 3, T5["d_model"])).shape == (2, 3, D)
