"""A plain T5 checkpoint for CTranslate2's runtime (package `ctranslate2`)."""

import json
import os
from pathlib import Path
from typing import Any

from ..errors import TCSPError
from ..files import check_output_folder


def require_lm_head(class_name: str) -> None:
    """Before the conversion, which would put a random decoder and a random head in the place of missing ones.

    Raises:
        TCSPError: it is not a T5's class with a language-model head.
    """
    if not class_name.endswith("T5ForConditionalGeneration"):
        raise TCSPError(
            f"The model is a {class_name}, but CTranslate2 runs a T5 with a decoder and a language-model head alone "
            "(T5ForConditionalGeneration): export to onnx or t5."
        )


def to_ctranslate2(plain: str | os.PathLike[str], output: str | os.PathLike[str]) -> None:
    """Convert a folder that `to_plain_t5(model).save_pretrained` wrote, with its tokenizer, into a new folder.

    CTranslate2's own converter takes `tie_word_embeddings` for "the outputs are scaled by d_model ** -0.5", as
    transformers 4 did. In transformers 5 that attribute is always true for a T5, so the converter (4.8) scales the
    outputs of every untied T5: greedy search does not notice, probabilities and beam search do. Here
    `scale_decoder_outputs` decides, as in transformers 5.

    Raises:
        TCSPError: ctranslate2 is not installed, `output` is not empty, or the checkpoint has no language-model head.
    """
    config = json.loads((Path(plain) / "config.json").read_text(encoding="utf-8"))
    require_lm_head(str((config.get("architectures") or ["None"])[0]))
    try:
        from ctranslate2.converters import TransformersConverter
    except ImportError as error:
        raise TCSPError("The format ctranslate2 needs the package of that name: pip install ctranslate2.") from error

    class Converter(TransformersConverter):  # type: ignore[misc,unused-ignore]
        def load_model(self, *args: Any, **kwargs: Any) -> Any:
            model = super().load_model(*args, **kwargs)
            model.config.tie_word_embeddings = bool(getattr(model.config, "scale_decoder_outputs", False))
            return model

    check_output_folder(output, overwrite=False)
    Converter(str(plain)).convert(str(output), force=True)  # of an empty folder
