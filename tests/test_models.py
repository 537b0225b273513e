"""The compressed models do what transformers' own BERT and T5 do. Their sizes are uneven everywhere."""

import copy
import inspect
import shutil

import pytest
import torch
import transformers
from common import (
    BERT_CASES,
    LAYERS,
    ONE_SOURCE_CASES,
    T5_CASES,
    UNEVEN,
    VOCABULARY,
    Case,
    D,
    find,
    largest_difference,
    make_dense,
    make_inputs,
    make_labels,
    make_small,
    make_uneven,
    outputs,
    rounding_error,
)
from transformers import pipeline

import tcsp_hf
from tcsp_hf import modeling_tcsp, modeling_tcsp_bert, modeling_tcsp_t5
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


# Embeddings and ties --------------------------------------------------------------------------------------------------


@per_case
def test_inputs_embeds(case: Case):
    """They are rows of the compressed tables, in the coordinates of the first site."""
    model = make_uneven(case)
    inputs = make_inputs(case)
    expected = outputs(case, model, inputs)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    assert embeds.shape[-1] == (SITES[0] if case.family == "bert" else T5["encoder_hidden_size"])
    with_embeds = {**inputs, "inputs_embeds": embeds}
    ids = with_embeds.pop("input_ids")
    if case.family == "t5" and case.head in ("ForSequenceClassification", "ForQuestionAnswering"):
        # as the stock heads: they make the decoder's input of the ids
        with_embeds["decoder_input_ids"] = model._shift_right(ids)
        if case.head == "ForSequenceClassification":  # which needs them for its end tokens, too
            with pytest.raises(NotImplementedError, match="embeddings"):
                model(**with_embeds)
            return
    assert largest_difference(expected, outputs(case, model, with_embeds)) == 0.0


@pytest.mark.parametrize("case", [find("bert-Model"), find("t5-Model"), find("t5-EncoderModel")], ids=str)
def test_exactly_one_of_ids_and_embeds(case: Case):
    model = make_uneven(case)
    inputs = make_inputs(case)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model(**inputs, inputs_embeds=embeds)
    del inputs["input_ids"]
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model(**inputs)


@per_case
@pytest.mark.parametrize("size", [VOCABULARY + 7, VOCABULARY - 20])
def test_resize_token_embeddings(case: Case, size, tmp_path):
    model = make_uneven(case)
    inputs = {name: ids.clamp(max=VOCABULARY - 21) for name, ids in make_inputs(case).items()}
    expected = outputs(case, model, inputs)
    model.resize_token_embeddings(size)
    assert model.config.vocab_size == size == model.get_input_embeddings().num_embeddings
    inner = [module for module in model.modules() if isinstance(module, transformers.PreTrainedModel)]
    assert {module.config.vocab_size for module in inner} == {size}
    tables = [module for module in model.modules() if isinstance(module, torch.nn.Embedding)]
    assert not [table for table in tables if table.num_embeddings == VOCABULARY]
    found = outputs(case, model, inputs)
    for name, value in found.items():
        if value.shape[-1] == size:  # logits over the vocabulary
            kept = min(size, VOCABULARY)
            value, expected[name] = value[..., :kept], expected[name][..., :kept]
        assert torch.allclose(value, expected[name], atol=1e-5), name
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert largest_difference(outputs(case, loaded, inputs), found) <= 1e-5


@pytest.mark.parametrize("head", ["ForMaskedLM", "ForPreTraining"])
def test_bert_tied_head(head, tmp_path):
    case = Case("bert", head)
    model = make_uneven(case, tie_word_embeddings=True, mlm_head_size=SITES[0])
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    inputs = make_inputs(case)
    assert largest_difference(outputs(case, model, inputs), outputs(case, loaded, inputs)) <= 1e-6
    loaded.resize_token_embeddings(VOCABULARY + 3)
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert loaded.get_output_embeddings().bias.shape == (VOCABULARY + 3,)


def test_bert_tied_head_of_another_width_is_refused():
    with pytest.raises(ValueError, match=r"mlm_head_size is 14, but the embeddings have width 12"):
        make_uneven(find("bert-ForMaskedLM"), tie_word_embeddings=True)


