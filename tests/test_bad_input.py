"""Whatever a user gives: a right result, or one clear error. Property tests over data, masks and broken dense models.

`TCSP_EXAMPLES` sets how many examples each property is tried on (the quick tests take a few).
"""

import copy
import os
from typing import Any

import numpy as np
import pytest
import torch
from common import Case, D, find, make_dense, make_inputs, make_tokenizer, outputs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

import tcsp_hf
from tcsp_hf import Calibration, TCSPError, calibrate, compress

EXAMPLES = int(os.environ.get("TCSP_EXAMPLES", "0"))
BERT, T5 = find("bert-ForSequenceClassification"), find("t5-ForConditionalGeneration")
MODELS = {BERT: make_dense(BERT, torch.float32, num_hidden_layers=1), T5: make_dense(T5, torch.float32, num_layers=1)}
TOKENIZER = make_tokenizer()
slow_examples = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]


def examples(quick: int) -> Any:
    """Derandomised while few; at random, and reported with a seed, where more are asked for."""
    return settings(max_examples=EXAMPLES or quick, derandomize=not EXAMPLES, suppress_health_check=slow_examples)


def settled(case: Case, data: Any, **kwargs: Any) -> Calibration | None:
    """Statistics that are finite and of some tokens, or None after an error with a message."""
    try:
        stats = calibrate(MODELS[case], data, progress=False, batch_size=4, max_target_length=3, **kwargs)
    except TCSPError as error:
        assert len(str(error)) > 10, "an error says what is wrong"
        return None
    assert stats.sequences > 0 and stats.tokens > 0
    for site in stats.sites.values():
        for total in (site.moment_sum, site.fisher_sum, site.query_fisher_sum, site.common_sum):
            assert total is None or bool(torch.isfinite(total).all())
    assert not any(module._forward_hooks for module in MODELS[case].modules()), "the model is left as it was"
    return stats


# Rows of tokens -------------------------------------------------------------------------------------------------------

odd = st.sampled_from([None, -1, 1.5, float("nan"), 10**30, "w3", b"x", [], [3], {}, 200, -100, True, np.int64(5)])
tokens = st.lists(st.integers(2, 119), min_size=1, max_size=6)


def sometimes(strategy: st.SearchStrategy[Any], other: st.SearchStrategy[Any], chance: int = 8) -> Any:
    """`other` in one of `chance` draws."""
    return st.integers(1, chance).flatmap(lambda number: other if number == 1 else strategy)


def shaped(values: st.SearchStrategy[list[Any]]) -> Any:
    """A list as a list, a tuple, an array, or a tensor."""
    kinds = [list, tuple, np.array, torch.tensor, lambda found: np.array([found, found])]

    def turned(pair: tuple[list[Any], int]) -> Any:
        try:
            return kinds[pair[1]](pair[0])
        except (ValueError, TypeError, RuntimeError, OverflowError):  # no such array
            return pair[0]

    return st.tuples(values, st.sampled_from([0, 0, 0, 0, 1, 2, 3, 4])).map(turned)


@st.composite
def token_rows(draw: Any) -> dict[str, Any]:
    ids = draw(sometimes(tokens, st.lists(st.one_of(st.integers(-3, 130), odd), max_size=4)))
    row: dict[str, Any] = {"input_ids": draw(sometimes(shaped(st.just(ids)), odd, 20))}
    if draw(st.booleans()):
        marks = st.sampled_from([0, 1, True, False, 1.0, 0.0])
        mask = st.lists(
            sometimes(marks, odd, 30), min_size=len(ids), max_size=len(ids) + draw(st.integers(0, 10)) // 10
        )
        row["attention_mask"] = draw(sometimes(shaped(mask), odd, 20))
    for name in ("token_type_ids", "labels", "decoder_input_ids"):
        if draw(st.integers(0, 4)) == 0:
            row[name] = draw(sometimes(shaped(st.lists(st.integers(0, 3), max_size=5)), odd))
    return draw(sometimes(st.just(row), st.one_of(odd, st.just({})), 20))


