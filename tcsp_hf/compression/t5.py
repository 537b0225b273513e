"""Projects a dense T5 or mT5 into a subspace of its residual stream (design of `modeling_tcsp_t5`); in float64."""

import math

import torch
from transformers import PreTrainedModel

from .. import modeling_tcsp_t5
from ..architectures import blocks_of
from ..offload import identity
from .plan import Sizes
from .refit_t5 import T5Refit
from .subspace import Basis
from .weights import DenseWeights, Tensors

LM_HEAD, TABLE = "lm_head.weight", "shared.weight"


def model_class(head: str) -> type[PreTrainedModel]:
    return getattr(modeling_tcsp_t5, f"TCSPT5{head}")


def config_fields(
    dense: PreTrainedModel, widths: dict[str, int], own_bases: bool, sizes: Sizes, kept_heads: list[list[int]]
) -> dict[str, object]:
    """Fields of `TCSPT5Config` beside the stock ones; `own_bases`: encoder and decoder do not share theirs."""
    config = dense.config
    encoder = widths["encoder.final"]
    decoder = widths.get("decoder.final", encoder)
    own_bases = own_bases and not keeps_coordinates(dense, widths)
    tied = keeps_tie(dense, widths)
    fields: dict[str, object] = {}
    attention = [block for block in blocks_of(dense) if block.attends]
    networks = [block for block in blocks_of(dense) if not block.attends]
    for stack in ("encoder", "decoder"):
        filters = [size for size, block in zip(sizes.filters, networks, strict=True) if block.stack == stack]
        if any(size != config.d_ff for size in filters):
            fields[f"{stack}_layer_intermediate_sizes"] = filters
    for group in ("encoder", "decoder", "cross"):
        cross = group == "cross"
        mine = [i for i, b in enumerate(attention) if (b.kind == "cross") == cross and (cross or b.stack == group)]
        if any(sizes.heads[i] != config.num_heads for i in mine):
            name = "cross_layer_attention_heads" if cross else f"{group}_layer_kept_heads"
            fields[name] = [sizes.heads[i] if cross else kept_heads[i] for i in mine]
        for kind, chosen in (("qk", sizes.qk), ("vo", sizes.vo)):
            if any(chosen[i] != config.d_kv for i in mine):
                fields[f"{group}_layer_{kind}_head_sizes"] = [chosen[i] for i in mine]
    return {
        **fields,
        "d_model": decoder,
        "encoder_hidden_size": encoder if own_bases else None,
        "source_hidden_size": config.d_model,
        "tie_lm_head": tied,
        "scale_decoder_outputs": tied and bool(getattr(config, "scale_decoder_outputs", False)),
        "tie_word_embeddings": True,
    }


def keeps_coordinates(dense: PreTrainedModel, widths: dict[str, int]) -> bool:
    """Whether no stream is cut: both stacks then keep the dense coordinates, which are one basis."""
    return all(widths.get(name) in (None, dense.config.d_model) for name in ("encoder.final", "decoder.final"))


def keeps_tie(dense: PreTrainedModel, widths: dict[str, int]) -> bool:
    """Whether `lm_head` stays the embedding table: where it is that in the dense model and the stream is not cut.

    The last norm's weight then stays in the norm instead of the head. Below the dense width no choice of basis keeps
    the tie: the head reads `table @ diag(gamma) B`, which is the embeddings' `table @ B` for no diagonal norm.
    """
    head = getattr(dense, "lm_head", None)
    tied = head is not None and identity(head, "weight") == identity(dense.get_input_embeddings(), "weight")
    return tied and keeps_coordinates(dense, widths)


def assemble(dense: PreTrainedModel, bases: dict[str, Basis], made: T5Refit) -> Tensors:
    """State dict of a refit model: the solved blocks, and the heads that read them."""
    tensors = project(dense, bases, made.tensors)
    prefix = "transformer." if hasattr(dense, "transformer") else ""
    for stack, lift in made.lifts.items():
        tensors[f"{prefix}{stack}.lift_map.weight"] = lift
    last = list(made.lifts)[-1]
    tensors.update(project_heads(dense, DenseWeights(dense), made.lifts[last]))
    if keeps_tie(dense, {name: basis.size for name, basis in bases.items()}):
        tensors.update(_tied_end(dense, made.scales[last]))
    return tensors


