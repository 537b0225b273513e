"""A compressed T5 as a stock one: equal outputs and generations, by transformers alone and by CTranslate2."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from common import (
    CASES,
    PAD,
    VOCABULARY,
    Case,
    D,
    calibrated,
    dense_and_sample,
    find,
    largest_difference,
    make_dense,
    make_inputs,
    make_small,
    make_tokenizer,
    make_uneven,
    planted,
)
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import tcsp_hf
from tcsp_hf import TCSPError, compress, to_plain_t5
from tcsp_hf.cli.main import app
from tcsp_hf.compression import t5 as projecting_t5
from tcsp_hf.export.ctranslate2 import to_ctranslate2

GENERATORS = [case for case in CASES if case.head == "ForConditionalGeneration"]
PLAIN = [case for case in CASES if case.family == "t5" and case.head != "ForSequenceClassification"]
SEQ2SEQ = find("t5-gated-ForConditionalGeneration")
UNIFORM = {name: None for name in tcsp_hf.TCSPT5Config.__dataclass_fields__ if "_layer_" in name}
"""Overrides that make the uneven test models even, layer by layer."""


def stock(case: Case, model: Any, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """All outputs of a model, hidden states in its own coordinates."""
    with torch.no_grad():
        found = model(**inputs)
    return {name: found[name] for name in found if torch.is_tensor(found[name])}


@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_plain_equals_compressed(case: Case, tmp_path: Path) -> None:
    small, inputs = make_small(case), make_inputs(case)
    plain = to_plain_t5(small)
    assert type(plain) is case.dense_class and plain.config.d_model == 16
    assert not [name for name in plain.state_dict() if "lift" in name]
    assert largest_difference(stock(case, small, inputs), stock(case, plain, inputs)) <= 1e-5
    plain.save_pretrained(tmp_path / "plain")
    loaded = case.dense_class.from_pretrained(tmp_path / "plain")
    assert largest_difference(stock(case, plain, inputs), stock(case, loaded, inputs)) == 0.0
    loaded.save_pretrained(tmp_path / "again")  # what transformers writes of it means the same
    again = case.dense_class.from_pretrained(tmp_path / "again")
    assert largest_difference(stock(case, plain, inputs), stock(case, again, inputs)) == 0.0


@pytest.mark.parametrize("case", GENERATORS, ids=str)
@pytest.mark.parametrize("how", [{}, {"num_beams": 3, "length_penalty": 0.7}], ids=["greedy", "beam"])
def test_equal_generation(case: Case, how: dict[str, Any], tmp_path: Path) -> None:
    small, inputs = make_small(case, torch.float64), make_inputs(case)
    del inputs["decoder_input_ids"], inputs["decoder_attention_mask"]
    to_plain_t5(small).save_pretrained(tmp_path)
    plain = case.dense_class.from_pretrained(tmp_path, dtype=torch.float64)
    told = {"max_new_tokens": 8, "min_new_tokens": 4, "output_scores": True, "return_dict_in_generate": True, **how}
    expected, found = small.generate(**inputs, **told), plain.generate(**inputs, **told)
    assert torch.equal(expected.sequences, found.sequences)
    for one, other in zip(expected.scores, found.scores, strict=True):
        finite = one.isfinite()
        assert torch.equal(finite, other.isfinite()) and (one[finite] - other[finite]).abs().max() <= 1e-5


@pytest.mark.usefixtures("float64_norms")
@pytest.mark.parametrize("case", GENERATORS, ids=str)
def test_scale_factors(case: Case) -> None:
    """The dense stream lies in k dimensions: the plain model must equal the dense one, epsilon included."""
    k = 12
    dense = planted(case, k, own=False, layer_norm_epsilon=0.05)
    inputs = make_inputs(case)
    small = compress(dense, calibrated(case, dense), hidden_size=k, multiple_of=1, subspace="pca")
    plain = to_plain_t5(small)
    assert plain.config.layer_norm_epsilon == pytest.approx(0.05 * D / k)
    with torch.no_grad():
        assert (dense(**inputs).logits - plain(**inputs).logits).abs().max() <= 1e-6


def test_what_is_written(tmp_path: Path) -> None:
    """Older transformers and other readers take both facts, untied and unscaled, from tie_word_embeddings."""
    to_plain_t5(make_small(find("t5-ForConditionalGeneration"))).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["tie_word_embeddings"] is False and written["scale_decoder_outputs"] is False
    assert written["model_type"] == "t5" and written["architectures"] == ["T5ForConditionalGeneration"]
    assert "auto_map" not in written and "projection" not in written
    assert {"lm_head.weight", "shared.weight"} <= load_file(tmp_path / "model.safetensors").keys()
    assert not list(tmp_path.glob("*.py"))


def test_mt5_stays_mt5() -> None:
    plain = to_plain_t5(make_small(find("mt5-ForConditionalGeneration")))
    assert type(plain) is transformers.MT5ForConditionalGeneration and plain.config.model_type == "mt5"


TIED = [find("t5-ForConditionalGeneration"), find("mt5-ForConditionalGeneration")]


@pytest.mark.parametrize("scaled", [True, False], ids=["scaled", "unscaled"])
@pytest.mark.parametrize("case", TIED, ids=str)
def test_a_tied_head(case: Case, scaled: bool, tmp_path: Path) -> None:
    """A T5 v1.0 scales what a tied head reads, an mT5 does not: such heads stay tied, others are untied and folded."""
    fields = {**UNIFORM, "encoder_hidden_size": None, "tie_lm_head": True, "scale_decoder_outputs": scaled}
    small, inputs = make_uneven(case, **fields), make_inputs(case)
    small.config.projection = {"source_model_type": case.source.partition("-")[0]}
    assert small.lm_head.weight is small.shared.weight
    plain = to_plain_t5(small)
    assert (plain.lm_head.weight is plain.shared.weight) == (scaled == (case.source == "t5"))
    assert largest_difference(stock(case, small, inputs), stock(case, plain, inputs)) <= 1e-5
    plain.save_pretrained(tmp_path)
    again = case.dense_class.from_pretrained(tmp_path)
    assert largest_difference(stock(case, plain, inputs), stock(case, again, inputs)) == 0.0
    plain.resize_token_embeddings(130, mean_resizing=False)
    assert (plain.lm_head.weight is plain.shared.weight) == (scaled == (case.source == "t5"))
    assert plain.encoder.embed_tokens.weight is plain.shared.weight


@pytest.mark.parametrize("projection", ["shared", "per_site"])
def test_an_uncut_stream_keeps_the_tie(projection: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers were cut, the stream was not: one embedding table, also on disk, also in the plain form."""
    case = TIED[0]
    dense, stats = dense_and_sample(case)
    inputs = make_inputs(case)

    def cut() -> tuple[Any, float]:
        options: dict[str, Any] = {"projection": projection, "uniform": True, "multiple_of": 1, "progress": False}
        made = compress(dense, stats, remove=0.1, axes=("filters",), **options)
        with torch.no_grad():
            return made, float((made(**inputs).logits - dense(**inputs).logits).norm())

    small, lost = cut()
    with monkeypatch.context() as patch:
        patch.setattr(projecting_t5, "keeps_coordinates", lambda dense, widths: False)
        untied, lost_untied = cut()
    assert not untied.config.tie_lm_head and lost < 1.25 * lost_untied, "a head that is solved again is hardly better"
    assert small.config.tie_lm_head and small.lm_head.weight is small.shared.weight
    small.save_pretrained(tmp_path / "small")
    written = load_file(tmp_path / "small" / "model.safetensors")
    assert [name for name, value in written.items() if value.shape[0] == VOCABULARY] == ["shared.weight"]
    again = type(small).from_pretrained(tmp_path / "small", dtype=torch.float64)
    plain = to_plain_t5(small)
    assert plain.lm_head.weight is plain.shared.weight and plain.config.d_ff < dense.config.d_ff
    for other in (again, plain):
        assert largest_difference(stock(case, small, inputs), stock(case, other, inputs)) <= 1e-9


