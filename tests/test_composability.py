"""Compressed models under other libraries: PEFT, quantisation, torch.compile, accelerate, pipelines, pickle."""

import copy
import pickle
import shutil
from pathlib import Path

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
    make_tokenizer,
    make_uneven,
    outputs,
)

TASKS = [
    find(name)
    for name in ("bert-ForSequenceClassification", "bert-ForMaskedLM", "t5-ForConditionalGeneration", "t5-EncoderModel")
]
per_task = pytest.mark.parametrize("case", TASKS, ids=str)


@per_task
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft reads it
def test_peft_lora(case: Case, tmp_path: Path) -> None:
    """all-linear on uneven widths: train a step, save, load on a fresh base, merge: always the same outputs."""
    peft = pytest.importorskip("peft")
    base, inputs = make_uneven(case), make_inputs(case)
    untouched = outputs(case, base, inputs)
    model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=2, target_modules="all-linear"))
    assert model.get_nb_trainable_parameters()[0] > 0
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()
    for _ in range(2):  # in the first step the gradient of A is zero
        found = model(**inputs, **make_labels(case, inputs))
        (found.loss if found.get("loss") is not None else found[0].square().mean()).backward()
        optimizer.step()
    model.eval()
    expected = outputs(case, model.get_base_model(), inputs)
    assert largest_difference(expected, untouched) > 1e-4, "training changed nothing"
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter").eval()
    assert largest_difference(expected, outputs(case, again.get_base_model(), inputs)) <= 1e-6
    merged = again.merge_and_unload()
    assert type(merged) is type(base)
    scale = max(1.0, *(float(value.abs().max()) for value in expected.values()))
    assert largest_difference(expected, outputs(case, merged, inputs)) <= 1e-4 * scale
    merged.save_pretrained(tmp_path / "merged")
    reloaded = type(base).from_pretrained(tmp_path / "merged")
    assert largest_difference(outputs(case, merged, inputs), outputs(case, reloaded, inputs)) == 0.0


@per_task
@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")  # no torchao here
def test_dynamic_int8(case: Case) -> None:
    from torch.ao.quantization import quantize_dynamic

    model, inputs = make_uneven(case), make_inputs(case)
    expected = outputs(case, model, inputs)
    quantised = quantize_dynamic(copy.deepcopy(model), {torch.nn.Linear}, dtype=torch.qint8)
    assert any(isinstance(module, torch.ao.nn.quantized.dynamic.Linear) for module in quantised.modules())
    for name, value in outputs(case, quantised, inputs).items():
        alike = torch.nn.functional.cosine_similarity(value.flatten(), expected[name].flatten(), dim=0)
        assert alike > 0.85 and not torch.equal(value, expected[name]), name  # the layers are tiny and random


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="PyTorch compiles C++ for it")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # PyTorch's compiler, of itself
@pytest.mark.parametrize("case", [find("bert-ForSequenceClassification"), find("t5-ForConditionalGeneration")], ids=str)
def test_torch_compile(case: Case) -> None:
    model, inputs = make_uneven(case), make_inputs(case)
    expected = outputs(case, model, inputs)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        found = compiled(**inputs)
    assert (found.logits - expected["logits"]).abs().max() <= 1e-4 * expected["logits"].abs().max()
    torch._dynamo.reset()


@per_task
def test_device_map(case: Case, tmp_path: Path) -> None:
    model, inputs = make_uneven(case), make_inputs(case)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, device_map={"": "cpu"})
    assert largest_difference(outputs(case, model, inputs), outputs(case, loaded, inputs)) == 0.0
    assert type(model).from_pretrained(tmp_path, device_map="auto").device.type in ("cpu", "cuda", "mps")


@per_task
def test_offload_to_disk(case: Case, tmp_path: Path) -> None:
    """Half of the layers lie on disk and are read when their turn comes."""
    from accelerate import cpu_offload, disk_offload

    model, inputs = make_uneven(case), make_inputs(case)
    expected = outputs(case, model, inputs)
    offloaded = cpu_offload(copy.deepcopy(model), execution_device=torch.device("cpu"))
    with torch.no_grad():
        # hooks keep results from being written over others, which rounds once less
        assert (offloaded(**inputs)[0] - model(**inputs)[0]).abs().max() <= 1e-5
    on_disk = disk_offload(copy.deepcopy(model), str(tmp_path / "disk"), execution_device=torch.device("cpu"))
    with torch.no_grad():
        assert (on_disk(**inputs)[0] - model(**inputs)[0]).abs().max() <= 1e-5
    assert largest_difference(expected, outputs(case, model, inputs)) == 0.0


@pytest.mark.parametrize("case", ONE_SOURCE_CASES, ids=str)
def test_pickle_and_deepcopy(case: Case) -> None:
    model, inputs = make_uneven(case), make_inputs(case)
    expected = outputs(case, model, inputs)
    for again in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert type(again) is type(model)
        assert largest_difference(expected, outputs(case, again, inputs)) == 0.0


PIPELINES = {
    "fill-mask": ("bert-ForMaskedLM", "w1 [MASK] w3"),
    "text-classification": ("bert-ForSequenceClassification", "w1 w2"),
    "token-classification": ("bert-ForTokenClassification", "w1 w2"),
    "feature-extraction": ("bert-Model", "w1 w2"),
    "zero-shot-classification": (
        "bert-ForSequenceClassification",
        {"sequences": "w1", "candidate_labels": ["w2", "w3"]},
    ),
}


@pytest.mark.parametrize("task", PIPELINES)
def test_pipelines_from_a_folder(task: str, tmp_path: Path) -> None:
    name, text = PIPELINES[task]
    fields = {"label2id": {"entailment": 0, "neutral": 1, "contradiction": 2}} if task.startswith("zero") else {}
    if fields:
        fields["id2label"] = {i: label for label, i in fields["label2id"].items()}
    model = make_uneven(find(name), **fields)
    model.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    run = transformers.pipeline(task, model=str(tmp_path), device="cpu")
    assert type(run.model) is type(model)
    assert run(**text) if isinstance(text, dict) else run(text)
