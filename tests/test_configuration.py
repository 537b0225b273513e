"""Configurations: exact round trips through JSON, and contradictions refused with the field's name."""

import copy
import json
import tempfile
from typing import Any

import pytest
import torch
import transformers
from common import UNEVEN, D, find, make_small
from huggingface_hub.errors import StrictDataclassFieldValidationError
from hypothesis import given, settings
from hypothesis import strategies as st

import tcsp_hf
from tcsp_hf import TCSPBertConfig, TCSPConfig, TCSPT5Config
from tcsp_hf.configuration_tcsp import METHOD_VERSION

CLASSES = {"bert": TCSPBertConfig, "t5": TCSPT5Config}
MODELS = {"bert": tcsp_hf.TCSPBertForPreTraining, "t5": tcsp_hf.TCSPT5ForConditionalGeneration}
family = pytest.mark.parametrize("family", CLASSES)


def sizes(length: int, most: int) -> st.SearchStrategy[list[int] | None]:
    """None, or `length` sizes of at most `most`."""
    return st.none() | st.lists(st.integers(1, most), min_size=length, max_size=length)


fractions = st.floats(0, 1, allow_nan=False)


@st.composite
def bert_fields(draw) -> dict:
    width = draw(st.integers(1, 24))
    layers = draw(st.integers(0, 3))
    heads = draw(st.integers(1, 4))
    head_dim = draw(st.integers(1, 8))
    sites = draw(sizes(2 * layers + 1, width))
    return {
        "vocab_size": draw(st.integers(2, 60)),
        "source_hidden_size": width,
        "hidden_size": sites[-1] if sites else draw(st.integers(1, width)),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "head_dim": head_dim,
        "intermediate_size": draw(st.integers(1, 40)),
        "max_position_embeddings": draw(st.integers(6, 40)),
        "layer_norm_eps": draw(st.floats(1e-14, 1e-2)),
        "hidden_act": draw(st.sampled_from(["gelu", "relu", "silu"])),
        "hidden_dropout_prob": draw(fractions),
        "classifier_dropout": draw(st.none() | fractions),
        "site_hidden_sizes": sites,
        "layer_intermediate_sizes": draw(sizes(layers, 40)),
        "layer_attention_heads": draw(sizes(layers, heads)),
        "layer_qk_head_sizes": draw(sizes(layers, head_dim)),
        "layer_vo_head_sizes": draw(sizes(layers, head_dim)),
        "pooler_size": draw(st.none() | st.integers(1, 30)),
        "mlm_transform_size": draw(st.none() | st.integers(1, 30)),
        "mlm_head_size": draw(st.none() | st.integers(1, 30)),
        "tie_word_embeddings": False,
    }


@st.composite
def t5_fields(draw) -> dict:
    width = draw(st.integers(1, 24))
    layers = {"encoder": draw(st.integers(1, 3)), "decoder": draw(st.integers(1, 3))}
    heads = draw(st.integers(1, 4))
    head = draw(st.integers(1, 8))

    def kept_heads(count: int) -> list[list[int]] | None:
        chosen = st.sets(st.integers(0, heads - 1), min_size=1).map(sorted)
        return draw(st.none() | st.lists(chosen, min_size=count, max_size=count))

    fields = {
        "vocab_size": draw(st.integers(2, 60)),
        "source_hidden_size": width,
        "d_model": draw(st.integers(1, width)),
        "encoder_hidden_size": draw(st.none() | st.integers(1, width)),
        "num_layers": layers["encoder"],
        "num_decoder_layers": layers["decoder"],
        "num_heads": heads,
        "d_kv": head,
        "d_ff": draw(st.integers(1, 40)),
        "relative_attention_num_buckets": draw(st.sampled_from([4, 8, 32])),
        "layer_norm_epsilon": draw(st.floats(1e-14, 1e-2)),
        "feed_forward_proj": draw(st.sampled_from(["relu", "gated-gelu", "gated-silu", "gelu"])),
        "dropout_rate": draw(fractions),
        "tie_lm_head": False,
        "scale_decoder_outputs": draw(st.none() | st.booleans()),
        "classifier_size": draw(st.none() | st.integers(1, 30)),
        "cross_layer_attention_heads": draw(sizes(layers["decoder"], heads)),
        "decoder_start_token_id": 0,
    }
    for stack, count in layers.items():
        fields[f"{stack}_layer_intermediate_sizes"] = draw(sizes(count, 40))
        fields[f"{stack}_layer_kept_heads"] = kept_heads(count)
    for group, stack in (("encoder", "encoder"), ("decoder", "decoder"), ("cross", "decoder")):
        for kind in ("qk", "vo"):
            fields[f"{group}_layer_{kind}_head_sizes"] = draw(sizes(layers[stack], head))
    return fields


