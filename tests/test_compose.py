"""`tcsp bench compose`: other libraries' ways on a dense and a compressed classifier."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from common import find, make_dense, make_ending_tokenizer, make_inputs, make_small, make_tokenizer, make_uneven
from datasets import Dataset
from test_cli import tcsp

from tcsp_hf import TCSPError
from tcsp_hf.cli.bench import compose as command
from tcsp_hf.evaluation import compose
from tcsp_hf.evaluation.scoring import Classification
from tcsp_hf.publish.results import CardResults

CLASSIFIER = find("bert-ForSequenceClassification")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("models")
    make_dense(CLASSIFIER, torch.float32, num_labels=2).save_pretrained(folder / "dense")
    make_uneven(CLASSIFIER, num_labels=2).save_pretrained(folder / "small")
    for name in ("dense", "small"):
        make_tokenizer().save_pretrained(folder / name)
    return folder / "dense", folder / "small"


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "data" / "glue" / "sst2"
    folder.mkdir(parents=True)
    rows = [" ".join(f"w{(i * j + i) % 30}" for j in range(3 + i % 7)) for i in range(40)]
    for split in ("train", "validation"):
        labels = [i % 2 for i in range(40)]
        Dataset.from_dict({"sentence": rows, "label": labels}).to_parquet(folder / f"{split}.parquet")
    monkeypatch.setenv("TCSP_DATA_DIR", str(tmp_path / "data"))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft reads it
def test_bench(models: tuple[Path, Path], data: None, tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="pip install 'tcsp_hf[peft]'")
    dense, small = models
    told = ("--model", small, "--dense", dense, "--ways", "dynamic int8,device map", "--lora-samples", 40)
    shape = ("--batch", 2, "--length", 6, "--rounds", 2, "--card-results", tmp_path / "card.json")
    found = json.loads(tcsp("bench", "compose", *told, *shape, "--json"))
    rows = {(row["model"], row["way"]): row for row in found["rows"]}
    assert len(rows) == 6 and not any("error" in row for row in rows.values())
    first = rows["dense", "as it is"]
    assert first["distance"] == 0.0 and first["speedup"] == 1.0
    for name in ("dense", "compressed"):
        plain, mapped, int8 = (rows[name, way] for way in ("as it is", "device map", "dynamic int8"))
        assert mapped["distance"] == plain["distance"] and mapped["accuracy"] == plain["accuracy"]
        assert int8["bytes"] < plain["bytes"] and int8["distance"] != plain["distance"]
    lora = found["lora"]
    assert lora["trained"] > 0 and lora["adapter_bytes"] > 0
    assert lora["reloaded"] <= 1e-6 and lora["merged"] <= 1e-4
    assert lora["distance"] != rows["compressed", "as it is"]["distance"]
    card = CardResults.load(tmp_path / "card.json")
    assert card.evaluations[0].value == rows["compressed", "as it is"]["accuracy"]
    assert card.latency[0].dense_ms == first["ms"] and "threads" in card.machine


def test_a_way_that_does_not_run_says_why() -> None:
    dense = make_dense(CLASSIFIER, torch.float32)

    def fail(model: torch.nn.Module) -> None:
        raise NotImplementedError("not on this processor")

    ways = {"as it is": compose.WAYS["as it is"], "other": compose.Way(None, fail)}
    task = Classification("two", ["w1 w2", "w3"], [0, 1])
    told = {"batch": 1, "rounds": 1}
    found = compose.compare_ways({"dense": dense}, ways, task, make_tokenizer(), length=4, **told)
    assert found[0]["distance"] == 0.0 and found[0]["ms"] > 0
    assert found[1] == {"model": "dense", "way": "other", "error": "NotImplementedError: not on this processor"}
    with pytest.raises(TCSPError, match="The dense model, as it is, cannot be scored or timed: RuntimeError: "):
        compose.compare_ways({"dense": dense}, ways, task, make_tokenizer(), length=41, **told)


def test_a_t5_classifier_reads_its_end_token() -> None:
    case = find("t5-ForSequenceClassification")
    models = {"dense": make_dense(case, torch.float32), "compressed": make_small(case)}
    ways = compose.choose_ways([])
    task = Classification("two", ["w1 w2", "w3"], [0, 1])
    found = compose.compare_ways(models, ways, task, make_ending_tokenizer(), batch=2, length=4, rounds=1)
    assert [row["ms"] > 0 for row in found] == [True, True]


def test_own_data_and_splits_of_other_names(
    models: tuple[Path, Path], data: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a card says of the data; LoRA learns a known task's labels by their names."""
    dense, small = models
    own = tmp_path / "data" / "glue" / "sst2"
    told = ("bench", "compose", "--model", small, "--dense", dense, "--batch", 1, "--length", 4, "--rounds", 1)
    told = (*told, "--ways", "as it is", "--json")
    tcsp(*told, "--task", own, "--card-results", tmp_path / "own.json")
    (entry,) = CardResults.load(tmp_path / "own.json").evaluations
    assert (entry.dataset, entry.config, entry.split) == ("sst2", None, "validation")
    with pytest.raises(TCSPError, match=r"--lora-samples trains on a GLUE task's rows, but --task is"):
        tcsp(*told, "--task", own, "--lora-samples", 4)
    rows = [{"score": 1.0, "ms": 1.0, "accuracy": 0.5}] * 2
    card = command._for_card(rows, "mnli", Classification("mnli", ["w1"], [0]), 1, 4, None)
    assert (card.evaluations[0].config, card.evaluations[0].split) == ("mnli", "validation_matched")

    swapped = [{"sentence": f"w{i}", "label": ["positive", "negative"][i % 2]} for i in range(6)]
    Dataset.from_list(swapped).to_parquet(str(own / "train.parquet"))
    learned: list[int] = []
    monkeypatch.setattr(
        command, "finetune", lambda _model, _tokenizer, _task, rows, *_more: learned.extend(rows["label"])
    )

    def adapt(model: Any, train: Any, _inputs: Any) -> Any:
        train(model)
        return model, {}

    monkeypatch.setattr(command, "adapt", adapt)
    monkeypatch.setattr(command, "find_spec", lambda _name: True)
    tcsp(*told, "--lora-samples", 6)
    assert learned == [1, 0] * 3


