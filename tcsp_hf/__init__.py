"""TCSP for Hugging Face transformers: BERT and T5 with a smaller hidden size.

Importing the package registers the compressed architectures with transformers' Auto classes. It imports neither
PyTorch nor transformers' models: the names below are loaded when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .errors import TCSPError
from .registration import register
from .version import __version__

if TYPE_CHECKING:
    from .calibration import Calibration, calibrate
    from .compression.compress import compress
    from .compression.search import Search
    from .configuration_tcsp import TCSPConfig
    from .configuration_tcsp_bert import TCSPBertConfig
    from .configuration_tcsp_t5 import TCSPT5Config
    from .export import to_plain_bert, to_plain_t5
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
    from .train import TCSPSeq2SeqTrainer, TCSPSeq2SeqTrainingArguments, TCSPTrainer, TCSPTrainingArguments

_MODULES = {
    "Calibration": "calibration",
    "Search": "compression",
    "TCSPBertConfig": "configuration_tcsp_bert",
    "TCSPConfig": "configuration_tcsp",
    "TCSPSeq2SeqTrainer": "train",
    "TCSPSeq2SeqTrainingArguments": "train",
    "TCSPT5Config": "configuration_tcsp_t5",
    "TCSPTrainer": "train",
    "TCSPTrainingArguments": "train",
    "calibrate": "calibration",
    "compress": "compression",
    "to_plain_bert": "export",
    "to_plain_t5": "export",
}
"""Name -> the module that has it; model classes go by their prefix."""

register()


def __getattr__(name: str) -> Any:
    module = _MODULES.get(name)
    if module is None and name in __all__:
        module = "modeling_tcsp_bert" if name.startswith("TCSPBert") else "modeling_tcsp_t5"
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f".{module}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


__all__ = [
    "Calibration",
    "Search",
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
    "to_plain_bert",
    "to_plain_t5",
]
