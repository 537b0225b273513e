"""What a compressed model is and keeps of the dense one, and what cannot be compressed is refused by name."""

import copy
import math

import pytest
import torch
import transformers
from common import (
    CASES,
    KINDS,
    ONE_SOURCE_CASES,
    VOCABULARY,
    Case,
    D,
    calibrated,
    dense_and_statistics,
    find,
    largest_difference,
    make_dense,
    make_inputs,
    make_rows,
    make_small,
    outputs,
)

import tcsp_hf
from tcsp_hf import TCSPError, calibrate, compress
from tcsp_hf.compression import count_parameters, removed_fraction

per_case = pytest.mark.parametrize("case", CASES, ids=str)
BERT = find("bert-ForSequenceClassification")
T5 = find("t5-ForConditionalGeneration")
both = pytest.mark.parametrize("case", [BERT, T5], ids=str)


# What a compressed model is -------------------------------------------------------------------------------------------


@per_case
@pytest.mark.parametrize(("projection", "subspace"), KINDS)
def test_hidden_size(case: Case, projection, subspace):
    """The class, the widths and the provenance that were asked for; outputs of the dense model's shapes."""
    dense, stats = dense_and_statistics(case, torch.float32)
    small = compress(dense, stats, hidden_size=16, projection=projection, subspace=subspace)
    assert type(small) is getattr(tcsp_hf, case.small_class_name)
    config = small.config
    assert config.hidden_size == 16 and config.source_hidden_size == D
    assert set(config.site_widths().values()) == {16}
    assert config.projection["kind"] == projection and config.projection["subspace"] == subspace
    assert small.get_input_embeddings().weight.shape == (VOCABULARY, 16)
    assert not small.training and small.dtype == dense.dtype and small.device == dense.device
    inputs = make_inputs(case)
    largest_difference(outputs(case, dense, inputs), outputs(case, small, inputs))


def test_provenance():
    model, stats = dense_and_statistics(BERT)
    small = compress(model, stats, hidden_size=16, subspace="balanced", epsilon=0.7)
    found = small.config.projection
    count = count_parameters(model)
    assert found["method_version"] == 1
    assert found["source_model"] == "BertForSequenceClassification" and found["source_model_type"] == "bert"
    assert found["source_hidden_size"] == D and found["epsilon"] == 0.7
    assert found["source_parameters"] == count.total
    assert found["source_non_embedding_parameters"] == count.non_embedding
    assert found["calibration"] == stats.summary()
    assert found["removed"] == pytest.approx(removed_fraction(model, small), abs=1e-6)
    assert [site["name"] for site in found["sites"]] == list(stats.sites)
    assert all(0.3 < site["kept_energy"] < 1 for site in found["sites"])
    assert compress(model, stats, hidden_size=16, subspace="pca").config.projection["epsilon"] is None


def test_labels_and_generation_settings_are_kept():
    names = {0: "bad", 1: "fair", 2: "good"}
    dense = make_dense(BERT, id2label=names, label2id={name: i for i, name in names.items()})
    small = compress(dense, calibrated(BERT, dense), hidden_size=16)
    assert small.config.id2label == names and small.config.label2id == {"bad": 0, "fair": 1, "good": 2}
    dense = make_dense(T5)
    dense.generation_config.num_beams = 4
    small = compress(dense, calibrated(T5, dense), hidden_size=16)
    assert small.generation_config.num_beams == 4
    small.generation_config.num_beams = 1
    assert dense.generation_config.num_beams == 4


def test_one_basis_or_one_for_each_stack():
    shared, own = (make_small(T5, projection=kind) for kind in ("shared", "per_site"))
    assert shared.encoder.embed_tokens.weight is shared.decoder.embed_tokens.weight is shared.shared.weight
    assert not torch.equal(own.encoder.embed_tokens.weight, own.decoder.embed_tokens.weight)
    assert own.encoder.embed_tokens.weight is own.shared.weight
    assert make_small(T5).config.encoder_hidden_size is None, "shared is the default of a T5"
    assert make_small(BERT).config.projection["kind"] == "per_site", "and per_site of a BERT"