def projection_of(config: TCSPConfig, energy: float = 0.9) -> dict:
    """A valid projection for a configuration."""
    return {
        "method_version": METHOD_VERSION,
        "source_model": "somewhere/some-model",
        "source_revision": None,
        "source_model_type": "bert",
        "source_hidden_size": config.dense_hidden_size,
        "source_parameters": 1234,
        "source_non_embedding_parameters": 123,
        "kind": "per_site",
        "subspace": "balanced",
        "epsilon": 0.3,
        "sites": [
            {"name": name, "hidden_size": width, "kept_energy": energy} for name, width in config.site_widths().items()
        ],
        "calibration": {
            "sequences": 3,
            "tokens": 50,
            "data_fingerprint": "0a",
            "model_fingerprint": "0b",
            "seed": 0,
        },
    }


VALID = {"bert": bert_fields(), "t5": t5_fields()}


@family
@given(st.data())
def test_round_trips_are_exact(family, data):
    """Through JSON text, a dictionary, a folder and a deep copy, with every field as it was."""
    config = CLASSES[family](**data.draw(VALID[family]))
    if data.draw(st.booleans()):
        config.projection = projection_of(config, data.draw(st.floats(-2, 1)))
    expected = config.to_dict()
    read = CLASSES[family].from_dict(json.loads(config.to_json_string(use_diff=False)))
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        found = [
            read,
            TCSPConfig.from_pretrained(folder),
            CLASSES[family].from_pretrained(folder),
            transformers.AutoConfig.from_pretrained(folder),
            copy.deepcopy(config),
            CLASSES[family].from_dict(expected),
        ]
    for other in found:
        assert type(other) is CLASSES[family]
        assert without_place(other) == without_place(config)
        assert other.site_widths() == config.site_widths()


def without_place(config: TCSPConfig) -> dict:
    return {name: value for name, value in config.to_dict().items() if name != "_name_or_path"}


@family
@settings(max_examples=20)
@given(st.data())
def test_every_valid_configuration_is_a_model(family, data):
    """Every size goes into a module, and the modules fit each other."""
    config = CLASSES[family](**data.draw(VALID[family]))
    model = MODELS[family](config).eval()
    ids = torch.zeros(1, 5, dtype=torch.long)
    arguments = {"decoder_input_ids": ids[:, :3]} if family == "t5" else {}
    with torch.no_grad():
        found = model(input_ids=ids, **arguments)
    length = 3 if family == "t5" else 5
    assert found[0].shape == (1, length, config.vocab_size)
    assert model.lift(torch.zeros(2, config.hidden_size)).shape == (2, config.source_hidden_size)


@family
def test_defaults_are_an_uncompressed_shape(family):
    config = CLASSES[family]()
    stock = {"bert": transformers.BertConfig, "t5": transformers.T5Config}[family]()
    assert config.projection is None and config.dense_hidden_size == config.hidden_size == stock.hidden_size
    assert set(config.site_widths().values()) == {stock.hidden_size}
    for name in ("vocab_size", "num_hidden_layers", "num_attention_heads"):
        assert getattr(config, name) == getattr(stock, name)


@family
def test_a_given_dictionary_is_copied(family):
    config = CLASSES[family](**UNEVEN[family])
    projection = projection_of(config)
    made = CLASSES[family](**UNEVEN[family], projection=projection)
    projection["sites"].clear()
    assert made.projection["sites"]
    made.check()


def test_site_widths():
    bert = TCSPBertConfig(**UNEVEN["bert"])
    assert bert.site_widths() == {
        "embeddings": 12,
        "layer.0.attention": D,
        "layer.0.output": D,
        "layer.1.attention": 17,
        "layer.1.output": 20,
    }
    t5 = TCSPT5Config(**UNEVEN["t5"])
    assert t5.site_widths() == {
        **{f"encoder.{i}.{part}": 20 for i in range(2) for part in ("attention", "ffn")},
        "encoder.final": 20,
        **{f"decoder.{i}.{part}": 24 for i in range(2) for part in ("attention", "cross", "ffn")},
        "decoder.final": 24,
    }


def test_names_of_other_libraries_stay_allowed():
    config = TCSPBertConfig(task_specific_params={"a": 1}, my_own_field=3)
    assert config.my_own_field == 3


