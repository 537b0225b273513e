"""The one table of cases (dense architecture x head) that the tests run over, and what they need for each.

Everything is tiny (32 wide, 2 layers, 120 tokens) and reproducible: a seed is an argument, never global state.
"""

import copy
import itertools
import os
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tcsp_hf.architectures import HEADS, PREFIXES
from tcsp_hf.calibration import Calibration, calibrate
from tcsp_hf.compression import compress

D = 32
VOCABULARY = 120
PAD, EOS = 0, 1
LAYERS = 2

_T5 = {
    "vocab_size": VOCABULARY,
    "d_model": D,
    "d_kv": 8,
    "d_ff": 40,
    "num_layers": LAYERS,
    "num_heads": 4,
    "pad_token_id": PAD,
    "eos_token_id": EOS,
    "decoder_start_token_id": PAD,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 16,
}
SOURCES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": (
        "bert",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": D,
            "num_attention_heads": 4,
            "num_hidden_layers": LAYERS,
            "intermediate_size": 40,
            "max_position_embeddings": 40,
            "layer_norm_eps": 1e-5,
            "pad_token_id": PAD,
        },
    ),
    "t5": ("t5", _T5),  # v1.0: relu, tied
    "t5-gated": ("t5", {**_T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),  # v1.1, FLAN
    "mt5": ("mt5", {**_T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
}
"""Name -> (model_type, fields of the dense configuration)."""


@dataclass(frozen=True)
class Case:
    """One dense class: a source of `SOURCES` and a head."""

    source: str
    head: str

    def __str__(self) -> str:
        return f"{self.source}-{self.head}"

    @property
    def family(self) -> str:
        return PREFIXES[SOURCES[self.source][0]][0]

    @property
    def dense_class(self) -> type[PreTrainedModel]:
        return getattr(transformers, PREFIXES[SOURCES[self.source][0]][1] + self.head)

    @property
    def small_class_name(self) -> str:
        return f"TCSP{'Bert' if self.family == 'bert' else 'T5'}{self.head}"

    @property
    def decodes(self) -> bool:
        """Whether the caller gives decoder inputs."""
        return self.family == "t5" and self.head in ("Model", "ForConditionalGeneration")

    @property
    def auto_class(self) -> Any:
        """The Auto class of the task."""
        names = {
            "Model": "AutoModel",
            "EncoderModel": "AutoModelForTextEncoding",
            "ForConditionalGeneration": "AutoModelForSeq2SeqLM",
        }
        return getattr(transformers, names.get(self.head, f"Auto{'Model'}{self.head}"))


CASES = [Case(source, head) for source, (kind, _) in SOURCES.items() for head in HEADS[PREFIXES[kind][0]]]
BERT_CASES = [case for case in CASES if case.family == "bert"]
T5_CASES = [case for case in CASES if case.source == "t5"]
ONE_SOURCE_CASES = BERT_CASES + T5_CASES
GENERATORS = [case for case in CASES if case.head == "ForConditionalGeneration"]


def find(name: str) -> Case:
    """The case whose name is `name`, e.g. `"bert-ForMaskedLM"`."""
    return next(case for case in CASES if str(case) == name)


# Models ------------------------------------------------------------------------------------------------------------


def perturb(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """Move every parameter (norms, biases, tables) away from its trivial start, in place."""
    generator = torch.Generator().manual_seed(seed)
    bert = model.config.model_type.endswith("bert")
    for _, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter)
        if parameter.dim() == 1:
            parameter.data += 0.25 * noise
        elif bert:  # initialised with a deviation of 0.02, with which attention would be almost uniform
            parameter.data += 0.1 * noise
        else:
            parameter.data += 0.05 * noise
    return model


def make_dense(case: Case, dtype: torch.dtype = torch.float64, seed: int = 0, **fields: Any) -> PreTrainedModel:
    """A dense model with random weights, none of them trivially zero or one, in evaluation mode."""
    kind, own = SOURCES[case.source]
    labels = {} if case.head == "ForQuestionAnswering" else {"num_labels": 3}
    config = transformers.AutoConfig.for_model(kind, **{**own, **labels, **fields})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = case.dense_class(config)
    untied = case.family == "t5" and not getattr(config, "scale_decoder_outputs", False)
    if untied and case.head == "ForConditionalGeneration":
        # transformers' configurations say "tied" whatever they were told; a checkpoint with both tables unties them
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    return perturb(model, seed).to(dtype).eval()


def orthonormal(rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    """Random (rows, columns) float64 with orthonormal columns."""
    return torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64))[0]


def planted(case: Case, k: int, *, own: bool, seed: int = 0, **fields: Any) -> PreTrainedModel:
    """A dense float64 model whose normalised stream lies exactly in k dimensions at every site.

    With `own` the subspaces differ: in a BERT from site to site (the next one is `M diag(gamma)` of the one before),
    in a T5 between encoder and decoder. Otherwise all sites share one, so that the paper's shared basis is exact too.
    The weights of the norms are arbitrary, except that a BERT with one shared subspace must have constant ones.
    """
    model = make_dense(case, torch.float64, seed, **fields)
    generator = torch.Generator().manual_seed(1000 + seed)
    with torch.no_grad():
        (_plant_bert if case.family == "bert" else _plant_t5)(model, k, own, generator)
    return model


def _plant_t5(model: PreTrainedModel, k: int, own: bool, generator: torch.Generator) -> None:
    basis = orthonormal(D, k + k // 2, generator)
    common = basis[:, : k // 2] if own else basis[:, :k]
    bases = {"encoder": basis[:, :k] if own else common}
    bases["decoder"] = torch.cat([common, basis[:, k:]], dim=1) if own else common
    tables = {id(module.weight): module.weight for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    for table in tables.values():
        if table.shape[1] == D:
            table.copy_(table @ common @ common.T)
    for name, parameter in model.named_parameters():
        if name.endswith((".o.weight", ".wo.weight")):
            here = bases["decoder" if "decoder" in name else "encoder"]
            parameter.copy_(here @ here.T @ parameter)


def _plant_bert(model: PreTrainedModel, k: int, own: bool, generator: torch.Generator) -> None:
    ones = torch.ones(D, 1, dtype=torch.float64)
    here = torch.linalg.qr(torch.cat([ones, orthonormal(D, k, generator)], dim=1))[0][:, 1:]  # orthogonal to ones
    base = model.base_model

    def write(tensor: torch.Tensor, basis: torch.Tensor) -> None:
        """Project vectors in dimension 0 (D); what the next norm's mean takes away may stay."""
        kept = torch.cat([basis, ones / D**0.5], dim=1) if own else basis
        tensor.copy_(kept @ (kept.T @ tensor))

    embeddings = base.embeddings
    for table in (embeddings.word_embeddings, embeddings.position_embeddings, embeddings.token_type_embeddings):
        write(table.weight.T, here)
    norm = embeddings.LayerNorm
    for layer in base.encoder.layer:
        for output in (layer.attention.output, layer.output):
            if own:
                moved = norm.weight[:, None] * here
                here = torch.linalg.qr(moved - moved.mean(0))[0]
            else:
                norm.weight.fill_(1.3)
            write(norm.bias, here)
            write(output.dense.weight, here)
            write(output.dense.bias, here)
            norm = output.LayerNorm
    if not own:
        norm.weight.fill_(0.8)
    if hasattr(getattr(model, "cls", None), "predictions"):
        # the head's stream follows an activation: k + 1 groups of equal neurons, centred, span k dimensions
        dense = model.cls.predictions.transform.dense
        group = torch.arange(D) % (k + 1)
        dense.weight.copy_(dense.weight[group])
        dense.bias.copy_(dense.bias[group])


# Inputs and outputs ------------------------------------------------------------------------------------------------


def processor_share() -> int:
    """Processors of the machine over processes that run tests."""
    return max(1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1)))


def make_inputs(case: Case, seed: int = 0) -> dict[str, torch.Tensor]:
    """A batch of 3 sequences of 9 tokens, two of them padded."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, VOCABULARY, (3, 9), generator=generator)
    mask = torch.ones_like(ids)
    for row, length in enumerate((5, 9, 7)):
        ids[row, length - 1] = EOS
        ids[row, length:] = PAD
        mask[row, length:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    if case.family == "bert":
        inputs["token_type_ids"] = torch.randint(0, 2, ids.shape, generator=generator)
    if case.head == "ForMultipleChoice":
        inputs = {name: torch.stack([value, value.flip(0)], dim=1) for name, value in inputs.items()}
    if case.decodes:
        inputs["decoder_input_ids"] = torch.randint(2, VOCABULARY, (3, 6), generator=generator)
        inputs["decoder_input_ids"][:, 0] = PAD
        inputs["decoder_attention_mask"] = torch.tensor([[1] * 6, [1] * 4 + [0] * 2, [1] * 6])
    return inputs


def make_labels(case: Case, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Labels under the names that the head's loss takes; none for models without a head."""
    ids = inputs["input_ids"]
    one_each = torch.tensor([2, 0, 1])
    if case.head in ("Model", "EncoderModel"):
        return {}
    if case.head == "ForQuestionAnswering":
        return {"start_positions": one_each, "end_positions": one_each + 1}
    if case.head == "ForTokenClassification":
        return {"labels": ids % 3}
    if case.head == "ForMaskedLM":
        return {"labels": ids}
    if case.head == "ForPreTraining":
        return {"labels": ids, "next_sentence_label": one_each % 2}
    if case.head == "ForConditionalGeneration":
        return {"labels": inputs["decoder_input_ids"]}
    return {"labels": one_each % 2 if case.head in ("ForNextSentencePrediction", "ForMultipleChoice") else one_each}


_DENSE_OUTPUTS = (
    "logits",
    "start_logits",
    "end_logits",
    "prediction_logits",
    "seq_relationship_logits",
    "pooler_output",
    "loss",
)


def outputs(
    case: Case, model: PreTrainedModel, inputs: dict[str, torch.Tensor], **kwargs: Any
) -> dict[str, torch.Tensor]:
    """Every output of a model that means the same in the dense and the compressed one; hidden states are lifted."""
    with torch.no_grad():
        found = model(**inputs, **kwargs)
    result = {name: found[name] for name in _DENSE_OUTPUTS if found.get(name) is not None}
    hidden = {}
    if case.head in ("Model", "EncoderModel"):
        hidden["last_hidden_state"] = (found["last_hidden_state"], {})
    if case.decodes:
        hidden["encoder_last_hidden_state"] = (found["encoder_last_hidden_state"], {"stack": "encoder"})
    compressed = model.config.model_type.startswith("tcsp_")
    for name, (states, stack) in hidden.items():
        result[name] = model.lift(states, **stack) if compressed else states
    assert result
    return result


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Over all outputs; both must have the same ones."""
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].shape == other[name].shape, name
        assert torch.isfinite(one[name]).all() and torch.isfinite(other[name]).all(), name
    return max(float((one[name] - other[name]).abs().max()) for name in one)


# Calibration -------------------------------------------------------------------------------------------------------


def make_rows(case: Case, count: int = 40, seed: int = 0) -> list[dict[str, Any]]:
    """Tokenised sequences of 3 to 12 tokens; for language models of sequences with targets, so that none is made up."""
    generator = torch.Generator().manual_seed(7 + seed)

    def sequence(shortest: int, longest: int) -> list[int]:
        length = int(torch.randint(shortest, longest + 1, (1,), generator=generator))
        return [*torch.randint(2, VOCABULARY, (length - 1,), generator=generator).tolist(), EOS]

    rows: list[dict[str, Any]] = [{"input_ids": sequence(3, 12)} for _ in range(count)]
    if case.head == "ForMultipleChoice":
        ids = torch.randint(2, VOCABULARY, (count // 4, 4, 2, 8), generator=generator)
        return [{"input_ids": batch} for batch in ids]
    for row in rows:
        if case.family == "bert":
            row["token_type_ids"] = [int(i > len(row["input_ids"]) // 2) for i in range(len(row["input_ids"]))]
        if case.head == "ForConditionalGeneration":
            row["labels"] = sequence(3, 8)
        if case.head == "Model" and case.family == "t5":
            row["decoder_input_ids"] = [PAD, *sequence(3, 8)]
    return rows


def calibrated(case: Case, model: PreTrainedModel, **kwargs: Any) -> Calibration:
    """Statistics of a dense model over `make_rows`; without a token sample unless asked: nothing is refit then, and
    what is tested is the projection alone."""
    return calibrate(model, make_rows(case), batch_size=16, progress=False, **{"sample_tokens": 0, **kwargs})


@cache
def dense_and_statistics(case: Case, dtype: torch.dtype = torch.float64) -> tuple[PreTrainedModel, Calibration]:
    """A dense model and its statistics, made once; treat both as read-only."""
    model = make_dense(case, dtype)
    return model, calibrated(case, model)


@cache
def dense_and_sample(case: Case, dtype: torch.dtype = torch.float64) -> tuple[PreTrainedModel, Calibration]:
    """As `dense_and_statistics`, with the token sample that refits and baselines read."""
    model = make_dense(case, dtype)
    return model, calibrated(case, model, sample_tokens=65_536)


def make_small(case: Case, dtype: torch.dtype = torch.float32, hidden_size: int = 16, **kwargs: Any) -> PreTrainedModel:
    """A new compressed model of the case."""
    return compress(*dense_and_statistics(case, dtype), hidden_size=hidden_size, **kwargs)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer of the tests' vocabulary: six special tokens, then w0, w1, ..."""
    special = ["[PAD]", "</s>", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = special + [f"w{i}" for i in range(VOCABULARY - len(special))]
    vocabulary = {word: i for i, word in enumerate(words)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 3), ("[SEP]", 4)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def make_ending_tokenizer() -> PreTrainedTokenizerFast:
    """`make_tokenizer` with an end token behind every text, as T5's classifiers need it."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "</s>"})
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A $B </s>", special_tokens=[("</s>", EOS)]
    )
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    return tokenizer


# Compressed configurations with every size uneven -------------------------------------------------------------------

UNEVEN: dict[str, dict[str, Any]] = {
    "bert": {
        "vocab_size": VOCABULARY,
        "hidden_size": 20,
        "source_hidden_size": D,
        "head_dim": 8,
        "num_attention_heads": 4,
        "num_hidden_layers": LAYERS,
        "intermediate_size": 40,
        "max_position_embeddings": 40,
        "layer_norm_eps": 1e-5,
        "site_hidden_sizes": [12, D, D, 17, 20],
        "layer_intermediate_sizes": [10, 40],
        "layer_attention_heads": [3, 2],
        "layer_qk_head_sizes": [4, 8],
        "layer_vo_head_sizes": [5, 3],
        "pooler_size": 22,
        "mlm_transform_size": 26,
        "mlm_head_size": 14,
        "tie_word_embeddings": False,
    },
    "t5": {
        **_T5,
        "d_model": 24,
        "source_hidden_size": D,
        "encoder_hidden_size": 20,
        "tie_lm_head": False,
        "classifier_size": 18,
        "encoder_layer_intermediate_sizes": [10, 40],
        "decoder_layer_intermediate_sizes": [8, 16],
        "encoder_layer_kept_heads": [[0, 2], [1, 2, 3]],
        "decoder_layer_kept_heads": [[3], [0, 1, 2]],
        "cross_layer_attention_heads": [2, 4],
        "encoder_layer_qk_head_sizes": [4, 6],
        "encoder_layer_vo_head_sizes": [6, 4],
        "decoder_layer_qk_head_sizes": [3, 8],
        "decoder_layer_vo_head_sizes": [5, 6],
        "cross_layer_qk_head_sizes": [3, 8],
        "cross_layer_vo_head_sizes": [3, 7],
    },
}


def rounding_error(case: Case, model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> float:
    """Largest difference to the same model in float64: the tiny random T5s amplify their rounding."""
    return largest_difference(outputs(case, copy.deepcopy(model).double(), inputs), outputs(case, model, inputs))


def make_uneven(case: Case, dtype: torch.dtype = torch.float32, seed: int = 0, **fields: Any) -> PreTrainedModel:
    """A compressed model with random weights whose widths, filters, heads and head sizes all differ."""
    import tcsp_hf

    config_class = tcsp_hf.TCSPBertConfig if case.family == "bert" else tcsp_hf.TCSPT5Config
    labels = {} if case.head == "ForQuestionAnswering" else {"num_labels": 3}
    config = config_class(**{**UNEVEN[case.family], **labels, **fields})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = getattr(tcsp_hf, case.small_class_name)(config)
    return perturb(model, seed).to(dtype).eval()


PROJECTIONS = ("shared", "per_site")
SUBSPACES = ("pca", "balanced")
KINDS = list(itertools.product(PROJECTIONS, SUBSPACES))