def test_norms_make_up_for_what_is_left_out():
    """A norm's weight is `c sqrt(D / k)`, where `c²` is the energy that the subspace keeps at that very site."""
    for case in (find("bert-Model"), find("t5-Model")):
        dense, stats = dense_and_statistics(case)
        small = compress(dense, stats, hidden_size=16, subspace="pca", projection="shared")
        weights = [value.detach() for name, value in small.named_parameters() if name.endswith("norm.weight")]
        assert len(weights) == len(stats.sites)
        if case.family == "bert":
            gamma = dense.encoder.layer[1].output.LayerNorm.weight
            basis = small.lift_map.weight / gamma.detach()[:, None]
        else:
            basis = small.encoder.lift_map.weight / dense.encoder.final_layer_norm.weight.detach()[:, None]
        assert torch.allclose(basis.T @ basis, torch.eye(16, dtype=torch.float64), atol=1e-9)
        expected = {
            name: float((basis.T @ site.second_moment @ basis).trace() / site.second_moment.trace())
            for name, site in stats.sites.items()
        }
        assert len({round(gain, 4) for gain in expected.values()}) > 3 and max(expected.values()) < 0.99
        found = sorted(float(weight[0]) for weight in weights)
        assert found == pytest.approx(sorted(math.sqrt(gain * D / 16) for gain in expected.values()), abs=1e-9)
        assert all(torch.equal(weight, weight[:1].expand(16)) for weight in weights)


@per_case
def test_more_directions_are_better(case: Case):
    dense, stats = dense_and_statistics(case, torch.float32)
    inputs = make_inputs(case)
    expected = outputs(case, dense, inputs)

    def error(k: int) -> float:
        found = outputs(case, compress(dense, stats, hidden_size=k), inputs)
        return sum(float((found[name] - expected[name]).square().mean()) for name in expected)

    narrow, wide, full = error(8), error(24), error(D)
    assert full < 1e-6 < wide < narrow


@both
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_number_format_is_kept(case: Case, dtype):
    dense = make_dense(case, torch.float32).to(dtype)
    small = compress(dense, calibrated(case, dense), hidden_size=24)
    assert {parameter.dtype for parameter in small.parameters()} == {dtype}
    assert small.lift(torch.zeros(1, 24, dtype=dtype)).dtype == dtype
    inputs = make_inputs(case)
    for value in outputs(case, small, inputs).values():
        assert torch.isfinite(value).all()


def test_a_t5_keeps_its_wide_weights(tmp_path):
    """transformers loads a float16 T5 with `wo` in float32."""
    make_dense(T5, torch.float32).save_pretrained(tmp_path)
    dense = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path, dtype=torch.float16)
    small = compress(dense, calibrated(T5, dense), hidden_size=16)
    wide = {name for name, parameter in small.named_parameters() if parameter.dtype == torch.float32}
    assert wide == {name for name, parameter in dense.named_parameters() if parameter.dtype == torch.float32} != set()


@pytest.mark.parametrize("case", ONE_SOURCE_CASES, ids=str)
def test_the_dense_model_is_left_alone(case: Case):
    dense = make_dense(case, torch.float32).train()
    stats = calibrated(case, dense)
    before = {name: value.clone() for name, value in dense.state_dict().items()}
    config = copy.deepcopy(dense.config.to_dict())
    small = compress(dense, stats, hidden_size=D)
    with torch.no_grad():
        for tensor in (*small.parameters(), *small.buffers()):
            tensor.zero_()  # nothing is shared
    small.config.vocab_size = 3
    assert dense.config.to_dict() == config
    assert all(module.training for module in dense.modules())
    assert all(parameter.requires_grad for parameter in dense.parameters())
    for name, value in dense.state_dict().items():
        assert torch.equal(value, before[name]), name


@both
def test_the_same_twice(case: Case):
    one, other = make_small(case), make_small(case)
    assert one.config.to_dict() == other.config.to_dict()
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


@both
def test_attention_back_end_is_kept(case: Case):
    dense = make_dense(case)
    dense.set_attn_implementation("eager")
    assert compress(dense, calibrated(case, dense), hidden_size=16).config._attn_implementation == "eager"