# Contradictions -------------------------------------------------------------------------------------------------------

BERT_WRONG = [
    ({"is_decoder": True}, "is_decoder is True"),
    ({"add_cross_attention": True}, "add_cross_attention is True"),
    ({"vocab_size": 0}, "vocab_size is 0"),
    ({"vocab_size": -5}, "vocab_size is -5"),
    ({"vocab_size": 10**12}, "vocab_size is 1000000000000"),
    ({"hidden_size": 0, "site_hidden_sizes": None}, "hidden_size is 0"),
    ({"hidden_size": 40, "site_hidden_sizes": None}, "hidden_size is 40; allowed: 1 to source_hidden_size = 32"),
    ({"hidden_size": 19}, "hidden_size is 19, but the last entry of site_hidden_sizes is 20"),
    ({"num_hidden_layers": 3}, "site_hidden_sizes has 5 entries; this model needs 7"),
    ({"num_hidden_layers": -1}, "num_hidden_layers is -1"),
    ({"num_attention_heads": 0}, "num_attention_heads is 0"),
    (
        {
            "num_attention_heads": 5,
            "head_dim": None,
            "layer_qk_head_sizes": None,
            "layer_vo_head_sizes": None,
        },
        "num_attention_heads is 5, which does not divide .* 32",
    ),
    ({"head_dim": 0}, "head_dim is 0"),
    ({"site_hidden_sizes": [12, 24, 9, 17]}, "site_hidden_sizes has 4 entries; this model needs 5"),
    ({"site_hidden_sizes": [12, 24, 0, 17, 20]}, r"site_hidden_sizes\[2\] is 0"),
    ({"site_hidden_sizes": [12, 33, 9, 17, 20]}, r"site_hidden_sizes\[1\] is 33; it must be an integer from 1 to 32"),
    ({"site_hidden_sizes": [12, True, 9, 17, 20]}, r"site_hidden_sizes(\[1\] is True|')"),
    ({"site_hidden_sizes": 16}, "site_hidden_sizes"),
    ({"layer_intermediate_sizes": [10]}, "layer_intermediate_sizes has 1 entries"),
    ({"layer_attention_heads": [3, 5]}, r"layer_attention_heads\[1\] is 5; it must be an integer from 1 to 4"),
    ({"layer_qk_head_sizes": [4, 9]}, r"layer_qk_head_sizes\[1\] is 9"),
    ({"layer_vo_head_sizes": [0, 3]}, r"layer_vo_head_sizes\[0\] is 0"),
    ({"pooler_size": 0}, "pooler_size is 0"),
    ({"mlm_transform_size": -1}, "mlm_transform_size is -1"),
    ({"mlm_head_size": 1 << 21}, "mlm_head_size is 2097152"),
    ({"layer_norm_eps": -1e-5}, "layer_norm_eps is -1e-05"),
    ({"layer_norm_eps": float("nan")}, "layer_norm_eps is nan"),
    ({"layer_norm_eps": float("inf")}, "layer_norm_eps is inf"),
    ({"hidden_dropout_prob": 1.5}, "hidden_dropout_prob is 1.5"),
    ({"attention_probs_dropout_prob": -0.1}, "attention_probs_dropout_prob is -0.1"),
    ({"classifier_dropout": 2.0}, "classifier_dropout is 2.0"),
    ({"vocab_size": "many"}, "vocab_size"),
    ({"hidden_size": 20.0}, "hidden_size"),
    ({"source_hidden_size": "32"}, "source_hidden_size"),
    ({"projection": "pca"}, "projection"),
    ({"source_hidden_sizes": 32}, "no field 'source_hidden_sizes' .*; allowed: source_hidden_size"),
    ({"site_hidden_size": [1]}, "no field 'site_hidden_size' .*; allowed: site_hidden_sizes"),
    ({"layer_atention_heads": [1, 2]}, "no field 'layer_atention_heads' .*; allowed: layer_attention_heads"),
    ({"projektion": {}}, "no field 'projektion' .*; allowed: projection"),
    ({"site_depth": 4}, "no field 'site_depth'"),
]
T5_WRONG = [
    ({"vocab_size": 0}, "vocab_size is 0"),
    ({"d_model": 0}, "d_model is 0"),
    ({"d_model": 40}, "d_model is 40; allowed: 1 to source_hidden_size = 32"),
    ({"encoder_hidden_size": 40}, "encoder_hidden_size is 40; allowed: 1 to source_hidden_size = 32"),
    ({"encoder_hidden_size": 0}, "encoder_hidden_size is 0"),
    ({"source_hidden_size": 0}, "source_hidden_size is 0"),
    ({"d_kv": 0}, "d_kv is 0"),
    ({"d_ff": -2}, "d_ff is -2"),
    ({"num_heads": 0}, "num_heads is 0"),
    ({"num_layers": -1}, "num_layers is -1"),
    ({"num_layers": 3, "num_decoder_layers": 2}, "encoder_layer_intermediate_sizes has 2 entries; this model needs 3"),
    ({"num_decoder_layers": 1}, "decoder_layer_intermediate_sizes has 2 entries; this model needs 1"),
    ({"classifier_size": 0}, "classifier_size is 0"),
    ({"layer_norm_epsilon": -1.0}, "layer_norm_epsilon is -1.0"),
    ({"dropout_rate": 1.1}, "dropout_rate is 1.1"),
    ({"classifier_dropout": -0.5}, "classifier_dropout is -0.5"),
    ({"feed_forward_proj": "gated-gelu-new"}, "feed_forward_proj is 'gated-gelu-new'"),
    ({"feed_forward_proj": "double-relu"}, "feed_forward_proj is 'double-relu'"),
    ({"relative_attention_num_buckets": 0}, "relative_attention_num_buckets is 0"),
    ({"encoder_layer_kept_heads": [[0, 2]]}, "encoder_layer_kept_heads is .* list of 2 lists"),
    ({"encoder_layer_kept_heads": [[0, 4], [1]]}, r"encoder_layer_kept_heads\[0\]\[1\] is 4"),
    ({"encoder_layer_kept_heads": [[2, 0], [1]]}, r"encoder_layer_kept_heads\[0\] is \[2, 0\].*ascending"),
    ({"decoder_layer_kept_heads": [[1, 1], [1]]}, r"decoder_layer_kept_heads\[0\] is \[1, 1\].*distinct"),
    ({"decoder_layer_kept_heads": [[0], []]}, r"decoder_layer_kept_heads\[1\] is \[\].*at least one"),
    ({"cross_layer_attention_heads": [2, 5]}, r"cross_layer_attention_heads\[1\] is 5"),
    ({"cross_layer_qk_head_sizes": [3, 9]}, r"cross_layer_qk_head_sizes\[1\] is 9"),
    ({"encoder_layer_vo_head_sizes": [6]}, "encoder_layer_vo_head_sizes has 1 entries"),
    ({"decoder_layer_qk_head_sizes": [0, 3]}, r"decoder_layer_qk_head_sizes\[0\] is 0"),
    ({"vocab_size": None}, "vocab_size"),
    ({"d_model": "24"}, "d_model"),
    ({"encoder_layer_keptheads": [[0]]}, "no field 'encoder_layer_keptheads' .*; allowed: encoder_layer_kept_heads"),
    ({"decoder_hidden": 3}, "no field 'decoder_hidden'"),
    ({"source_hidden": 3}, "no field 'source_hidden'"),
]


