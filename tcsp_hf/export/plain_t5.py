"""A compressed T5 as transformers' own T5 classes, which need no code of this package.

A T5 whose encoder and decoder share one basis and whose layers are all of one size has the module names and shapes of
a stock T5 with `d_model = k` (see `modeling_tcsp_t5`): its norms' weights `sqrt(c² D / k)` are in the checkpoint
already, epsilon becomes `eps D / k`, and `lm_head` holds the final norm's weight and `D ** -0.5`, so that it is neither
tied nor scaled. Where the stream was not cut, a head that was tied still is.
"""

import copy
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from ..configuration_tcsp_t5 import TCSPT5Config
from ..errors import TCSPError

_PREFIXES = {"t5": "T5", "mt5": "MT5"}
_NOT_COPIED = ("model_type", "architectures", "transformers_version", "auto_map", "dtype", "_name_or_path")


def to_plain_t5(model: PreTrainedModel) -> PreTrainedModel:
    """The same function as a stock transformers model, e.g. `T5ForConditionalGeneration` with `d_model = k`.

    Args:
        model: a compressed T5 (any head). An mT5 becomes an mT5 again. It is left untouched.

    Returns:
        A new model of the stock class with the same head, in evaluation mode, in the same dtypes and on the same
        device. Its `save_pretrained` writes a checkpoint that transformers, and what reads its T5 checkpoints, loads
        without this package.

    Raises:
        TCSPError: no compressed T5, or one of whose sizes a stock T5 cannot hold; the message names it.
    """
    config = getattr(model, "config", None)
    if not isinstance(config, TCSPT5Config):
        raise TCSPError(
            f"{type(model).__name__} (model_type {getattr(config, 'model_type', None)!r}) is no compressed T5: only "
            "those have a plain T5 form (a compressed BERT: `to_plain_bert`)."
        )
    source = config.projection["source_model_type"] if config.projection else "t5"
    prefix = _PREFIXES.get(source)
    if prefix is None:
        raise TCSPError(f"The source model is of type {source!r}; stock forms exist for {', '.join(_PREFIXES)}.")
    base: Any = model.base_model
    stacks = [stack for stack in ("encoder", "decoder") if hasattr(base, stack)]
    sizes = _stock_sizes(config, stacks)
    if hasattr(model, "classification_head") and config.classifier_width != sizes["d_model"]:
        raise TCSPError(
            f"classifier_size is {config.classifier_width}, but the classification head of a stock T5 is as wide as "
            f"its stream, d_model = {sizes['d_model']}: this head has no plain form."
        )
    stock_config = _stock_config(config, prefix, sizes)
    stock_class = getattr(transformers, prefix + type(model).__name__.removeprefix("TCSPT5"))
    with no_init_weights():
        plain = stock_class(stock_config)
    plain.tie_weights()
    tensors = {name: value for name, value in model.state_dict().items() if ".lift_map." not in f".{name}"}
    for stack in stacks:
        _keep_heads(tensors, config, stack)
    if hasattr(plain, "lm_head") and not _stays_tied(config, stock_config):
        _untie_head(plain)
        if config.scale_decoder_outputs:
            tensors["lm_head.weight"] = tensors["lm_head.weight"] * sizes["d_model"] ** -0.5
    plain.to(model.device)
    for name, parameter in plain.named_parameters():
        parameter.data = torch.empty_like(parameter, dtype=tensors[name].dtype)  # T5 keeps some in float32
    plain.load_state_dict(tensors)
    if model.can_generate():
        plain.generation_config = copy.deepcopy(model.generation_config)
    return plain.eval()


