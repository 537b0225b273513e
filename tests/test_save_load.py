"""Checkpoints: bit-equal after loading, in shards, without the package installed, and refused when damaged."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from common import (
    CASES,
    GENERATORS,
    ONE_SOURCE_CASES,
    VOCABULARY,
    Case,
    find,
    largest_difference,
    make_inputs,
    make_small,
    make_uneven,
    outputs,
)
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import tcsp_hf
from tcsp_hf import TCSPBertConfig, TCSPConfig, TCSPT5Config

per_case = pytest.mark.parametrize("case", CASES, ids=str)
REMOTE_CASES = list(dict.fromkeys([*ONE_SOURCE_CASES, *GENERATORS]))
per_remote_case = pytest.mark.parametrize("case", REMOTE_CASES, ids=str)
CODE = {
    "bert": ["configuration_tcsp.py", "configuration_tcsp_bert.py", "modeling_tcsp.py", "modeling_tcsp_bert.py"],
    "t5": ["configuration_tcsp.py", "configuration_tcsp_t5.py", "modeling_tcsp.py", "modeling_tcsp_t5.py"],
}
CONFIGS = {"bert": TCSPBertConfig, "t5": TCSPT5Config}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[Case, tuple[transformers.PreTrainedModel, Path]]:
    """One compressed model of every case, and where it is saved."""
    top = tmp_path_factory.mktemp("checkpoints")
    made = {}
    for case in CASES:
        model = make_small(case, projection="per_site")
        model.save_pretrained(top / str(case))
        made[case] = model, top / str(case)
    return made


def assert_same_bits(one: torch.nn.Module, other: torch.nn.Module) -> None:
    first, second = one.state_dict(), other.state_dict()
    assert first.keys() == second.keys()
    for name in first:
        assert first[name].dtype == second[name].dtype, name
        assert torch.equal(first[name], second[name]), name


@per_case
def test_save_and_load(case: Case, checkpoints):
    model, folder = checkpoints[case]
    loaded = case.auto_class.from_pretrained(folder)
    assert type(loaded) is type(model) is getattr(tcsp_hf, case.small_class_name)
    assert_same_bits(model, loaded)
    assert not loaded.training
    of_this_copy = {"_name_or_path", "dtype"}
    first, second = model.config.to_dict(), loaded.config.to_dict()
    assert {n: v for n, v in first.items() if n not in of_this_copy} == {
        n: v for n, v in second.items() if n not in of_this_copy
    }
    inputs = make_inputs(case)
    found = outputs(case, loaded, inputs)
    # where a tensor lies in memory decides how PyTorch groups a sum, so one that was computed may differ by an ulp
    assert largest_difference(outputs(case, model, inputs), found) <= 1e-5
    again = type(model).from_pretrained(folder)
    assert largest_difference(found, outputs(case, again, inputs)) == 0.0


@per_case
def test_config_of_the_right_subclass(case: Case, checkpoints):
    model, folder = checkpoints[case]
    config = TCSPConfig.from_pretrained(folder)
    assert type(config) is CONFIGS[case.family]
    assert type(transformers.AutoConfig.from_pretrained(folder)) is CONFIGS[case.family]
    assert config.projection == model.config.projection
    assert config.architectures == [case.small_class_name]


@per_case
def test_files_of_a_checkpoint(case: Case, checkpoints):
    model, folder = checkpoints[case]
    expected = [*CODE[case.family], "config.json", "model.safetensors"]
    if case.head == "ForConditionalGeneration":
        expected.append("generation_config.json")
    assert sorted(path.name for path in folder.iterdir()) == sorted(expected)
    assert json.loads((folder / "config.json").read_text())["auto_map"] == type(model).auto_map
    for name in CODE[case.family]:
        assert (folder / name).read_bytes() == (Path(tcsp_hf.__file__).parent / name).read_bytes()


@pytest.mark.parametrize("case", ONE_SOURCE_CASES, ids=str)
def test_shards(case: Case, checkpoints, tmp_path):
    model, folder = checkpoints[case]
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    shards = list(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2 and (tmp_path / "model.safetensors.index.json").is_file()
    loaded = case.auto_class.from_pretrained(tmp_path)
    assert_same_bits(model, loaded)
    inputs = make_inputs(case)
    whole = case.auto_class.from_pretrained(folder)
    assert largest_difference(outputs(case, whole, inputs), outputs(case, loaded, inputs)) <= 1e-5


@pytest.mark.parametrize("case", ONE_SOURCE_CASES, ids=str)
def test_uneven_sizes(case: Case, tmp_path):
    model = make_uneven(case)
    model.save_pretrained(tmp_path)
    loaded = case.auto_class.from_pretrained(tmp_path)
    assert_same_bits(model, loaded)
    assert [getattr(loaded.config, name) for name in model.config.to_dict() if "layer_" in name] == [
        getattr(model.config, name) for name in model.config.to_dict() if "layer_" in name
    ]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_number_format_survives(dtype, tmp_path):
    model = make_uneven(find("bert-ForMaskedLM"), dtype)
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path, dtype="auto")
    assert_same_bits(model, loaded)


def test_generation_config_survives(tmp_path):
    case = find("t5-ForConditionalGeneration")
    model = make_small(case)
    model.generation_config.num_beams = 3
    model.save_pretrained(tmp_path)
    assert transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path).generation_config.num_beams == 3


def test_saving_a_contradictory_configuration_writes_nothing(tmp_path):
    model = make_uneven(find("bert-Model"))
    model.config.hidden_size = 19
    with pytest.raises(ValueError, match="hidden_size is 19"):
        model.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_save_over_an_older_checkpoint(tmp_path):
    """As in training: `save_pretrained` into the same folder again."""
    case = find("bert-Model")
    model = make_uneven(case)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(1.0)
    model.save_pretrained(tmp_path)
    assert_same_bits(model, type(model).from_pretrained(tmp_path))


# Without the package --------------------------------------------------------------------------------------------------


def other_auto_classes(case: Case) -> list[str]:
    """The family's Auto classes beside the task's own; `AutoModel` first."""
    names = set(getattr(tcsp_hf, case.small_class_name).auto_map) - {"AutoConfig", case.auto_class.__name__}
    return sorted(names)


def load_remotely(checkpoints, top: Path, others) -> dict[str, dict]:
    """What a clean process finds in every checkpoint with `trust_remote_code=True`, by the case's name."""
    jobs = {}
    for case, (_, folder) in checkpoints.items():
        here = top / str(case)
        shutil.copytree(folder, here)
        (here / "inputs").mkdir()
        save_file(make_inputs(case), here / "inputs" / "inputs.safetensors")
        jobs[str(case)] = {"folder": str(here), "auto": case.auto_class.__name__, "others": others(case)}
    (top / "jobs.json").write_text(json.dumps(jobs))
    script = Path(__file__).with_name("load_without_the_package.py")
    environment = {**os.environ, "HF_HOME": str(top / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("HF_MODULES_CACHE", None)
    done = subprocess.run(
        [sys.executable, "-I", str(script), str(top / "jobs.json")],
        cwd=top,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    results = json.loads((top / "results.json").read_text())
    for name, result in results.items():
        result["tensors"] = load_file(top / name / "inputs" / "found.safetensors")
    return results


@pytest.fixture(scope="module")
def remote(checkpoints, tmp_path_factory) -> dict[str, dict]:
    def some(case: Case) -> list[str]:
        names = other_auto_classes(case)
        return sorted({names[0], names[CASES.index(case) % len(names)]})

    chosen = {case: checkpoints[case] for case in REMOTE_CASES}
    return load_remotely(chosen, tmp_path_factory.mktemp("remote"), some)


@per_remote_case
def test_remote_code_gives_the_same_bits(case: Case, checkpoints, remote):
    _, folder = checkpoints[case]
    result = remote[str(case)]
    loaded = case.auto_class.from_pretrained(folder)
    with torch.no_grad():
        expected = loaded(**make_inputs(case))[0]
    assert torch.equal(result["tensors"]["output"], expected)
    if case.head in ("Model", "EncoderModel"):
        assert torch.equal(result["tensors"]["lifted"], loaded.lift(expected))
    assert result["own"] == case.small_class_name
    assert result["config"] == CONFIGS[case.family].__name__
    assert all(module.startswith("transformers_modules.") for module in result["modules"])


@per_remote_case
def test_remote_code_is_saved_again(case: Case, checkpoints, remote):
    model, _ = checkpoints[case]
    result = remote[str(case)]
    assert result["auto_map"] == type(model).auto_map
    assert set(CODE[case.family]) <= set(result["files"])
    assert result["same_again"]


def assert_other_classes(case: Case, model: torch.nn.Module, result: dict) -> None:
    """The classes are the right ones, and have the trained weights of all that they share with the checkpoint."""
    auto_map = type(model).auto_map
    assert result["classes"] == {auto: auto_map[auto].split(".")[-1] for auto in result["classes"]}
    assert not {auto: names for auto, names in result["differing"].items() if names}
    least = sum(name.startswith("encoder.") for name in model.base_model.state_dict())
    assert min(result["shared"].values(), default=least) >= least > 10


@per_remote_case
def test_remote_code_of_other_auto_classes(case: Case, checkpoints, remote):
    """Of the headless one and of another task; the slow test below takes all."""
    assert len(remote[str(case)]["classes"]) >= 1
    assert_other_classes(case, checkpoints[case][0], remote[str(case)])


def test_remote_code_of_an_encoder_is_one(remote):
    """`AutoModel` of a T5 without a decoder adds none with random weights: a sentence encoder is loaded so."""
    result = remote["t5-EncoderModel"]
    assert result["classes"]["AutoModel"] == "TCSPT5EncoderModel" and result["equal"]["AutoModel"]
    assert remote["t5-ForTokenClassification"]["classes"]["AutoModel"] == "TCSPT5EncoderModel"
    assert remote["t5-ForConditionalGeneration"]["classes"]["AutoModel"] == "TCSPT5Model"


@pytest.mark.parametrize("trust", [False, True])
def test_an_encoder_is_one_with_the_package_too(checkpoints, trust):
    case = find("t5-EncoderModel")
    loaded = transformers.AutoModel.from_pretrained(checkpoints[case][1], trust_remote_code=trust)
    assert type(loaded) is tcsp_hf.TCSPT5EncoderModel
    assert_same_bits(checkpoints[case][0], loaded)


@pytest.mark.slow
def test_remote_code_of_every_auto_class(checkpoints, tmp_path):
    """Any Auto class loads any task's checkpoint."""
    results = load_remotely(checkpoints, tmp_path, other_auto_classes)
    for case in CASES:
        assert results[str(case)]["same_again"]
        assert set(results[str(case)]["classes"]) == set(other_auto_classes(case))
        assert_other_classes(case, checkpoints[case][0], results[str(case)])


@pytest.mark.parametrize("case", ONE_SOURCE_CASES, ids=str)
def test_registered_auto_classes(case: Case, checkpoints):
    """The same with the package: no `trust_remote_code`, and the registered classes."""
    model, folder = checkpoints[case]
    for auto in other_auto_classes(case):
        loaded = getattr(transformers, auto).from_pretrained(folder)
        name = type(model).auto_map[auto].split(".")[-1]
        if auto == "AutoModel" and case.head in ("EncoderModel", "ForTokenClassification") and case.family == "t5":
            name = type(loaded).__name__  # an encoder alone may stay one
        assert type(loaded) is getattr(tcsp_hf, name)
        first, second = model.base_model.state_dict(), loaded.base_model.state_dict()
        for key in first.keys() & second.keys():
            assert torch.equal(first[key], second[key]), (auto, key)


def test_another_number_of_labels(tmp_path):
    """A task head is replaced on request, as in transformers, and never in silence."""
    make_small(find("bert-ForSequenceClassification")).save_pretrained(tmp_path)
    auto = transformers.AutoModelForSequenceClassification
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        auto.from_pretrained(tmp_path, num_labels=5)
    loaded, info = auto.from_pretrained(tmp_path, num_labels=5, ignore_mismatched_sizes=True, output_loading_info=True)
    assert loaded.classifier.weight.shape[0] == 5
    assert {key[0] for key in info["mismatched_keys"]} == {"classifier.weight", "classifier.bias"}


# Damaged checkpoints --------------------------------------------------------------------------------------------------

DAMAGED = [find("bert-ForSequenceClassification"), find("t5-ForConditionalGeneration")]
damaged = pytest.mark.parametrize("case", DAMAGED, ids=str)


@pytest.fixture
def copied(case: Case, checkpoints, tmp_path) -> Path:
    folder = tmp_path / "damaged"
    shutil.copytree(checkpoints[case][1], folder)
    return folder


@damaged
@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.999])
def test_truncated_weights(case: Case, copied, kept):
    path = copied / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises((SafetensorError, OSError, ValueError, RuntimeError)):
        case.auto_class.from_pretrained(copied)


@damaged
def test_weights_with_bytes_added(case: Case, copied):
    path = copied / "model.safetensors"
    path.write_bytes(path.read_bytes() + b"\0" * 8)
    with pytest.raises((SafetensorError, OSError, ValueError, RuntimeError)):
        case.auto_class.from_pretrained(copied)


@damaged
def test_missing_weights_file(case: Case, copied):
    (copied / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"model\.safetensors"):
        case.auto_class.from_pretrained(copied)


@damaged
def test_missing_tensor(case: Case, copied):
    """A checkpoint of this very class without one of its weights would otherwise get random ones."""
    path = copied / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if "norm" in name)
    del tensors[name]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        case.auto_class.from_pretrained(copied)
    _, info = case.auto_class.from_pretrained(copied, output_loading_info=True)
    assert set(info["missing_keys"]) == {name}, "who asks for the loading info looks at it"


