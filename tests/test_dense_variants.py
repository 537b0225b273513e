"""Dense models as they come: with settings of other libraries, in training mode, with heads of their own habits."""

import logging
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from common import Case, dense_and_sample, find, make_dense, make_inputs, make_rows, make_small
from torch.nn.utils import prune

import tcsp_hf
from tcsp_hf import TCSPError, calibrate, compress
from tcsp_hf.export.plain_bert import to_plain_bert

CLASSIFIER, WRITER = find("bert-ForSequenceClassification"), find("t5-ForConditionalGeneration")
LATENCY = import_module("tcsp_hf.compression.latency")


def statistics(case: Case, model: Any) -> Any:
    return calibrate(model, make_rows(case, 40), progress=False)


def test_settings_of_other_libraries(tmp_path) -> None:
    """The first multilingual and Chinese BERTs carry what TensorFlow's pooler was made with."""
    model = make_dense(CLASSIFIER, torch.float32)
    others = {"pooler_fc_size": 768, "pooler_num_fc_layers": 3, "pooler_type": "first_token_transform", "mlm_x": 1}
    for name, value in {**others, "classifier_note": "kept"}.items():
        setattr(model.config, name, value)
    small = compress(model, statistics(CLASSIFIER, model), hidden_size=16)
    assert not any(hasattr(small.config, name) for name in others)
    small.save_pretrained(tmp_path)
    assert type(small).from_pretrained(tmp_path).config.classifier_note == "kept"


@pytest.mark.parametrize("case", [CLASSIFIER, WRITER, find("t5-EncoderModel")], ids=str)
def test_a_model_that_gives_tuples(case: Case) -> None:
    model = make_dense(case, torch.float32)
    model.config.return_dict = False
    small = compress(model, statistics(case, model), remove=0.3)
    assert model.config.return_dict is False, "it is the user's"
    assert small.config.return_dict is False and small.config.projection["removed"] >= 0.3


@pytest.mark.parametrize("silent", ["values", "neurons"])
@pytest.mark.parametrize("options", [{"remove": 0.3}, {"hidden_size": 24}], ids=str)
def test_a_block_that_says_nothing(silent: str, options: dict[str, Any]) -> None:
    """Heads pruned by zeros, a network of dead ReLUs: a T5 has no constant beside them."""
    case = find("t5-ForSequenceClassification")
    model = make_dense(case, torch.float32)
    attention, network = model.transformer.encoder.block[0].layer
    with torch.no_grad():
        (attention.SelfAttention.v if silent == "values" else network.DenseReluDense.wi).weight.zero_()
    small = compress(model, statistics(case, model), **options)
    assert small.config.projection["options"]["measured_kl"] < 0.1


@pytest.mark.parametrize("case", [CLASSIFIER, WRITER], ids=str)
def test_training_mode_changes_nothing(case: Case) -> None:
    model = make_dense(case, torch.float32)
    stats = statistics(case, model)
    expected = compress(model.eval(), stats, remove=0.3)
    model.train()
    frozen = next(module for module in model.modules() if isinstance(module, torch.nn.Dropout)).eval()
    found = compress(model, stats, remove=0.3)
    assert model.training and not frozen.training
    assert all(map(torch.equal, expected.state_dict().values(), found.state_dict().values()))


