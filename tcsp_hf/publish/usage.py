"""How a card says to load a checkpoint: with the package, without it, and as a pipeline."""

import json

from .checkpoint import Checkpoint

PIPELINE_TAGS = {
    "Model": "feature-extraction",
    "EncoderModel": "feature-extraction",
    "ForMaskedLM": "fill-mask",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForConditionalGeneration": "text2text-generation",
}
"""Head -> the Hub's name of its task; the other heads have none."""

_RERANKER = "CrossEncoder"
_TEXTS = {
    "ForQuestionAnswering": '"Who wrote it?", "It was written by Ada."',
    "ForNextSentencePrediction": '"It was late.", "We went home."',
}
_LIFT = "hidden = model.lift(model({}).last_hidden_state)  # back in the dense model's space"
_RUN = {
    "Model": _LIFT.format("**inputs"),
    "EncoderModel": _LIFT.format("**inputs"),
    "ForConditionalGeneration": "tokens = model.generate(**inputs, max_new_tokens=40)\n"
    "print(tokenizer.decode(tokens[0], skip_special_tokens=True))",
    "ForQuestionAnswering": "outputs = model(**inputs)  # start_logits and end_logits",
    "ForPreTraining": "outputs = model(**inputs)  # prediction_logits and seq_relationship_logits",
}


def pipeline_tag(checkpoint: Checkpoint) -> str | None:
    """The Hub's name of the task; a T5 with two bare stacks has none."""
    return None if _two_bare_stacks(checkpoint) else PIPELINE_TAGS.get(checkpoint.head)


def _two_bare_stacks(checkpoint: Checkpoint) -> bool:
    return checkpoint.head == "Model" and bool(checkpoint.config.is_encoder_decoder)


def usage(checkpoint: Checkpoint, name: str) -> str:
    """The section's text; `name` stands for the checkpoint in the code."""
    if is_sentence_transformer(checkpoint):
        ways = [_sentences(name), _with_package(checkpoint, name), _without_package(checkpoint, name)]
    else:
        ways = [_with_package(checkpoint, name), _without_package(checkpoint, name), _pipeline(checkpoint, name)]
        if _kind(checkpoint) == _RERANKER:
            ways.insert(0, _ranks(name))
    return "\n\n".join(way for way in ways if way)


def is_sentence_transformer(checkpoint: Checkpoint) -> bool:
    """Whether the folder is one that sentence-transformers loads as an embedding model."""
    return (checkpoint.folder / "modules.json").is_file() and _kind(checkpoint) != _RERANKER


def _kind(checkpoint: Checkpoint) -> str | None:
    """What sentence-transformers takes the folder for; versions before 6 did not say it of an embedding model."""
    try:
        settings = json.loads((checkpoint.folder / "config_sentence_transformers.json").read_text(encoding="utf-8"))
        return str(settings["model_type"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _ranks(name: str) -> str:
    code = _code(
        "from sentence_transformers import CrossEncoder",
        "",
        f'model = CrossEncoder("{name}", trust_remote_code=True)',
        'scores = model.predict([("A question?", "A passage.")])',
    )
    return f"As a reranker, with the dense model's function over the logits:\n\n{code}"


def _sentences(name: str) -> str:
    code = _code(
        "from sentence_transformers import SentenceTransformer",
        "",
        f'model = SentenceTransformer("{name}", trust_remote_code=True)',
        'embeddings = model.encode(["A sentence."])',
    )
    return f"Embeddings, in the dense model's space:\n\n{code}"


def _code(*lines: str) -> str:
    return "\n".join(["```python", *lines, "```"])


def _load(checkpoint: Checkpoint, name: str, trust: bool) -> list[str]:
    more = ", trust_remote_code=True" if trust else ""
    lines = [f'model = {checkpoint.auto_class}.from_pretrained("{name}"{more})']
    if checkpoint.has_tokenizer:
        run = _RUN.get(checkpoint.head, "logits = model(**inputs).logits")
        if _two_bare_stacks(checkpoint):
            run = _LIFT.format("**inputs, decoder_input_ids=inputs.input_ids")
        lines += [f'tokenizer = AutoTokenizer.from_pretrained("{name}"{more})', _inputs(checkpoint), run]
    return lines


def _inputs(checkpoint: Checkpoint) -> str:
    if checkpoint.head == "ForMultipleChoice":
        choices = '["It was late."] * 2, ["We went home.", "We had lunch."], padding=True'
        return f'inputs = {{k: v[None] for k, v in tokenizer({choices}, return_tensors="pt").items()}}'
    text = _TEXTS.get(checkpoint.head, '"A sentence."')
    return f'inputs = tokenizer({text}, return_tensors="pt")'


def _imports(checkpoint: Checkpoint) -> list[str]:
    return [checkpoint.auto_class, *(["AutoTokenizer"] if checkpoint.has_tokenizer else [])]


def _with_package(checkpoint: Checkpoint, name: str) -> str:
    code = _code(
        "import tcsp_hf  # registers the classes",
        f"from transformers import {', '.join(_imports(checkpoint))}",
        "",
        *_load(checkpoint, name, trust=False),
    )
    return f"With the package `tcsp_hf`:\n\n{code}"


def _without_package(checkpoint: Checkpoint, name: str) -> str:
    code = _code(
        f"from transformers import {', '.join(_imports(checkpoint))}",
        "",
        *_load(checkpoint, name, trust=True)[: len(_imports(checkpoint))],
    )
    return f"Without it, with the code that lies beside the weights:\n\n{code}"


def _pipeline(checkpoint: Checkpoint, name: str) -> str:
    from transformers.pipelines import PIPELINE_REGISTRY  # slow to import

    tag = pipeline_tag(checkpoint)
    if tag is None or not checkpoint.has_tokenizer or tag not in PIPELINE_REGISTRY.get_supported_tasks():
        return ""
    text = '"A [MASK] sentence."' if tag == "fill-mask" else '"A sentence."'
    code = _code(
        "from transformers import pipeline",
        "",
        f'pipe = pipeline("{tag}", "{name}", trust_remote_code=True)',
        f"pipe({text})",
    )
    return f"As a pipeline:\n\n{code}"
