"""Training: fine-tuning dense models, and compressing and distilling in one go."""

from .arguments import TCSPSeq2SeqTrainingArguments, TCSPTrainingArguments
from .trainer import TCSPSeq2SeqTrainer, TCSPTrainer

__all__ = ["TCSPSeq2SeqTrainer", "TCSPSeq2SeqTrainingArguments", "TCSPTrainer", "TCSPTrainingArguments"]