@pytest.mark.parametrize("case", [CLASSIFIER, find("t5-ForSequenceClassification")], ids=str)
def test_time_is_that_of_evaluation(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """On inputs that the head can read: a T5 classifier wants one end token in each."""
    model = make_dense(case, torch.float32)
    stats = statistics(case, model)

    def ratio(run: Any, dense: torch.nn.Module, small: torch.nn.Module) -> float:
        assert not dense.training and not small.training
        assert run(dense).logits.shape == run(small).logits.shape
        return 0.75

    monkeypatch.setattr(LATENCY, "_time_ratio", ratio)
    small = compress(model.train(), stats, latency=0.75)
    assert small.config.projection["options"]["latency_table"][0]["latency"] == 0.75


def test_a_budget_of_time_draws_nothing_from_the_callers_generator() -> None:
    before = torch.get_rng_state()
    with suppress(TCSPError):  # tiny models may not be as fast, but they were built
        compress(*dense_and_sample(CLASSIFIER, torch.float32), latency=1.0)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("case", [find("bert-Model"), find("t5-EncoderModel")], ids=str)
def test_the_first_token_of_a_sequence_padded_on_the_left(case: Case) -> None:
    dense = make_dense(case)
    right = make_inputs(case)
    length = right["input_ids"].shape[1]
    right["position_ids"] = torch.arange(length).repeat(len(right["input_ids"]), 1)
    if case.family == "t5":  # its positions are relative
        del right["position_ids"]
    counts = right["attention_mask"].sum(1).tolist()
    left = {
        name: torch.stack([row.roll(length - count) for row, count in zip(value, counts, strict=True)])
        for name, value in right.items()
    }
    assert not bool(left["attention_mask"][:, 0].all())
    expected, found = (calibrate(dense, [batch], pooling="cls", progress=False) for batch in (right, left))
    for name, site in expected.sites.items():
        other = found.sites[name]
        torch.testing.assert_close(other.moment_sum, site.moment_sum, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(other.fisher_sum, site.fisher_sum, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("head", ["ForMaskedLM", "ForPreTraining", "ForTokenClassification"])
def test_a_masked_lm_that_is_not_masked_is_said(head: str, caplog: pytest.LogCaptureFixture, tokenizer) -> None:
    case = find(f"bert-{head}")
    dense = make_dense(case, torch.float32)
    with caplog.at_level(logging.WARNING, "tcsp_hf"):
        calibrate(dense, make_rows(case, 4), tokenizer=tokenizer, progress=False)
        assert not caplog.records
        calibrate(dense, make_rows(case, 4), progress=False)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == (head != "ForTokenClassification")
    assert all("not masked" in text and "tokenizer=" in text for text in said)


def test_multiple_choice_wants_choices(tokenizer) -> None:
    model = make_dense(find("bert-ForMultipleChoice"), torch.float32)
    with pytest.raises(TCSPError, match=r"\(batch, choices, length\)"):
        calibrate(model, ["w1 w2", "w3 w4"], tokenizer=tokenizer, progress=False)


def test_a_head_of_another_task_by_its_own_class(tmp_path) -> None:
    make_small(CLASSIFIER).save_pretrained(tmp_path)
    model = tcsp_hf.TCSPBertForTokenClassification.from_pretrained(tmp_path, num_labels=5)
    assert model.classifier.out_features == 5
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        tcsp_hf.TCSPBertForSequenceClassification.from_pretrained(tmp_path, num_labels=5)


def test_a_plain_encoder_says_what_it_leaves_out(caplog: pytest.LogCaptureFixture) -> None:
    """A refit lift mixes coordinates, a LayerNorm cannot; what a head reads is exact all the same."""
    case = find("bert-Model")
    small = compress(*dense_and_sample(case, torch.float32), remove=0.15, axes=("filters",), uniform=True)
    inputs = make_inputs(case)
    with caplog.at_level(logging.WARNING, logger="tcsp_hf"):
        plain = to_plain_bert(small)
    assert "leave out what the lift mixes" in caplog.text
    with torch.no_grad():
        expected, found = small(**inputs), plain(**inputs)
        lifted = small.lift(expected.last_hidden_state)
    assert torch.allclose(found.pooler_output, expected.pooler_output, atol=1e-5)
    assert 1e-5 < float((found.last_hidden_state - lifted).norm() / lifted.norm()) < 0.1


@pytest.mark.parametrize(
    "fields", [{"chunk_size_feed_forward": 3}, {"output_hidden_states": [-1]}, {"layer_types": ["full_attention"] * 2}]
)
def test_fields_that_change_no_result(fields: dict[str, Any], tmp_path: Path) -> None:
    """Rows of nine tokens: chunks of three divide them, so that the dense model runs."""
    case = find("bert-ForSequenceClassification")
    drawn = torch.randint(2, 100, (60, 9), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": ids} for ids in drawn.tolist()]
    found = []
    for given in ({}, fields):
        dense = make_dense(case, torch.float32, **given)
        small = compress(dense, calibrate(dense, rows, progress=False), remove=0.3)
        assert all(getattr(dense.config, name) == value for name, value in given.items())
        assert dense.base_model.encoder.layer[0].chunk_size_feed_forward == given.get("chunk_size_feed_forward", 0)
        small.save_pretrained(tmp_path / str(len(found)))
        found.append(type(small).from_pretrained(tmp_path / str(len(found))))
    with torch.no_grad():
        one, other = (model(input_ids=torch.tensor([rows[0]["input_ids"]])).logits for model in found)
    assert torch.allclose(one, other, atol=1e-5)


def _other_head(model: Any) -> None:
    model.classifier = torch.nn.Linear(32, 5)


def _head_without_bias(model: Any) -> None:
    model.classifier = torch.nn.Linear(32, 3, bias=False)


def _deep_head(model: Any) -> None:
    model.classifier = torch.nn.Sequential(torch.nn.Linear(32, 3))


def _fewer_layers(model: Any) -> None:
    model.bert.encoder.layer = model.bert.encoder.layer[:1]


def _int8(model: Any) -> None:
    torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, inplace=True)


def _masked(model: Any) -> None:
    prune.l1_unstructured(model.bert.encoder.layer[1].output.dense, "weight", 0.5)


def _parametrised(model: Any) -> None:
    torch.nn.utils.parametrizations.weight_norm(model.bert.encoder.layer[0].attention.self.query)


class _AdaptedLinear(torch.nn.Module):
    """As adapters are: what is trained beside a linear that is left alone."""

    def __init__(self, base: torch.nn.Linear) -> None:
        super().__init__()
        self.base_layer, self.beside = base, torch.nn.Linear(base.in_features, base.out_features)

    @property
    def weight(self) -> torch.Tensor:
        return self.base_layer.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + self.beside(x)


def _adapted(model: Any) -> None:
    attention = model.bert.encoder.layer[0].attention.self
    attention.value = _AdaptedLinear(attention.value)


def _repeated_layer(model: Any) -> None:
    model.bert.encoder.layer[1] = model.bert.encoder.layer[0]


def _other_activation(model: Any) -> None:
    model.bert.encoder.layer[1].intermediate.intermediate_act_fn = torch.nn.ReLU()


def _other_pooler(model: Any) -> None:
    model.bert.pooler.activation = torch.nn.ReLU()


def _other_text_activation(model: Any) -> None:
    model.decoder.block[1].layer[-1].DenseReluDense.act = torch.nn.GELU()


def _biased_table(model: Any) -> None:
    model.lm_head = torch.nn.Linear(32, 120)


def _text_classifier(model: Any) -> None:
    model.classification_head.out_proj = torch.nn.Linear(32, 5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.ao, by which a model comes in int8
@pytest.mark.parametrize(
    ("alter", "said"),
    [
        (_other_head, "classifier is not a linear"),
        (_head_without_bias, "classifier is not a linear"),
        (_deep_head, "classifier is not a linear"),
        (_fewer_layers, "has 1 layers and num_hidden_layers=2"),
        (_int8, "is quantised"),
        (_masked, r"layer\.1\.output\.dense \(Linear\) is no parameter of its own"),
        (_parametrised, r"layer\.0\.attention\.self\.query .* is no parameter of its own"),
        (_adapted, r"layer\.0\.attention\.self\.value \(_AdaptedLinear\) is no parameter of its own"),
        (_repeated_layer, r"layer\.0\.\S+ and layer\.1\.\S+ are one module"),
        (
            _other_activation,
            r"layer\.1\.intermediate_act_fn is ReLU, but .* say GELUActivation",
        ),
        (_other_pooler, r"pooler\.activation is ReLU"),
    ],
)
def test_models_that_are_not_what_their_configuration_says(alter: Any, said: str) -> None:
    """One error before any work, where a tensor of another shape would be met after the calibration."""
    dense = make_dense(find("bert-ForSequenceClassification"), torch.float32)
    alter(dense)
    with pytest.raises(TCSPError, match=said):
        calibrate(dense, [{"input_ids": [2, 3, 4]}] * 4, progress=False)


@pytest.mark.parametrize(
    ("head", "alter", "said"),
    [
        ("ForConditionalGeneration", _other_text_activation, r"block\.1 activation is GELU, .* say ReLU"),
        ("ForConditionalGeneration", _biased_table, "lm_head has a bias"),
        ("ForSequenceClassification", _text_classifier, r"classification_head\.out_proj is not a linear with .* 3 out"),
        ("ForTokenClassification", _other_head, "classifier is not a linear with a bias and 3 outputs"),
    ],
)
def test_t5_that_are_not_what_their_configuration_says(head: str, alter: Any, said: str) -> None:
    dense = make_dense(find(f"t5-{head}"), torch.float32)
    alter(dense)
    with pytest.raises(TCSPError, match=said):
        calibrate(dense, [{"input_ids": [2, 3, 1], "labels": [4, 1]}] * 4, progress=False)


@pytest.mark.parametrize("same", [torch.nn.GELU(), torch.nn.functional.gelu], ids=["module", "function"])
def test_an_activation_of_another_class_with_the_same_values(same: Any) -> None:
    model = make_dense(CLASSIFIER, torch.float32)
    for layer in model.bert.encoder.layer:
        del layer.intermediate.intermediate_act_fn
        layer.intermediate.intermediate_act_fn = same
    assert statistics(CLASSIFIER, model).sequences == 40
