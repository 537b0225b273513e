"""Random and altered configurations: each is accepted and can be built, or is refused by one error that names it."""

import copy
import json
import math
import random
import re
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from .. import modeling_tcsp_bert, modeling_tcsp_t5
from ..configuration_tcsp import TCSPConfig
from ..configuration_tcsp_bert import TCSPBertConfig
from ..configuration_tcsp_t5 import TCSPT5Config
from ..errors import TCSPError
from .tally import Tally

_CONFIGS: dict[str, type[TCSPConfig]] = {"tcsp_bert": TCSPBertConfig, "tcsp_t5": TCSPT5Config}
_MODELS: dict[str, Any] = {
    kind: [getattr(module, name) for name in module.__all__ if not name.endswith("PreTrainedModel")]
    for kind, module in (("tcsp_bert", modeling_tcsp_bert), ("tcsp_t5", modeling_tcsp_t5))
}
_POOL = 500
_BUILD_EVERY = 20
_READ_EVERY = 10
_SMALL = 1 << 12
_WRONG: tuple[Any, ...] = (
    *(-1, 0, 1, 3, 17, 255, 1 << 20, (1 << 20) + 1, 1 << 31, 1 << 62, 10**30, -(10**30)),
    *(0.0, 0.5, 1.0, -0.1, 16.0, 1e300, math.nan, math.inf, -math.inf),
    *(True, False, None, "", "16", "gelu", "gated-", "nan", "\x00", "x" * 300),
    *([], [1], [0, 0], [None], [[1]], [1.5], [True], ["1"], [1 << 40], list(range(40)), {}, {"a": 1}, {"0": {"a": []}}),
)
_EXTRA = (
    *("num_labels", "id2label", "label2id", "architectures", "auto_map", "dtype", "torch_dtype", "problem_type"),
    *("chunk_size_feed_forward", "per_layer_config", "layer_types", "rope_scaling", "rope_theta", "name_or_path"),
    *("check", "to_dict", "site_widths", "dense_hidden_size", "model_type", "sub_configs", "transformers_version"),
    *("output_attentions", "output_hidden_states", "return_dict", "attn_implementation", "_attn_implementation"),
    *("hidden_sizes", "my_own_field", "__class__", "", "projections", "use_return_dict", "d_model", "hidden_size"),
)


def make_valid(kind: str, draw: random.Random) -> dict[str, Any]:
    """Fields of a valid tiny configuration of uneven sizes, with a projection half of the time."""
    fields = _valid_bert(draw) if kind == "tcsp_bert" else _valid_t5(draw)
    if draw.random() < 0.5:
        config = _CONFIGS[kind](**fields)
        fields["projection"] = _projection(config, draw)
    return {"model_type": kind, **fields}


def _sizes(draw: random.Random, length: int, most: int) -> list[int] | None:
    return None if draw.random() < 0.3 else [draw.randint(1, most) for _ in range(length)]


def _valid_bert(draw: random.Random) -> dict[str, Any]:
    width, layers, heads, head_dim = draw.randint(1, 16), draw.randint(0, 2), draw.randint(1, 3), draw.randint(1, 6)
    sites = _sizes(draw, 2 * layers + 1, width)
    return {
        "vocab_size": draw.randint(4, 30),
        "hidden_size": sites[-1] if sites else draw.randint(1, width),
        "source_hidden_size": width,
        "head_dim": head_dim,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "intermediate_size": draw.randint(1, 20),
        "max_position_embeddings": draw.randint(8, 20),
        "hidden_act": draw.choice(["gelu", "relu", "silu"]),
        "site_hidden_sizes": sites,
        "layer_intermediate_sizes": _sizes(draw, layers, 20),
        "layer_attention_heads": _sizes(draw, layers, heads),
        "layer_qk_head_sizes": _sizes(draw, layers, head_dim),
        "layer_vo_head_sizes": _sizes(draw, layers, head_dim),
        "pooler_size": draw.choice([None, 5]),
        "tie_word_embeddings": False,
    }


