"""lm-eval's HFLM on a compressed T5: the log-likelihoods are those of the model itself."""

import json
from pathlib import Path

import pytest
import torch
from common import EOS, find, make_small, make_tokenizer

SEQ2SEQ = find("t5-ForConditionalGeneration")
DOCUMENTS = [
    {"question": f"w{i} w{i + 1} w{i + 2}", "choices": [f"w{i + 5}", f"w{i + 6} w{i + 7}"], "gold": i % 2}
    for i in range(1, 7)
]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # lm-eval's own
def test_multiple_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval", reason="pip install lm-eval")
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    small, tokenizer = make_small(SEQ2SEQ), make_tokenizer()
    small.save_pretrained(tmp_path / "small")
    tokenizer.save_pretrained(tmp_path / "small")
    (tmp_path / "documents.jsonl").write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS))
    task = {
        "task": "letters",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"validation": str(tmp_path / "documents.jsonl")}},
        "validation_split": "validation",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{gold}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    }
    lm = HFLM(str(tmp_path / "small"), backend="seq2seq", device="cpu", dtype="float32", prefix_token_id=EOS)
    assert type(lm.model).__name__ == "TCSPT5ForConditionalGeneration"
    found = simple_evaluate(lm, tasks=[task], bootstrap_iters=0)
    right = 0
    for sample in found["samples"]["letters"]:
        document = sample["doc"]
        scores = []
        for choice, (reported, _) in zip(document["choices"], sample["filtered_resps"], strict=True):
            source = tokenizer(document["question"], return_tensors="pt")["input_ids"]
            target = tokenizer(choice, add_special_tokens=False, return_tensors="pt")["input_ids"]
            with torch.no_grad():
                logits = lm.model(input_ids=source, labels=target).logits.log_softmax(-1)
            own = float(logits.gather(-1, target.unsqueeze(-1)).sum())
            assert own == pytest.approx(float(reported), abs=1e-3)
            scores.append(own)
        right += scores.index(max(scores)) == document["gold"]
    assert found["results"]["letters"]["acc,none"] == pytest.approx(right / len(DOCUMENTS))
