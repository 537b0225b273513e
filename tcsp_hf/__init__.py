"""TCSP for Hugging Face transformers: BERT and T5 with a smaller hidden size.

Importing the package registers the compressed architectures with transformers' Auto classes.
"""

from .calibration import Calibration, calibrate
from .compression import compress
from .configuration_tcsp import TCSPConfig
from .configuration_tcsp_bert import TCSPBertConfig
from .configuration_tcsp_t5 import TCSPT5Config
from .errors import TCSPError
from .export import to_plain_t5
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
    "TCSPT5Config",
    "TCSPT5EncoderModel",
    "TCSPT5ForConditionalGeneration",
    "TCSPT5ForQuestionAnswering",
    "TCSPT5ForSequenceClassification",
    "TCSPT5ForTokenClassification",
    "TCSPT5Model",
    "__version__",
    "calibrate",
    "compress",
    "to_plain_t5",
]