def test_a_bert_without_pooler(tmp_path):
    """As sentence-embedding models have it."""
    case = find("bert-Model")
    dense = make_dense(case)
    bare = transformers.BertModel(dense.config, add_pooling_layer=False).to(torch.float64).eval()
    bare.load_state_dict({name: value for name, value in dense.state_dict().items() if "pooler" not in name})
    stats = calibrate(bare, make_rows(case), progress=False)
    small = compress(bare, stats, hidden_size=D)
    inputs = make_inputs(case)
    assert largest_difference(outputs(case, bare, inputs), outputs(case, small, inputs)) <= 1e-9
    small = compress(bare, stats, remove=0.4)
    assert removed_fraction(bare, small) >= 0.4 and small.pooler is None
    small.save_pretrained(tmp_path)
    loaded = transformers.AutoModel.from_pretrained(tmp_path, add_pooling_layer=False, dtype="auto")
    assert largest_difference(outputs(case, small, inputs), outputs(case, loaded, inputs)) <= 1e-9
    assert transformers.AutoModel.from_pretrained(tmp_path).pooler is not None, "a new one, as in transformers"


# What cannot be compressed --------------------------------------------------------------------------------------------

TINY = {
    "vocab_size": VOCABULARY,
    "hidden_size": D,
    "num_attention_heads": 4,
    "num_hidden_layers": 1,
    "intermediate_size": 40,
    "max_position_embeddings": 40,
}


def unsupported() -> dict[str, tuple[torch.nn.Module, str]]:
    """Name -> (model, what the message must say)."""
    bert = transformers.BertConfig(**TINY)
    gpt2 = transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=D, n_head=4, n_layer=1, n_positions=40)
    return {
        "gpt2": (transformers.GPT2LMHeadModel(gpt2), r"GPT2LMHeadModel \(model_type 'gpt2'\) is not a supported"),
        "roberta": (
            transformers.RobertaModel(transformers.RobertaConfig(**TINY)),
            r"RobertaModel \(model_type 'roberta'\) is not a supported",
        ),
        "bert as a language model": (
            transformers.BertLMHeadModel(transformers.BertConfig(**TINY, is_decoder=True)),
            "BertLMHeadModel is not a supported class",
        ),
        "bert as a decoder": (
            transformers.BertModel(transformers.BertConfig(**TINY, is_decoder=True)),
            "BertModel has is_decoder=True: only BERT encoders without cross-attention",
        ),
        "bert with cross-attention": (
            transformers.BertModel(transformers.BertConfig(**TINY, is_decoder=True, add_cross_attention=True)),
            "is_decoder=True|add_cross_attention=True",
        ),
        "compressed": (make_small(BERT), "TCSPBertForSequenceClassification .* is compressed already"),
        "a part": (transformers.BertModel(bert).encoder.layer[0], "BertLayer .* is not a supported"),
        "no model": (torch.nn.Linear(3, 3), "Linear .* is not a supported architecture"),
    }


@pytest.mark.parametrize("name", unsupported().keys())
def test_unsupported_models(name):
    """Refused by name, before any work, by both steps."""
    model, named = unsupported()[name]
    _, stats = dense_and_statistics(BERT)
    with pytest.raises(TCSPError, match=named):
        calibrate(model, [{"input_ids": [3, 4]}], progress=False)
    with pytest.raises(TCSPError, match=named):
        compress(model, stats, hidden_size=16)


def test_relative_positions_are_refused():
    model = make_dense(BERT)
    model.config.position_embedding_type = "relative_key"
    with pytest.raises(TCSPError, match="position_embedding_type='relative_key': only 'absolute'"):
        calibrated(BERT, model)


def test_weights_that_are_not_finite():
    """Statistics from before a weight broke; the fingerprint samples weights and may not see it."""
    model, stats = dense_and_statistics(BERT)
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.bert.encoder.layer[0].output.dense.bias[2] = float("nan")
    with pytest.raises(TCSPError, match=r"another model|NaN or an infinity"):
        compress(broken, stats, hidden_size=16)