def test_refusals(models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense, small = models
    told = ("bench", "compose", "--model", small, "--dense", dense)
    with pytest.raises(TCSPError, match="no way 'int3'; allowed: as it is, dynamic int8"):
        tcsp(*told, "--ways", "int3")
    (tmp_path / "card.json").write_text("mine")
    with pytest.raises(TCSPError, match=r"card\.json exists"):
        tcsp(*told, "--card-results", tmp_path / "card.json")
    monkeypatch.setattr(compose.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TCSPError, match="torchao int8 needs torchao: pip install torchao"):
        compose.choose_ways(["torchao int8"])
    assert list(compose.choose_ways(None)) == ["as it is", "dynamic int8", "torch.compile", "device map"]


class OnlyLinear(torch.Tensor):
    """A weight as quantisers make them: `linear` knows it, other products do not."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func in (torch.addmm, torch.matmul, torch.Tensor.t, torch.Tensor.__matmul__):
            raise NotImplementedError(func)
        if func is not torch.nn.functional.linear:
            return super().__torch_function__(func, types, args, kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


def test_weights_of_another_tensor_class() -> None:
    model, inputs = make_uneven(CLASSIFIER), make_inputs(CLASSIFIER)
    with torch.no_grad():
        expected = model(**inputs).logits
        for module in model.modules():
            if type(module) is torch.nn.Linear:
                module.weight = torch.nn.Parameter(module.weight.data.as_subclass(OnlyLinear), requires_grad=False)
        found = model(**inputs).logits
    assert any(type(layer.output.residual.weight) is OnlyLinear for layer in model.bert.encoder.layer)
    torch.testing.assert_close(found, expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of those libraries, of themselves
@pytest.mark.parametrize("way", ["torchao int8", "torchao int8 weights", "bitsandbytes int8", "bitsandbytes nf4"])
def test_quantisers(way: str) -> None:
    """Linears are replaced, and the outputs stay near."""
    entry = compose.WAYS[way]
    if find_spec(entry.package) is None:
        pytest.skip(f"pip install {entry.package}")
    model, inputs = make_uneven(CLASSIFIER), make_inputs(CLASSIFIER)
    with torch.no_grad():
        expected, quantised = model(**inputs).logits, entry.make(model)
        try:
            found = quantised(**inputs).logits
        except (AssertionError, RuntimeError) as error:
            # on processors for which bitsandbytes packs 4-bit weights, it takes only sizes that are whole blocks
            with pytest.raises((AssertionError, RuntimeError), match=r"divisible|shape"):
                entry.make(make_dense(CLASSIFIER, torch.float32))(**inputs)
            pytest.skip(f"not of a dense model either, on this processor: {error}")
        again = model(**inputs).logits
    assert torch.equal(expected, again), "the model itself was changed"
    assert not torch.equal(expected, found)
    assert torch.nn.functional.cosine_similarity(found.flatten(), expected.flatten(), dim=0) > 0.85