def _stock_sizes(config: TCSPT5Config, stacks: list[str]) -> dict[str, int]:
    """The sizes that a stock T5 has one of.

    Raises:
        TCSPError: they differ between stacks or layers.
    """
    if "decoder" in stacks and config.encoder_hidden_size is not None:
        raise TCSPError(
            f"encoder_hidden_size is {config.encoder_hidden_size}: encoder and decoder have their own bases and "
            f"embedding tables (d_model = {config.d_model} is the decoder's), and a stock T5 has one table. Compress "
            "with projection='shared'."
        )
    groups = [group for group in ("encoder", "decoder", "cross") if group.replace("cross", "decoder") in stacks]
    layers = [(group, i) for group in groups for i in range(config.layers_of(group.replace("cross", "decoder")))]
    neurons = {f"{g} layer {i}": config.intermediate_size_of(g, i) for g, i in layers if g != "cross"}
    heads = {f"{g} layer {i}": config.attention_heads_of(g, i) for g, i in layers}
    head_sizes = {f"{g} layer {i} (query, key)": config.qk_head_size_of(g, i) for g, i in layers}
    head_sizes |= {f"{g} layer {i} (value, output)": config.vo_head_size_of(g, i) for g, i in layers}
    for stack in stacks:
        kept = {f"{stack} layer {i}": config.kept_heads_of(stack, i) for i in range(config.layers_of(stack))}
        _only("kept heads", kept, f"the layers of a stock T5's {stack} share one relative position bias")
    return {
        "d_model": config.stack_width(stacks[-1]),
        "d_ff": _only("feed-forward neurons", neurons, "a stock T5 has one d_ff", config.d_ff),
        "num_heads": _only("attention heads", heads, "a stock T5 has one num_heads", config.num_heads),
        "d_kv": _only("head size", head_sizes, "a stock T5 has one d_kv", config.d_kv),
    }


def _only(what: str, values: dict[str, Any], reason: str, default: Any = None) -> Any:
    """The one value that all places have; `default` where there are none.

    Raises:
        TCSPError: there are several; names two places that disagree.
    """
    if not values:
        return default
    first, value = next(iter(values.items()))
    for place, other in values.items():
        if other != value:
            raise TCSPError(
                f"{what} differ: {first} has {value}, {place} has {other}, but {reason}. Compress with "
                "uniform=True and without heads among the axes, or keep the checkpoint as it is."
            )
    return value


def _stock_config(config: TCSPT5Config, prefix: str, sizes: dict[str, int]) -> Any:
    """The configuration of the stock class. Its outputs are scaled only where `lm_head` stays tied."""
    stock_class = getattr(transformers, f"{prefix}Config")
    own = type(config).__dataclass_fields__.keys() - stock_class.__dataclass_fields__.keys()
    own -= {"decoder_start_token_id"}  # T5Config has no such field, but takes it
    values = {name: value for name, value in config.to_dict().items() if name not in own | set(_NOT_COPIED)}
    values |= sizes | {"layer_norm_epsilon": config.norm_epsilon_of("encoder"), "tie_word_embeddings": _tied(config)}
    stock = stock_class(**values)
    stock._attn_implementation = config._attn_implementation
    return stock


def _tied(config: TCSPT5Config) -> bool:
    """As in a stock T5 v1.0: the head is the embedding table, and outputs are scaled."""
    return bool(config.tie_lm_head and config.scale_decoder_outputs)


def _stays_tied(config: TCSPT5Config, stock: Any) -> bool:
    """Whether the stock class takes such a head as it is: a tied T5 scales its outputs, an mT5 never does."""
    scales = hasattr(stock, "scale_decoder_outputs")
    return bool(config.tie_lm_head) and scales == bool(config.scale_decoder_outputs)


def _untie_head(plain: Any) -> None:
    """Give `lm_head` a table of its own, in memory and in what `save_pretrained` writes.

    A T5Config says "tied" after construction whatever it was told, but writes what its attribute says.
    """
    plain.lm_head.weight = nn.Parameter(torch.empty_like(plain.lm_head.weight))
    plain.all_tied_weights_keys.pop("lm_head.weight", None)
    plain.config.tie_word_embeddings = False


def _keep_heads(tensors: dict[str, torch.Tensor], config: TCSPT5Config, stack: str) -> None:
    """Cut the columns of heads that no layer keeps out of the relative position bias, in place."""
    kept = config.kept_heads_of(stack, 0) if config.layers_of(stack) else None
    for name in [name for name in tensors if f"{stack}." in name and name.endswith("relative_attention_bias.weight")]:
        if kept is not None:
            tensors[name] = tensors[name][:, kept]