def _valid_t5(draw: random.Random) -> dict[str, Any]:
    width, heads, head = draw.randint(1, 16), draw.randint(1, 3), draw.randint(1, 6)
    layers = {"encoder": draw.randint(1, 2), "decoder": draw.randint(1, 2)}
    fields: dict[str, Any] = {
        "vocab_size": draw.randint(4, 30),
        "d_model": draw.randint(1, width),
        "source_hidden_size": width,
        "encoder_hidden_size": draw.choice([None, draw.randint(1, width)]),
        "num_layers": layers["encoder"],
        "num_decoder_layers": layers["decoder"],
        "num_heads": heads,
        "d_kv": head,
        "d_ff": draw.randint(1, 20),
        "relative_attention_num_buckets": draw.choice([8, 32]),
        "feed_forward_proj": draw.choice(["relu", "gated-gelu"]),
        "tie_lm_head": False,
        "decoder_start_token_id": 0,
        "cross_layer_attention_heads": _sizes(draw, layers["decoder"], heads),
    }
    for stack, count in layers.items():
        fields[f"{stack}_layer_intermediate_sizes"] = _sizes(draw, count, 20)
        kept = [sorted(draw.sample(range(heads), draw.randint(1, heads))) for _ in range(count)]
        fields[f"{stack}_layer_kept_heads"] = draw.choice([None, kept])
    for group, stack in (("encoder", "encoder"), ("decoder", "decoder"), ("cross", "decoder")):
        for kind in ("qk", "vo"):
            fields[f"{group}_layer_{kind}_head_sizes"] = _sizes(draw, layers[stack], head)
    return fields


def _projection(config: Any, draw: random.Random) -> dict[str, Any]:
    return {
        "method_version": 1,
        "source_model": "somewhere/some-model",
        "source_revision": None,
        "source_model_type": "bert",
        "source_hidden_size": config.dense_hidden_size,
        "source_parameters": 1234,
        "source_non_embedding_parameters": 123,
        "kind": draw.choice(["shared", "per_site"]),
        "subspace": draw.choice(["pca", "balanced"]),
        "epsilon": draw.choice([None, 0.3]),
        "sites": [{"name": n, "hidden_size": k, "kept_energy": 0.9} for n, k in config.site_widths().items()],
        "calibration": {
            **{"sequences": 3, "tokens": 50, "data_fingerprint": "0a", "model_fingerprint": "0b"},
            "seed": 0,
        },
    }


def alter(fields: dict[str, Any], draw: random.Random) -> dict[str, Any]:
    """A copy with one to three fields altered, removed or added, at any depth."""
    fields = copy.deepcopy(fields)
    for _ in range(draw.choice([1, 1, 1, 2, 3])):
        place: Any = fields
        key: Any = draw.choice(sorted(name for name in fields if name != "model_type"))
        while isinstance(place[key], (dict, list)) and place[key] and draw.random() < 0.6:
            place = place[key]
            key = draw.choice(sorted(place)) if isinstance(place, dict) else draw.randrange(len(place))
        action = draw.random()
        if action < 0.7:
            place[key] = copy.deepcopy(draw.choice(_WRONG))
        elif action < 0.8 and isinstance(place, dict) and (place is not fields or len(fields) > 2):
            del place[key]
        else:
            where = place if isinstance(place, dict) else fields
            where[draw.choice(_EXTRA)] = copy.deepcopy(draw.choice(_WRONG))
    return fields


def try_one(fields: dict[str, Any], build: Any, folder: Path | None) -> tuple[bool, str | None]:
    """Whether a configuration was accepted, and what was wrong with how it was accepted or refused.

    Args:
        fields: of a `config.json`.
        build: a class of models to build and run too, if it is tiny; None does not.
        folder: write `config.json` there and read it, instead of the dictionary itself.
    """
    try:
        if folder is None:
            config = TCSPConfig.from_dict(copy.deepcopy(fields))
        else:
            (folder / "config.json").write_text(json.dumps(fields), encoding="utf-8")
            config = TCSPConfig.from_pretrained(folder)
    except ValueError as error:
        return False, _unnamed(str(error), fields)
    except Exception as error:
        return False, f"{type(error).__name__}: {error}"
    try:
        if build is not None:
            json.loads(config.to_json_string(use_diff=False))
            if _estimate(config) <= _SMALL:
                _run(build, config)
    except ValueError as error:
        return False, _unnamed(str(error), fields)  # what models check, the configuration leaves
    except Exception as error:
        return True, f"accepted, but {type(error).__name__}: {error}"
    return True, None