@pytest.mark.parametrize("case", [BERT, T5], ids=str)
@examples(60)
@given(st.data())
def test_rows_of_anything(case: Case, data: Any) -> None:
    settled(case, data.draw(st.lists(token_rows(), max_size=4)))


@examples(25)
@given(st.lists(tokens, min_size=1, max_size=4), st.data())
def test_masks_of_any_kind_say_the_same(rows: list[list[int]], data: Any) -> None:
    """bool, int and float, in rows or padded tensors; masked tokens, and rows of nothing, count for nothing."""
    expected = settled(BERT, [{"input_ids": row} for row in rows], fisher=False)
    assert expected is not None
    padded = [[*row, *[data.draw(st.integers(0, 119))] * data.draw(st.integers(0, 3))] for row in rows]
    masks = [[1] * len(row) + [0] * (len(wide) - len(row)) for row, wide in zip(rows, padded, strict=True)]
    kind = data.draw(st.sampled_from([int, bool, float]))
    masked = [
        {"input_ids": ids, "attention_mask": [kind(value) for value in mask]}
        for ids, mask in zip(padded, masks, strict=True)
    ]
    same = [settled(BERT, [*masked, {"input_ids": [5, 6], "attention_mask": [kind(0)] * 2}], fisher=False)]
    length = max(map(len, padded))
    ids = torch.tensor([row + [7] * (length - len(row)) for row in [*padded, [9]]])
    mask = torch.tensor([row + [0] * (length - len(row)) for row in [*masks, [0]]])
    for dtype in (torch.bool, torch.int32, torch.float32, torch.bfloat16):
        same.append(settled(BERT, [{"input_ids": ids, "attention_mask": mask.to(dtype)}], fisher=False))
    for stats in same:
        assert stats is not None and stats.data_fingerprint == expected.data_fingerprint
        assert stats.sequences == expected.sequences and stats.tokens == expected.tokens
        for name, site in stats.sites.items():
            torch.testing.assert_close(site.moment_sum, expected.sites[name].moment_sum, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("mask", [[[0.0, -1e9, 0.0]], [[1, 2, 1]], [[1.0, float("nan"), 1.0]], [[1, 1]], [1, 1, 1]])
def test_masks_of_other_values_and_shapes_are_refused(mask: list[Any]) -> None:
    """An additive mask, read as numbers, would say the opposite."""
    with pytest.raises(TCSPError, match="attention_mask"):
        calibrate(MODELS[BERT], [{"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.tensor(mask)}])
    if isinstance(mask[0], list):
        with pytest.raises(TCSPError, match="attention_mask"):
            calibrate(MODELS[BERT], [{"input_ids": [5, 6, 7], "attention_mask": mask[0]}], progress=False)


# Batches of tensors ---------------------------------------------------------------------------------------------------


@st.composite
def tensors(draw: Any, size: tuple[int, ...], most: int) -> torch.Tensor:
    if draw(st.integers(0, 9)) == 0:
        size = tuple(draw(st.lists(st.integers(0, 4), max_size=3)))
    dtype = draw(
        sometimes(st.just(torch.int64), st.sampled_from([torch.int32, torch.float32, torch.bool, torch.uint8]))
    )
    low = draw(sometimes(st.just(0), st.integers(-200, 0), 15))
    high = draw(sometimes(st.just(most), st.integers(1, 300), 15))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    return torch.randint(low, high, size, generator=generator).to(dtype)


@st.composite
def tensor_batches(draw: Any, case: Case) -> dict[str, torch.Tensor]:
    size = (draw(st.integers(0, 3)), draw(st.integers(0, 5)))
    batch = {"input_ids": draw(tensors(size, 120))}
    for name, most in (("attention_mask", 2), ("token_type_ids", 2), ("position_ids", 40)):
        if draw(st.integers(0, 2)) == 0:
            batch[name] = draw(tensors(size, most))
    if case is T5 or draw(st.integers(0, 9)) == 0:
        target = (size[0], draw(st.integers(0, 4)))
        for name, most in (("labels", 120), ("decoder_input_ids", 120), ("decoder_attention_mask", 2)):
            if draw(st.integers(0, 2)) == 0:
                batch[name] = draw(tensors(target, most))
    return batch


@pytest.mark.parametrize("case", [BERT, T5], ids=str)
@examples(60)
@given(st.data())
def test_batches_of_anything(case: Case, data: Any) -> None:
    first = {"input_ids": torch.tensor([[5, 6]])} if data.draw(st.booleans()) else None
    batches = data.draw(st.lists(tensor_batches(case), min_size=1, max_size=2))
    settled(case, [*([first] if first else []), *batches])


# Texts and columns ----------------------------------------------------------------------------------------------------

texts = st.one_of(
    st.text(max_size=20),
    st.text(st.characters(categories=["Cs", "Cc", "Co", "Lo", "So"]), max_size=8),
    st.sampled_from(["", " ", "w1 w2", "w3 " * 3000, "\x00", "\ud800", "W5\n\nw6\t", "[PAD] [MASK]", "é" * 50_000]),
)
columns = st.sampled_from(["text", "sentence", "sentence1", "sentence2", "question", "context", "label", "", "body"])


@pytest.mark.parametrize("case", [BERT, T5], ids=str)
@examples(50)
@given(st.data())
def test_texts_of_anything(case: Case, data: Any) -> None:
    single = st.lists(sometimes(texts, odd, 30), max_size=4)
    pairs = st.lists(sometimes(st.tuples(texts, texts), st.one_of(odd, texts), 30), max_size=4)
    named = st.dictionaries(columns, sometimes(texts, odd, 30), max_size=3)
    rows = named.flatmap(lambda row: st.lists(sometimes(st.just(row), named, 12), max_size=3))
    rows = st.one_of(single, pairs, rows, st.dictionaries(columns, single, max_size=2))
    chosen = data.draw(sometimes(st.none(), st.one_of(columns, st.tuples(columns, columns), st.just(()))))
    settled(case, data.draw(rows), tokenizer=TOKENIZER, text_columns=chosen)


@pytest.mark.parametrize(
    ("data", "named"),
    [
        ({"train": ["w1"]}, "data is a dict.*Choose one of its splits"),
        (["w1", ("w1", "w2")], "single texts and pairs"),
        ([("w1", "w2"), "w1"], "single texts and pairs"),
        ([{"text": "w1"}, {"body": "w1"}], r"must have the columns \['text'\]"),
        ([{"text": "w1"}, "w1"], r"must have the columns \['text'\]"),
        (["\ud800"], "tokenizer cannot read"),
        ([{"input_ids": [5]}, {"text": "w1"}], "every row must have input_ids"),
        ([{"input_ids": [5.5]}], "input_ids is .* whole numbers"),
        ([{"input_ids": 5}], "input_ids is 5; it must be a list"),
        ([{"input_ids": [5], "attention_mask": [1, 1]}], "2 entries for 1 input_ids"),
        ([{"input_ids": [5], "token_type_ids": [1, 1]}], "different lengths"),
        ([{"input_ids": [5], "token_type_ids": [7]}], "token_type_ids holds 7"),
        ([{"input_ids": [5], "token_type_ids": [0]}, {"input_ids": [5]}], "give all one"),
        ([{"input_ids": torch.tensor([[5]]), "position_ids": torch.tensor([[40]])}], "position_ids holds 40"),
        ([{"input_ids": torch.zeros(2, 1, 0, dtype=torch.long)}], r"shape \(2, 1, 0\)"),
        (
            [{"input_ids": torch.tensor([[5, 6]]), "token_type_ids": torch.tensor([[0]])}],
            "token_type_ids has the shape",
        ),
        (
            [{"input_ids": torch.tensor([[5]]), "decoder_attention_mask": torch.tensor([[1]])}],
            "without decoder_input_ids",
        ),
    ],
)
def test_what_is_wrong_is_named(data: Any, named: str) -> None:
    with pytest.raises(TCSPError, match=named):
        calibrate(MODELS[BERT], data, tokenizer=TOKENIZER, progress=False)


def test_a_choice_of_nothing_is_refused() -> None:
    case = find("bert-ForMultipleChoice")
    ids = torch.full((2, 2, 3), 7)
    mask = torch.ones_like(ids)
    mask[1, 0] = 0
    with pytest.raises(TCSPError, match="a choice without a single token"):
        calibrate(make_dense(case), [{"input_ids": ids, "attention_mask": mask}], progress=False)
    mask[1, 1] = 0
    stats = calibrate(make_dense(case), [{"input_ids": ids, "attention_mask": mask}], progress=False)
    assert stats.sequences == 1 and stats.tokens == 6


@pytest.mark.parametrize("name", ["max_target_length", "sample_tokens", "seed"])
def test_numbers_of_the_wrong_kind(name: str) -> None:
    for value in (None, "3", 2.5, True, *([-1] if name != "seed" else [])):
        with pytest.raises(TCSPError, match=f"{name} is {value!r}"):
            calibrate(MODELS[BERT], [{"input_ids": [5]}], progress=False, **{name: value})


@pytest.mark.parametrize("case", [BERT, T5], ids=str)
def test_one_token_is_enough(case: Case) -> None:
    """For as many directions as there are tokens; what is left out is said, or carried without energy."""
    one = {"input_ids": [5], **({"labels": [6]} if case is T5 else {})}
    stats = settled(case, [one])
    assert stats is not None and stats.tokens == 1
    small = compress(MODELS[case], stats, hidden_size=1, multiple_of=1)
    assert_finite(case, small)
    with pytest.raises(TCSPError, match="1 tokens, but a hidden size of 2 needs at least 2"):
        compress(MODELS[case], stats, hidden_size=2, multiple_of=1)


# Dense models that are broken, dead or degenerate ---------------------------------------------------------------------


def assert_finite(case: Case, model: PreTrainedModel) -> None:
    for name, value in outputs(case, model, make_inputs(case)).items():
        assert bool(torch.isfinite(value).all()), name


def _zero(parameter: torch.Tensor, draw: Any) -> None:
    parameter.zero_()


def _dead_rows(parameter: torch.Tensor, draw: Any) -> None:
    parameter[::2] = 0.0


def _twins(parameter: torch.Tensor, draw: Any) -> None:
    half = len(parameter) // 2
    parameter[half : 2 * half] = parameter[:half]


def _constant(parameter: torch.Tensor, draw: Any) -> None:
    parameter[:] = parameter[:1].clone()


def _poison(parameter: torch.Tensor, draw: Any) -> None:
    flat = parameter.view(-1)
    flat[draw(st.integers(0, len(flat) - 1))] = draw(st.sampled_from([float("nan"), float("inf"), -float("inf"), 1e38]))


def _huge(parameter: torch.Tensor, draw: Any) -> None:
    parameter *= draw(st.sampled_from([1e4, 1e12, 1e30]))


def _tiny(parameter: torch.Tensor, draw: Any) -> None:
    parameter *= 1e-12 if draw is None else draw(st.sampled_from([1e-4, 1e-12, 1e-30, 1e-42]))


HARMLESS = (_dead_rows, _twins, _zero, _constant, _tiny)
BUDGETS = ({"hidden_size": 8}, {"hidden_size": 24}, {"energy": 0.9}, {"energy": 1.0}, {"remove": 0.3}, {"remove": 0.6})


@pytest.mark.parametrize("case", [BERT, T5], ids=str)
@examples(12)
@given(st.data())
def test_dense_models_of_any_kind(case: Case, data: Any) -> None:
    """Dead, duplicate, constant, tiny, huge or poisoned weights: finite outputs or one error; a NaN is never kept."""
    dense = copy.deepcopy(MODELS[case])
    parameters = [parameter for _, parameter in sorted(dense.named_parameters())]
    with torch.no_grad():
        for parameter in data.draw(st.lists(st.sampled_from(parameters), min_size=1, max_size=5, unique_by=id)):
            data.draw(st.sampled_from([*HARMLESS, _poison, _huge]))(parameter, data.draw)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    ids = torch.randint(2, 119, (data.draw(st.sampled_from([4, 30])), 6), generator=generator)
    rows = [{"input_ids": row, **({"labels": row[:3]} if case is T5 else {})} for row in ids.tolist()]
    options = {"subspace": data.draw(st.sampled_from(["pca", "balanced"])), **data.draw(st.sampled_from(BUDGETS))}
    options["refit"] = data.draw(st.sampled_from([None, False]))
    if options["refit"] is False:
        options["axes"] = ("hidden",)
    try:
        stats = calibrate(dense, rows, progress=False)
        small = compress(dense, stats, **options)
    except TCSPError as error:
        assert len(str(error)) > 10
        return
    assert all(bool(torch.isfinite(parameter).all()) for parameter in small.parameters())
    assert_finite(case, small)


@pytest.mark.parametrize("case", [BERT, T5], ids=str)
@pytest.mark.parametrize("defect", HARMLESS, ids=lambda defect: defect.__name__)
def test_degenerate_features_are_exact_at_the_full_width(case: Case, defect: Any) -> None:
    """Second moments of low rank, neurons that are dead or there twice: nothing is lost where nothing is cut."""
    dense = make_dense(case, torch.float64)
    table = dense.get_input_embeddings().weight
    with torch.no_grad():
        # single features of the stream, and neurons
        defect(table.T[: D // 2], None)
        for name, parameter in dense.named_parameters():
            if name.endswith(("intermediate.dense.weight", "wi.weight")):
                defect(parameter[: len(parameter) // 2], None)
    rows = [{"input_ids": [i, i + 1, 5], "labels": [i, 7]} for i in range(2, 60)]
    stats = calibrate(dense, rows, progress=False, sample_tokens=0)
    for subspace in ("pca", "balanced"):
        small = compress(dense, stats, hidden_size=D, subspace=subspace)
        inputs = make_inputs(case)
        for name, value in outputs(case, small, inputs).items():
            assert torch.allclose(value, outputs(case, dense, inputs)[name], atol=1e-8), name


@examples(40)
@given(st.integers(-2, 300), st.integers(0, 80), st.sampled_from(["ids", "types", "positions"]))
def test_inputs_of_a_compressed_model_out_of_bounds(token: int, length: int, where: str) -> None:
    """As in transformers: an index beyond a table is an IndexError of PyTorch's, never another row's embedding."""
    model = SMALL
    ids = torch.full((1, length), 5)
    more: dict[str, torch.Tensor] = {}
    size = {"ids": model.config.vocab_size, "types": 2, "positions": model.config.max_position_embeddings}[where]
    wrong = torch.full((1, length), token)
    if where == "ids":
        ids = wrong
    else:
        more = {"token_type_ids" if where == "types" else "position_ids": wrong}
    good = length > 0 and length <= model.config.max_position_embeddings and 0 <= token < size
    try:
        with torch.no_grad():
            found = model(input_ids=ids, **more).logits
    except (IndexError, ValueError, RuntimeError):
        assert not good
        return
    assert good and bool(torch.isfinite(found).all())


SMALL = tcsp_hf.TCSPBertForSequenceClassification(
    tcsp_hf.TCSPBertConfig(
        **{"vocab_size": 120, "hidden_size": 8, "source_hidden_size": 16, "num_attention_heads": 2},
        **{"num_hidden_layers": 1, "intermediate_size": 8, "max_position_embeddings": 40},
    )
).eval()
