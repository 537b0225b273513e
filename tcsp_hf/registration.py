"""Registers the compressed architectures with transformers' Auto classes."""

from types import ModuleType
from typing import Any

import transformers
from transformers import AutoConfig, AutoTokenizer

from . import modeling_tcsp_bert, modeling_tcsp_t5
from .configuration_tcsp_bert import TCSPBertConfig
from .configuration_tcsp_t5 import TCSPT5Config
from .modeling_tcsp import TCSPPreTrainedMixin

FAMILIES: dict[Any, tuple[ModuleType, Any]] = {
    TCSPBertConfig: (modeling_tcsp_bert, modeling_tcsp_bert.TCSPBertPreTrainedModel),
    TCSPT5Config: (modeling_tcsp_t5, modeling_tcsp_t5.TCSPT5PreTrainedModel),
}
TOKENIZERS = {TCSPBertConfig: "BertTokenizer", TCSPT5Config: "T5Tokenizer"}


def _push(model: Any, repo_id: str, **options: Any) -> str:
    from .publish.push import push_model  # not needed to load or to save

    return push_model(model, repo_id, **options)


def register() -> None:
    """Idempotent: a second call changes nothing."""
    TCSPPreTrainedMixin.publisher = _push
    for config_class, (module, base) in FAMILIES.items():
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        tokenizer = getattr(transformers, TOKENIZERS[config_class])
        AutoTokenizer.register(config_class, fast_tokenizer_class=tokenizer, exist_ok=True)
        for auto_name, target in base.auto_map.items():
            if auto_name == "AutoConfig":
                continue
            model_class = getattr(module, target.split(".")[-1])
            getattr(transformers, auto_name).register(config_class, model_class, exist_ok=True)
    # a tuple lets the checkpoint's own `architectures` choose: an encoder-only T5 has no decoder to load
    t5 = (modeling_tcsp_t5.TCSPT5Model, modeling_tcsp_t5.TCSPT5EncoderModel)
    transformers.AutoModel._model_mapping.register(TCSPT5Config, t5, exist_ok=True)
