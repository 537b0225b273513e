"""Tiny dense models, a tokenizer and texts, made on the spot: the self-test needs no Hub and no data."""

import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

VOCABULARY = 64
_SPECIAL = ("[PAD]", "</s>", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def make_bert(seed: int = 0, size: int = 16) -> PreTrainedModel:
    """A random BERT classifier of two layers, in evaluation mode; no weight is trivially zero or one."""
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=size,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=2 * size,
        max_position_embeddings=40,
        num_labels=3,  # type: ignore[call-arg]
    )
    return _perturbed(BertForSequenceClassification, config, seed)


def make_t5(seed: int = 0, size: int = 16) -> PreTrainedModel:
    """A random T5 of two layers a stack, in evaluation mode."""
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=size,
        d_kv=8,
        d_ff=2 * size,
        num_layers=2,
        num_heads=2,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=16,
        decoder_start_token_id=0,  # type: ignore[call-arg]
    )
    return _perturbed(T5ForConditionalGeneration, config, seed)


def _perturbed(model_class: Any, config: Any, seed: int) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: PreTrainedModel = model_class(config)
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Words w0, w1, ... after six special tokens."""
    words = [*_SPECIAL, *(f"w{i}" for i in range(VOCABULARY - len(_SPECIAL)))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 3), ("[SEP]", 4)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        eos_token="</s>",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def make_texts(count: int, seed: int = 0) -> list[str]:
    """Texts of 2 to 12 words."""
    draw = random.Random(seed)
    words = [f"w{i}" for i in range(VOCABULARY - len(_SPECIAL))]
    return [" ".join(draw.choices(words, k=draw.randint(2, 12))) for _ in range(count)]


def make_rows(count: int, seed: int = 0) -> list[dict[str, list[int]]]:
    """Tokenised texts, for both families."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        ids, labels = ([draw.randrange(2, VOCABULARY) for _ in range(draw.randint(2, 12))] for _ in range(2))
        rows.append({"input_ids": [*ids, 1], "labels": [*labels, 1]})
    return rows


def save_inputs(folder: Path) -> None:
    """What the commands of the self-test start from: `bert/`, `t5/` and `texts.txt` in `folder`."""
    tokenizer = make_tokenizer()
    for name, model in (("bert", make_bert()), ("t5", make_t5())):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / "texts.txt").write_text("\n".join(make_texts(60)) + "\n", encoding="utf-8")