def _tied_end(dense: PreTrainedModel, scale: torch.Tensor) -> dict[str, torch.Tensor]:
    """The decoder's last norm with its own weight times `scale` (D,), and a head that is the embedding table.

    Hidden states are then the dense model's: nothing is left to lift.
    """
    source = DenseWeights(dense)
    gamma = source["decoder.final_layer_norm.weight"]
    return {
        "decoder.final_layer_norm.weight": gamma * scale,
        "decoder.lift_map.weight": torch.eye(len(gamma), dtype=torch.float64),
        LM_HEAD: source.stored(TABLE),
    }


def project(dense: PreTrainedModel, bases: dict[str, Basis], made: Tensors | None = None) -> Tensors:
    """State dict of the compressed model; all sites of a stack hold the same decoder and encoder, with own gains.

    made: entries that a refit solved already, which stay as they are.
    """
    source = DenseWeights(dense)
    prefix = "transformer." if hasattr(dense, "transformer") else ""
    result = Tensors(dense) if made is None else made
    solved = set(result)
    size = dense.config.d_model

    def norm_scale(basis: Basis) -> torch.Tensor:
        scale = math.sqrt(basis.gain * size / basis.size)
        return torch.full((basis.size,), scale, dtype=torch.float64)

    stacks = [stack for stack in ("encoder", "decoder") if f"{stack}.final" in bases]
    table = f"{prefix}shared.weight"
    result[table] = source.table(table, bases["encoder.final"].encoder)
    # the encoder's last norm is read by the cross-attention of every decoder layer
    memory_gamma = source[f"{prefix}encoder.final_layer_norm.weight"]
    memory_reader = memory_gamma[:, None] * bases["encoder.final"].decoder

    for stack in stacks:
        top = f"{prefix}{stack}"
        own = bases[f"{stack}.final"].encoder
        shared = own is bases["encoder.final"].encoder
        result[f"{top}.embed_tokens.weight"] = result[table] if shared else source.table(table, own)
        layers = sum(name.startswith(f"{stack}.") and name.endswith(".ffn") for name in bases)
        parts = ("attention", "ffn") if stack == "encoder" else ("attention", "cross", "ffn")
        for i in range(layers):
            for j, part in enumerate(parts):
                basis = bases[f"{stack}.{i}.{part}"]
                block = f"{top}.block.{i}.layer.{j}"
                gamma = source[f"{block}.layer_norm.weight"]
                reader = gamma[:, None] * basis.decoder
                if f"{block}.layer_norm.weight" not in solved:
                    result[f"{block}.layer_norm.weight"] = norm_scale(basis)
                module = {"attention": "SelfAttention", "cross": "EncDecAttention", "ffn": "DenseReluDense"}[part]
                for key in [key for key in source if key.startswith(f"{block}.{module}.") and key not in solved]:
                    kind = key.split(".")[-2]
                    if kind in ("o", "wo"):
                        result[key] = basis.encoder.T @ source[key]
                    elif kind == "relative_attention_bias":
                        result[key] = source[key]
                    elif part == "cross" and kind in ("k", "v"):
                        result[key] = source[key] @ memory_reader
                    else:
                        result[key] = source[key] @ reader
        last = bases[f"{stack}.final"]
        gamma = source[f"{top}.final_layer_norm.weight"]
        if f"{top}.final_layer_norm.weight" not in solved:
            result[f"{top}.final_layer_norm.weight"] = norm_scale(last)
        lift = gamma[:, None] * last.decoder
        result[f"{top}.lift_map.weight"] = lift
        result[f"{top}.lift_map.bias"] = torch.zeros(size, dtype=torch.float64)

    if made is None:
        result.update(project_heads(dense, source, lift))
    if keeps_tie(dense, {name: basis.size for name, basis in bases.items()}):
        result.update(_tied_end(dense, torch.ones(size, dtype=torch.float64)))
    return result


def project_heads(dense: PreTrainedModel, source: DenseWeights, reader: torch.Tensor) -> dict[str, torch.Tensor]:
    """What reads the last hidden states; reader (D, k): dense hidden state ~ reader @ z."""
    result: dict[str, torch.Tensor] = {}
    if LM_HEAD in source:
        scaled = getattr(dense.config, "scale_decoder_outputs", False)
        result[LM_HEAD] = source.table(LM_HEAD, reader * dense.config.d_model**-0.5 if scaled else reader)
    for name in ("qa_outputs", "classifier", "classification_head.dense"):
        if f"{name}.weight" in source:
            result[f"{name}.weight"] = source[f"{name}.weight"] @ reader
            if f"{name}.bias" in source:
                result[f"{name}.bias"] = source[f"{name}.bias"]
    for kind in ("weight", "bias"):
        if f"classification_head.out_proj.{kind}" in source:
            result[f"classification_head.out_proj.{kind}"] = source[f"classification_head.out_proj.{kind}"]
    return result