def test_bert_untied_head_stays_untied(tmp_path):
    model = make_uneven(find("bert-ForMaskedLM"))
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.get_output_embeddings().weight.shape == (VOCABULARY, BERT["mlm_head_size"])
    assert torch.equal(loaded.get_output_embeddings().weight, model.get_output_embeddings().weight)


@pytest.mark.parametrize("tied", [True, False])
def test_t5_lm_head(tied, tmp_path):
    case = find("t5-ForConditionalGeneration")
    model = make_uneven(case, encoder_hidden_size=None, tie_lm_head=tied)
    assert (model.lm_head.weight is model.shared.weight) == tied
    assert model.encoder.embed_tokens.weight is model.shared.weight is model.decoder.embed_tokens.weight
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert (loaded.lm_head.weight is loaded.shared.weight) == tied
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    inputs = make_inputs(case)
    assert largest_difference(outputs(case, model, inputs), outputs(case, loaded, inputs)) <= 1e-6


@pytest.mark.parametrize("end", [None, [1, 2]])
def test_t5_classifier_without_an_end_token_is_refused(end):
    with pytest.raises(ValueError, match=r"eos_token_id is .* must be a number"):
        make_uneven(find("t5-ForSequenceClassification"), eos_token_id=end)


def test_t5_tied_head_with_own_bases_is_refused():
    with pytest.raises(ValueError, match="tie_lm_head is True, but encoder_hidden_size is 20"):
        make_uneven(find("t5-ForConditionalGeneration"), tie_lm_head=True)


def test_t5_stacks_with_own_widths_have_own_tables():
    model = make_uneven(find("t5-ForConditionalGeneration"))
    assert model.encoder.embed_tokens.weight is model.shared.weight
    assert model.decoder.embed_tokens.weight.shape == (VOCABULARY, T5["d_model"])


@per_case
def test_random_weights_start_as_large_as_the_stock_ones(case: Case):
    """Also those of modules without parameters of their own: a new head, an attention's or a network's linears."""
    dense = make_dense(case, torch.float32)
    small = make_small(case, hidden_size=D)
    stock, ours = (
        {name: parameter.detach() for name, parameter in type(model)(model.config).named_parameters()}
        for model in (dense, small)
    )
    compared = [name for name in ours if name in stock and ours[name].numel() >= 256]
    assert compared
    for name in compared:
        assert 0.7 < float(ours[name].std() / stock[name].std()) < 1.4, name


# Devices, number formats, compilers -----------------------------------------------------------------------------------


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


# Pipelines ------------------------------------------------------------------------------------------------------------


def test_pipelines(tokenizer, tmp_path):
    """From a folder, as a user would: the pipeline finds model, configuration and tokenizer by itself."""
    tasks = {
        "text-classification": "bert-ForSequenceClassification",
        "token-classification": "bert-ForTokenClassification",
        "fill-mask": "bert-ForMaskedLM",
        "feature-extraction": "bert-Model",
    }
    for task, name in tasks.items():
        case = find(name)
        folder = tmp_path / task
        make_small(case).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        pipe = pipeline(task, model=str(folder))
        assert type(pipe.model).__name__ == case.small_class_name
        text = "w1 w2 [MASK] w4" if task == "fill-mask" else "w1 w2 w3 w4"
        found = pipe([text, text + " w5 w6"], batch_size=2)
        assert len(found) == 2
        if task == "text-classification":
            assert found[0]["label"].startswith("LABEL_") and 0 < found[0]["score"] < 1
        elif task == "fill-mask":
            assert len(found[0]) == 5 and all(0 < guess["score"] < 1 for guess in found[0])
        elif task == "token-classification":
            assert len(found[0]) == 4 and all(token["entity"].startswith("LABEL_") for token in found[0])
        else:
            assert len(found[1][0]) == 8 and len(found[1][0][0]) == 16


def test_auto_class_of_question_answering(tokenizer, tmp_path):
    """Version 5 of transformers has no pipeline for it; the Auto class and the tokenizer's pair do the work."""
    case = find("bert-ForQuestionAnswering")
    make_small(case).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = transformers.AutoModelForQuestionAnswering.from_pretrained(tmp_path)
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
    inputs = loaded("w1 w2", "w3 w4 w5", return_tensors="pt")
    with torch.no_grad():
        found = model(**inputs)
    assert found.start_logits.shape == found.end_logits.shape == inputs["input_ids"].shape


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