def test_dtypes_and_independence() -> None:
    small = make_small(SEQ2SEQ, torch.float32).to(torch.bfloat16)
    plain = to_plain_t5(small)
    assert {parameter.dtype for parameter in plain.parameters()} == {torch.bfloat16}
    before = small.shared.weight.clone()
    plain.shared.weight.data.zero_()
    assert torch.equal(small.shared.weight, before)


def test_the_same_heads_everywhere() -> None:
    """One set of kept heads per stack, equal in number, and one head size fit into a stock T5."""
    fields = {
        **UNIFORM,
        "encoder_hidden_size": None,
        "encoder_layer_kept_heads": [[0, 2], [0, 2]],
        "decoder_layer_kept_heads": [[1, 3], [1, 3]],
        "cross_layer_attention_heads": [2, 2],
        "encoder_layer_intermediate_sizes": [12, 12],
        "decoder_layer_intermediate_sizes": [12, 12],
    }
    fields |= {
        f"{group}_layer_{kind}_head_sizes": [5, 5] for group in ("encoder", "decoder", "cross") for kind in ("qk", "vo")
    }
    small, inputs = make_uneven(SEQ2SEQ, **fields), make_inputs(SEQ2SEQ)
    plain = to_plain_t5(small)
    assert (plain.config.num_heads, plain.config.d_kv, plain.config.d_ff) == (2, 5, 12)
    assert largest_difference(stock(SEQ2SEQ, small, inputs), stock(SEQ2SEQ, plain, inputs)) <= 1e-5


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({}, "encoder_hidden_size is 20"),
        ({"encoder_layer_intermediate_sizes": [10, 40]}, "feed-forward neurons differ: encoder layer 0 has 10"),
        ({"decoder_layer_vo_head_sizes": [8, 6]}, r"head size differ: .*decoder layer 1 \(value, output\) has 6"),
        ({"cross_layer_attention_heads": [2, 4]}, "attention heads differ: .*cross layer 0 has 2"),
        ({"decoder_layer_kept_heads": [[0], [1]]}, "kept heads differ: decoder layer 0"),
    ],
)
def test_what_cannot_be_plain(fields: dict[str, Any], named: str) -> None:
    small = make_uneven(SEQ2SEQ, **({**UNIFORM, "encoder_hidden_size": None, **fields} if fields else {}))
    with pytest.raises(TCSPError, match=named):
        to_plain_t5(small)