@damaged
def test_tensor_of_another_shape(case: Case, copied):
    path = copied / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if "norm" in name)
    tensors[name] = tensors[name][:-1].clone()
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(RuntimeError):
        case.auto_class.from_pretrained(copied)


@damaged
@pytest.mark.parametrize(
    ("alter", "named"),
    [
        ({"hidden_size": 12, "d_model": 12}, "hidden_size|d_model|projection.sites"),
        ({"source_hidden_size": 40}, "source_hidden_size"),
        ({"num_hidden_layers": 3, "num_layers": 3}, "site_hidden_sizes|projection.sites"),
        ({"vocab_size": "many"}, "vocab_size"),
        ({"num_attention_heads": 0, "num_heads": 0}, "num_attention_heads|num_heads"),
        ({"projection": []}, "projection"),
        ({"projection": {"method_version": 99}}, "projection.method_version is 99.*newer"),
        ({"layer_norm_eps": -1, "layer_norm_epsilon": -1}, "layer_norm_eps"),
        ({"dropout_rate": 2, "hidden_dropout_prob": 2}, "dropout"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_altered_configuration(case: Case, copied, alter, named):
    path = copied / "config.json"
    content = json.loads(path.read_text())
    content.update({name: value for name, value in alter.items() if name in content})
    path.write_text(json.dumps(content))
    with pytest.raises((ValueError, TypeError), match=named):
        case.auto_class.from_pretrained(copied)


@damaged
def test_vocabulary_size_that_the_weights_do_not_have(case: Case, copied):
    path = copied / "config.json"
    content = json.loads(path.read_text())
    assert content["vocab_size"] == VOCABULARY
    path.write_text(json.dumps(content | {"vocab_size": VOCABULARY + 1}))
    with pytest.raises((ValueError, RuntimeError)):
        case.auto_class.from_pretrained(copied)


@damaged
@pytest.mark.parametrize("content", ["", "{", "[]", '{"model_type": "tcsp_unknown"}'])
def test_broken_configuration(case: Case, copied, content):
    (copied / "config.json").write_text(content)
    with pytest.raises((OSError, ValueError, AttributeError, TypeError)):
        case.auto_class.from_pretrained(copied)
    with pytest.raises((OSError, ValueError, AttributeError, TypeError)):
        TCSPConfig.from_pretrained(copied)


def test_model_type_of_another_library_is_refused(tmp_path):
    transformers.BertConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"model_type is 'bert', which is no compressed model; allowed: tcsp_bert"):
        TCSPConfig.from_pretrained(tmp_path)


def test_untied_stacks_cannot_be_asked_for(tmp_path: Path) -> None:
    """Where a stock T5 takes `tie_word_embeddings=False` its stacks share a table all the same."""
    case = find("t5-ForConditionalGeneration")
    small, inputs = make_small(case), make_inputs(case)
    small.save_pretrained(tmp_path)
    loaded = type(small).from_pretrained(tmp_path, tie_word_embeddings=False)
    assert loaded.decoder.embed_tokens.weight is loaded.shared.weight
    assert largest_difference(outputs(case, small, inputs), outputs(case, loaded, inputs)) <= 1e-6


class Widened(tcsp_hf.TCSPBertForSequenceClassification):  # type: ignore[name-defined, misc]
    """A user's own subclass, in a file that is none of this package's."""


@pytest.mark.parametrize("name", ["projection_dim", "mlm_probability", "pooler_type", "site_hiden_sizes"])
def test_what_could_not_be_loaded_is_not_saved(name: str, tmp_path: Path) -> None:
    """An attribute that was set since, and that a configuration of ours refuses when it is read."""
    small = make_uneven(find("bert-ForSequenceClassification"))
    setattr(small.config, name, 0.1)
    with pytest.raises(ValueError, match=f"no field '{name}'"):
        small.save_pretrained(tmp_path / "odd")
    assert not (tmp_path / "odd").exists()


def test_some_layers_hidden_states_are_a_field_of_stock_models(tmp_path: Path) -> None:
    small = make_uneven(find("bert-ForSequenceClassification"))
    small.config.output_hidden_states = [-1]
    small.save_pretrained(tmp_path)
    assert type(small).from_pretrained(tmp_path).config.output_hidden_states == [-1]


def test_a_masked_lm_on_an_encoder_is_tied(tmp_path: Path) -> None:
    """As a stock one: its decoder starts from the embeddings, not at random."""
    make_small(find("bert-Model")).save_pretrained(tmp_path)
    kinds = {"output_loading_info": True}  # its head is new, which is said there
    model, _ = tcsp_hf.TCSPBertForMaskedLM.from_pretrained(tmp_path, **kinds)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_a_subclass_takes_the_code_along(tmp_path: Path) -> None:
    make_uneven(find("bert-ForSequenceClassification")).save_pretrained(tmp_path / "own")
    Widened.from_pretrained(tmp_path / "own").save_pretrained(tmp_path / "widened")
    assert {*CODE["bert"]} <= {path.name for path in (tmp_path / "widened").iterdir()}


def test_float8_weights_are_saved(tmp_path: Path) -> None:
    small = make_uneven(find("bert-Model"))
    weight = small.encoder.layer[0].output.dense.weight
    weight.data = weight.data.to(torch.float8_e4m3fn)
    small.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors")["encoder.layer.0.output.dense.weight"].dtype == weight.dtype