def _unnamed(message: str, fields: dict[str, Any]) -> str | None:
    """The message, if it names no field."""
    words = set(re.findall(r"\w+", message))
    known = {*fields, *_EXTRA} - {""}
    for config in _CONFIGS.values():
        known |= config.__dataclass_fields__.keys()  # a field left out has its default, which may be what is wrong
    return None if words & known else f"the error names no field: {message}"


def _estimate(config: Any) -> int:
    """Parameters of the largest tables and layers, roughly; enough to tell tiny from not."""
    layers = config.num_hidden_layers + (getattr(config, "num_decoder_layers", 0) or 0)
    sizes = [config.hidden_size, config.dense_hidden_size, config.vocab_size, layers]
    sizes += [getattr(config, name, 0) or 0 for name in ("intermediate_size", "d_ff", "max_position_embeddings")]
    sizes += [config.num_attention_heads * (config.head_dim or 1), getattr(config, "type_vocab_size", 0)]
    sizes += [getattr(config, name, 0) or 0 for name in ("pooler_size", "mlm_head_size", "mlm_transform_size")]
    lists = [value for value in vars(config).values() if isinstance(value, list)]
    return max([*sizes, *(size for value in lists for size in value if isinstance(size, int))])


def _run(model_class: Any, config: Any) -> None:
    """Build the model, run it on two sequences, and let it write where it can.

    Raises:
        TCSPError: an output that is not finite.
        Exception: whatever building and running raises.
    """
    name = model_class.__name__
    if name.endswith("ForQuestionAnswering"):
        config.num_labels = 2  # as the head needs it; the others take any number
    model = model_class(config).eval()
    longest = min(4, getattr(config, "max_position_embeddings", 4))
    ids = torch.arange(2 * longest).reshape(2, longest) % config.vocab_size
    decodes = name in ("TCSPT5Model", "TCSPT5ForConditionalGeneration")
    more: dict[str, Any] = {"decoder_input_ids": ids[:, :2]} if decodes else {}
    if name.endswith("T5ForSequenceClassification"):
        ids[:, -1] = config.eos_token_id
        ids[:, :-1][ids[:, :-1] == config.eos_token_id] = (config.eos_token_id + 1) % config.vocab_size
    if name.endswith("MultipleChoice"):
        ids = torch.stack([ids, ids], dim=1)
    with torch.no_grad():
        found = model(input_ids=ids, **more)[0]
        if name.endswith("ForConditionalGeneration"):
            model.generate(ids, max_new_tokens=2)
    if not torch.isfinite(found).all():
        raise TCSPError("the outputs of a fresh model are not finite")


def config_rounds(rounds: int, seed: int) -> Iterator[Tally]:
    """Try `rounds` configurations; the tally so far, after every thousand."""
    tally = Tally("configurations", facts={"built and run": 0, "read from a file": 0})
    draw = random.Random(seed)
    pool: list[dict[str, Any]] = []
    with TemporaryDirectory(prefix="tcsp-selftest-") as name:
        for i in range(rounds):
            own = random.Random(draw.getrandbits(64))
            kind = own.choice(sorted(_CONFIGS))
            if len(pool) < _POOL:
                pool.append(make_valid(kind, own))
            fields = own.choice(pool)
            kind = fields["model_type"]
            valid = own.random() < 0.1
            fields = fields if valid else alter(fields, own)
            build = own.choice(_MODELS[kind]) if i % _BUILD_EVERY == 0 else None
            read = i % _READ_EVERY == 1
            accepted, wrong = try_one(fields, build, Path(name) if read else None)
            tally.facts["read from a file"] += read
            tally.facts["built and run"] += build is not None and accepted
            if valid and not accepted and wrong is None:
                wrong = "a valid configuration was refused"
            if wrong is not None:
                tally.fail(f"seed {seed}, configuration {i}: {wrong}; {json.dumps(fields)[:2000]}")
            elif accepted:
                tally.right += 1
            else:
                tally.refused += 1
            if i % 1000 == 999 or i + 1 == rounds:
                yield tally