def test_other_models_are_refused() -> None:
    with pytest.raises(TCSPError, match=r"BertModel.*to_plain_bert"):
        to_plain_t5(make_small(find("bert-Model")))
    with pytest.raises(TCSPError, match="model_type 't5'"):
        to_plain_t5(make_dense(SEQ2SEQ))
    with pytest.raises(TCSPError, match="classifier_size is 32"):
        to_plain_t5(make_small(find("t5-ForSequenceClassification")))


# The command, and readers without this package ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A compressed checkpoint, and what the command made of it."""
    folder = tmp_path_factory.mktemp("export")
    small = make_small(SEQ2SEQ)
    small.save_pretrained(folder / "small")
    tokenizer = make_tokenizer()
    tokenizer.eos_token = "</s>"
    tokenizer.save_pretrained(folder / "small")
    result = CliRunner().invoke(
        app, ["export", str(folder / "small"), str(folder / "plain"), "--format", "t5", "--json"]
    )
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["class"] == "T5ForConditionalGeneration"
    return folder / "small", folder / "plain"


def test_reload_by_transformers_alone(exported: tuple[Path, Path], tmp_path: Path) -> None:
    small = tcsp_hf.TCSPT5ForConditionalGeneration.from_pretrained(exported[0])
    inputs = make_inputs(SEQ2SEQ)
    save_file(inputs, tmp_path / "inputs.safetensors")
    program = """
import sys
sys.modules["tcsp_hf"] = None  # an import fails
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer
torch.set_num_threads(1)
here = Path(sys.argv[2])
model = AutoModelForSeq2SeqLM.from_pretrained(sys.argv[1])
assert AutoTokenizer.from_pretrained(sys.argv[1])("w1 w2")["input_ids"]
with torch.no_grad():
    logits = model(**load_file(here / "inputs.safetensors")).logits
save_file({"logits": logits.contiguous()}, here / "found.safetensors")
"""
    subprocess.run([sys.executable, "-c", program, str(exported[1]), str(tmp_path)], check=True)
    with torch.no_grad():
        expected = small(**inputs).logits
    assert (load_file(tmp_path / "found.safetensors")["logits"] - expected).abs().max() <= 1e-5


def test_refusals_of_the_command(exported: tuple[Path, Path], tmp_path: Path) -> None:
    for arguments, named in (
        ([exported[0], tmp_path / "new", "--format", "gguf"], "--format is 'gguf'; allowed: t5"),
        ([exported[0], exported[1], "--format", "t5"], "is not empty"),
    ):
        result = CliRunner().invoke(app, ["export", *map(str, arguments)])
        assert isinstance(result.exception, TCSPError) and named in str(result.exception)
    assert not (tmp_path / "new").exists()


SOURCES = [["w5", "w17", "w3", "</s>"], ["w90", "w4", "</s>"], ["w33", "w34", "w35", "w36", "w8", "</s>"]]


