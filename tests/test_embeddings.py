"""Embedding tables, tied and untied output layers, and the size of random weights."""

import pytest
import torch
import transformers
from common import (
    ONE_SOURCE_CASES,
    UNEVEN,
    VOCABULARY,
    Case,
    D,
    find,
    largest_difference,
    make_dense,
    make_inputs,
    make_small,
    make_uneven,
    outputs,
)

per_case = pytest.mark.parametrize("case", ONE_SOURCE_CASES, ids=str)
SITES = UNEVEN["bert"]["site_hidden_sizes"]
BERT, T5 = UNEVEN["bert"], UNEVEN["t5"]


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