@pytest.mark.parametrize(
    ("family", "wrong", "named"),
    [("bert", *row) for row in BERT_WRONG] + [("t5", *row) for row in T5_WRONG],
    ids=str,
)
def test_contradictions(family, wrong, named):
    """At construction or, at the latest, when a model is to be built: field, value, and what is allowed."""
    with pytest.raises((ValueError, TypeError), match=named):
        MODELS[family](CLASSES[family](**{**UNEVEN[family], **wrong}))


@family
def test_a_contradiction_made_later_is_found(family, tmp_path):
    config = CLASSES[family](**UNEVEN[family])
    config.vocab_size = 0
    for act in (config.check, lambda: config.save_pretrained(tmp_path / "new"), lambda: MODELS[family](config)):
        with pytest.raises(ValueError, match="vocab_size is 0"):
            act()
    assert not (tmp_path / "new").exists()


def changed(projection: dict, path: str, value: object) -> dict:
    """A copy in which the field at the path has another value; a value of `...` takes it away."""
    result = copy.deepcopy(projection)
    *places, last = path.split(".")
    inner = result
    for place in places:
        inner = inner[int(place) if place.isdigit() else place]
    if value is ...:
        del inner[last]
    else:
        inner[last] = value
    return result


PROJECTION_WRONG = [
    ("method_version", 99, "projection.method_version is 99, .* install a newer tcsp_hf"),
    ("method_version", 0, "projection.method_version is 0"),
    ("method_version", "1", "projection.method_version is '1'"),
    ("method_version", True, "projection.method_version is True"),
    ("method_version", ..., "projection lacks the field 'method_version'"),
    ("source_hidden_size", 40, "source_hidden_size is 32, but projection.source_hidden_size is 40"),
    ("source_hidden_size", -1, "projection.source_hidden_size is -1"),
    ("kind", "own", "projection.kind is 'own'; allowed: 'shared', 'per_site'"),
    ("subspace", "ica", "projection.subspace is 'ica'; allowed: 'pca', 'balanced'"),
    ("subspace", ..., "projection lacks the field 'subspace'"),
    ("source_model", 3, "projection.source_model is 3; it must be of type str"),
    ("epsilon", "0.1", "projection.epsilon is '0.1'"),
    ("unknown", 1, "projection has the unknown field 'unknown'"),
    ("sites", {}, "projection.sites is {}"),
    ("sites.0", 3, r"projection.sites\[0\] is 3"),
    ("sites.0.kept_energy", float("nan"), r"projection.sites\[0\].kept_energy is nan"),
    ("sites.0.kept_energy", 1.5, r"projection.sites\[0\].kept_energy is 1.5"),
    ("sites.1.hidden_size", 0, r"projection.sites\[1\].hidden_size is 0"),
    ("sites.1.hidden_size", 11, "projection.sites says that site .* has width 11"),
    ("sites.1.name", "nowhere", "projection.sites says that site"),
    ("sites.1.name", ..., r"projection.sites\[1\] lacks the field 'name'"),
    ("calibration.tokens", "many", "projection.calibration.tokens is 'many'"),
    ("calibration.seed", ..., "projection.calibration lacks the field 'seed'"),
    ("calibration.more", 1, "projection.calibration has the unknown field 'more'"),
]