def generate(plain: Any, tokenizer: Any, source: list[str], **how: Any) -> tuple[list[list[str]], list[float] | None]:
    """Generated words of every hypothesis, up to the end of sentence, and the scores of a beam search."""
    ids = torch.tensor([tokenizer.convert_tokens_to_ids(source)])
    told = {"max_new_tokens": 10, "min_new_tokens": 2, "do_sample": False, "decoder_start_token_id": PAD, **how}
    found = plain.generate(ids, output_scores=True, return_dict_in_generate=True, **told)
    words = [tokenizer.convert_ids_to_tokens(row[1:]) for row in found.sequences]
    scores = found.sequences_scores.tolist() if "num_beams" in how else None
    return [row[: row.index("</s>")] if "</s>" in row else row for row in words], scores


@pytest.fixture(scope="module")
def plain(exported: tuple[Path, Path]) -> tuple[Any, Any]:
    """The exported model and its tokenizer, by transformers."""
    model = transformers.T5ForConditionalGeneration.from_pretrained(exported[1]).eval()
    return model, transformers.AutoTokenizer.from_pretrained(exported[1])


def test_ctranslate2_own_converter(exported: tuple[Path, Path], plain: tuple[Any, Any], tmp_path: Path) -> None:
    ctranslate2 = pytest.importorskip("ctranslate2")
    converters = pytest.importorskip("ctranslate2.converters")
    converters.TransformersConverter(str(exported[1])).convert(str(tmp_path / "ct2"))
    translator = ctranslate2.Translator(str(tmp_path / "ct2"), compute_type="float32", intra_threads=1)
    found = translator.translate_batch(SOURCES, beam_size=1, max_decoding_length=10, min_decoding_length=1)
    for source, result in zip(SOURCES, found, strict=True):
        assert result.hypotheses == generate(*plain, source)[0]


def test_ctranslate2_beams_and_scores(exported: tuple[Path, Path], plain: tuple[Any, Any], tmp_path: Path) -> None:
    """Through the command, which hands CTranslate2 the right scale: hypotheses and their log-probabilities agree."""
    ctranslate2 = pytest.importorskip("ctranslate2")
    result = CliRunner().invoke(app, ["export", str(exported[0]), str(tmp_path / "ct2"), "--format", "ctranslate2"])
    assert result.exit_code == 0, result.output
    translator = ctranslate2.Translator(str(tmp_path / "ct2"), compute_type="float32", intra_threads=1)
    length = {"max_decoding_length": 6, "min_decoding_length": 6}
    found = translator.translate_batch(
        SOURCES, beam_size=3, num_hypotheses=3, return_scores=True, length_penalty=0, **length
    )
    how = {"num_beams": 3, "num_return_sequences": 3, "length_penalty": 0.0, "max_new_tokens": 6, "min_new_tokens": 6}
    for source, hypotheses in zip(SOURCES, found, strict=True):
        words, scores = generate(*plain, source, **how)
        assert hypotheses.hypotheses[0] == words[0]
        assert hypotheses.scores[0] == pytest.approx(scores[0], abs=1e-2)
    scored = translator.score_batch(SOURCES[:1], [["w9", "w10"]])[0].log_probs
    tokens = plain[1].convert_tokens_to_ids(["w9", "w10", "</s>"])
    ids = torch.tensor([plain[1].convert_tokens_to_ids(SOURCES[0])])
    with torch.no_grad():
        expected = plain[0](ids, decoder_input_ids=torch.tensor([[PAD, *tokens[:2]]])).logits[0].log_softmax(-1)
    assert scored == pytest.approx(expected[torch.arange(3), tokens].tolist(), abs=1e-3)


@pytest.mark.parametrize("head", ["EncoderModel", "Model", "ForQuestionAnswering"])
def test_ctranslate2_without_a_language_model_head(head: str, tmp_path: Path) -> None:
    """Its converter would draw what is missing at random, and report success."""
    small = make_small(find(f"t5-{head}"))
    small.save_pretrained(tmp_path / "small")
    make_tokenizer().save_pretrained(tmp_path / "small")
    result = CliRunner().invoke(
        app, ["export", str(tmp_path / "small"), str(tmp_path / "ct2"), "--format", "ctranslate2"]
    )
    assert isinstance(result.exception, TCSPError) and f"TCSPT5{head}" in str(result.exception)
    to_plain_t5(small).save_pretrained(tmp_path / "plain")
    with pytest.raises(TCSPError, match=f"is a T5{head}, but"):
        to_ctranslate2(tmp_path / "plain", tmp_path / "ct2")
    assert not (tmp_path / "ct2").exists()
