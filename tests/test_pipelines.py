"""transformers' pipelines take compressed models of every head that has one, and say what the model itself says."""

from typing import Any

import pytest
import torch
import transformers
from common import CASES, Case, find, make_small
from test_card import tokenizer_of
from transformers.pipelines import PIPELINE_REGISTRY

from tcsp_hf.publish.usage import PIPELINE_TAGS

TEXT = "w3 w4 [MASK] w5"
KNOWN = set(PIPELINE_REGISTRY.get_supported_tasks())  # transformers 5 has fewer of them
PIPED = [
    case
    for case in CASES
    if PIPELINE_TAGS.get(case.head) in KNOWN and not (case.decodes and case.head == "Model") and case.source != "mt5"
]


def test_heads_with_a_pipeline() -> None:
    expected = {"feature-extraction", "fill-mask", "text-classification", "token-classification"}
    assert {PIPELINE_TAGS[case.head] for case in PIPED} >= expected


@pytest.mark.parametrize("case", PIPED, ids=str)
def test_pipeline(case: Case) -> None:
    model, tokenizer = make_small(case), tokenizer_of(case)
    task = PIPELINE_TAGS[case.head]
    pipe = transformers.pipeline(task, model=model, tokenizer=tokenizer, device="cpu")
    inputs = tokenizer(TEXT, return_tensors="pt")
    if task == "question-answering":
        found = pipe(question="w3 w4", context="w5 w6 w7")
        assert found["answer"] and 0.0 <= found["score"] <= 1.0
        return
    if task == "text2text-generation":
        tokens = model.generate(**inputs, max_new_tokens=5)
        assert pipe(TEXT, max_new_tokens=5)[0]["generated_text"] == tokenizer.decode(
            tokens[0], skip_special_tokens=True
        )
        return
    with torch.no_grad():
        output: Any = model(**inputs)
    if task == "feature-extraction":
        assert torch.allclose(torch.tensor(pipe(TEXT)), output.last_hidden_state, atol=1e-5)
        return
    probabilities = output.logits.softmax(-1)[0]
    if task == "text-classification":
        scores = {entry["label"]: entry["score"] for entry in pipe(TEXT, top_k=None)}
        expected = {model.config.id2label[i]: float(value) for i, value in enumerate(probabilities)}
        assert scores == pytest.approx(expected, abs=1e-5)
    elif task == "fill-mask":
        mask = int((inputs["input_ids"][0] == tokenizer.mask_token_id).nonzero())
        best = probabilities[mask].topk(3)
        found = pipe(TEXT, top_k=3)
        assert [entry["token"] for entry in found] == best.indices.tolist()
        assert [entry["score"] for entry in found] == pytest.approx(best.values.tolist(), abs=1e-5)
    else:
        assert task == "token-classification"
        found = pipe(TEXT, ignore_labels=[])
        special = tokenizer(TEXT, return_special_tokens_mask=True)["special_tokens_mask"]
        assert [entry["index"] for entry in found] == [i for i in range(len(special)) if not special[i]]
        for entry in found:
            best = probabilities[entry["index"]]
            assert entry["entity"] == model.config.id2label[int(best.argmax())]
            assert entry["score"] == pytest.approx(float(best.max()), abs=1e-5)


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
        pipe = transformers.pipeline(task, model=str(folder))
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
