"""TCSP for Hugging Face transformers: BERT and T5 with a smaller hidden size.

Importing the package registers the compressed architectures with transformers' Auto classes.
"""

from typing import TYPE_CHECKING, Any

from .calibration import Calibration, calibrate
from .compression import compress
from .configuration_tcsp import TCSPConfig
from .configuration_tcsp_bert import TCSPBertConfig
from .configuration_tcsp_t5 import TCSPT5Config
from .errors import TCSPError
from .modeling_tcsp_bert import (
    TCSPBertForMaskedLM,
    TCSPBertForMultipleChoice,
    TCSPBertForNextSentencePrediction,
    TCSPBertForPreTraining,
    TCSPBertForQuestionAnswering,
    TCSPBertForSequenceClassification,
    TCSPBertForTokenClassification,
    TCSPBertModel,
)
from .modeling_tcsp_t5 import (
    TCSPT5EncoderModel,
    TCSPT5ForConditionalGeneration,
    TCSPT5ForQuestionAnswering,
    TCSPT5ForSequenceClassification,
    TCSPT5ForTokenClassification,
    TCSPT5Model,
)
from .registration import register
from .version import __version__

register()

if TYPE_CHECKING:
    from .train import TCSPSeq2SeqTrainer, TCSPSeq2SeqTrainingArguments, TCSPTrainer, TCSPTrainingArguments

_TRAINING = ("TCSPSeq2SeqTrainer", "TCSPSeq2SeqTrainingArguments", "TCSPTrainer", "TCSPTrainingArguments")


def __getattr__(name: str) -> Any:
    """The trainers, imported when they are asked for: transformers' own take their time."""
    if name in _TRAINING:
        from . import train

        return getattr(train, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "Calibration",
    "TCSPBertConfig",
    "TCSPBertForMaskedLM",
    "TCSPBertForMultipleChoice",
    "TCSPBertForNextSentencePrediction",
    "TCSPBertForPreTraining",
    "TCSPBertForQuestionAnswering",
    "TCSPBertForSequenceClassification",
    "TCSPBertForTokenClassification",
    "TCSPBertModel",
    "TCSPConfig",
    "TCSPError",
    "TCSPSeq2SeqTrainer",
    "TCSPSeq2SeqTrainingArguments",
    "TCSPT5Config",
    "TCSPT5EncoderModel",
    "TCSPT5ForConditionalGeneration",
    "TCSPT5ForQuestionAnswering",
    "TCSPT5ForSequenceClassification",
    "TCSPT5ForTokenClassification",
    "TCSPT5Model",
    "TCSPTrainer",
    "TCSPTrainingArguments",
    "__version__",
    "calibrate",
    "compress",
]
