"""What a compressed model lost is measured in little memory, whatever the vocabulary."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from common import calibrated, find, make_dense, make_rows
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tcsp_hf import calibrate
from tcsp_hf.calibration.divergence import categorical_kl, divergence
from tcsp_hf.compression.check import measured_loss, probe_sequences
from tcsp_hf.compression.streams import padded_batches


class Largest(TorchDispatchMode):
    """The most entries of a tensor that was made."""

    entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(found) if isinstance(leaf, torch.Tensor) and not leaf._is_view()]
        self.entries = max([self.entries, *sizes])
        return found


@pytest.mark.parametrize("head", ["ForMaskedLM", "ForPreTraining", "ForTokenClassification"])
def test_divergence_of_tokens_goes_by_sequence(head: str) -> None:
    case = find(f"bert-{head}")
    model = make_dense(case)
    objective = calibrated(case, model).objective
    one, other = (torch.randn(10, 6, 500, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    mask = (torch.arange(6) < torch.arange(1, 11)[:, None]).long()
    dense, small = (
        SimpleNamespace(logits=logits, prediction_logits=logits, seq_relationship_logits=logits[:, 0, :2])
        for logits in (one, other)
    )
    with Largest() as largest:
        found = divergence(model, objective, {"attention_mask": mask}, dense, small)
    assert largest.entries <= 6 * 500
    share = 1.0 if head == "ForTokenClassification" else 0.15
    expected = share * (categorical_kl(one, other) * mask).sum()
    if head == "ForPreTraining":
        expected += categorical_kl(one[:, 0, :2], other[:, 0, :2]).sum()
    assert torch.equal(found, expected)


def test_batches_are_small_where_the_vocabulary_is_large() -> None:
    case, vocabulary = find("t5-ForConditionalGeneration"), 2**18
    stats = calibrate(make_dense(case), make_rows(case, 150), batch_size=64, progress=False, fisher=False)
    dense, other = (make_dense(case, torch.float32, seed, vocab_size=vocabulary) for seed in (0, 1))
    rows, sizes = probe_sequences(stats, 200, 8192), []
    (batch,) = padded_batches(rows, dense.device)
    with torch.no_grad():
        whole = divergence(dense, "seq2seq_lm", batch, dense(**batch), other(**batch)) / len(rows)
    other.register_forward_hook(lambda module, given, found: sizes.append(found.logits[..., 0].numel()))
    assert measured_loss(dense, other, stats) == pytest.approx(float(whole), rel=1e-5)
    assert len(sizes) > 1 and max(sizes) <= 2**26 // vocabulary