@family
@pytest.mark.parametrize(("path", "value", "named"), PROJECTION_WRONG, ids=str)
def test_projections_that_contradict(family, path, value, named):
    valid = projection_of(CLASSES[family](**UNEVEN[family]))
    CLASSES[family](**UNEVEN[family], projection=valid)
    *places, last = path.split(".")
    if last.isdigit():
        wrong = copy.deepcopy(valid)
        wrong[places[0]][int(last)] = value
    else:
        wrong = changed(valid, path, value)
    with pytest.raises((ValueError, TypeError), match=named):
        CLASSES[family](**UNEVEN[family], projection=wrong)


def test_base_class_is_abstract():
    with pytest.raises(NotImplementedError, match="TCSPBertConfig or TCSPT5Config"):
        TCSPConfig().site_widths()
    with pytest.raises(ValueError, match="model_type is None"):
        TCSPConfig.from_dict({})
    with pytest.raises(ValueError, match="model_type is 'tcsp', which is no compressed model"):
        TCSPConfig.from_dict({"model_type": "tcsp"})


def test_from_dict_of_the_base_class():
    config = TCSPConfig.from_dict({"model_type": "tcsp_t5", **UNEVEN["t5"]})
    assert type(config) is TCSPT5Config and config.d_model == 24


def test_unused_keywords_come_back():
    """As with every configuration of transformers."""
    config, unused = TCSPConfig.from_dict(
        {"model_type": "tcsp_bert", **UNEVEN["bert"]}, hidden_dropout_prob=0.25, nonsense=1, return_unused_kwargs=True
    )
    assert config.hidden_dropout_prob == 0.25 and unused == {"nonsense": 1}


def test_projection_of_a_real_model_is_valid():
    for name in ("bert-ForPreTraining", "t5-gated-ForConditionalGeneration"):
        make_small(find(name)).config.check()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_labels": None}, "num_labels is None"),
        ({"num_labels": 1 << 40}, "num_labels is"),
        ({"attn_implementation": 3}, "attn_implementation is 3"),
        ({"hidden_dropout_prob": None}, "hidden_dropout_prob is None"),
        ({"id2label": [1]}, "id2label"),
        ({"use_cache": "yes"}, "use_cache is 'yes'"),
        ({"problem_type": "other"}, "(?s)problem_type.*other"),
        ({"auto_map": 3}, "auto_map is 3"),
        ({"to_dict": 3}, "no field 'to_dict'"),
    ],
)
def test_inherited_fields_are_checked(fields: dict[str, Any], message: str) -> None:
    """What transformers' own configuration would take, to fail on it later. Found by `tcsp selftest`."""
    with pytest.raises((ValueError, StrictDataclassFieldValidationError), match=message):  # the latter in 5.17
        TCSPBertConfig.from_dict({"model_type": "tcsp_bert", **fields})
