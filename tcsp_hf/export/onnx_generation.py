"""Greedy generation with the graphs of a sequence-to-sequence model, by ONNX Runtime alone."""

import os
from pathlib import Path
from typing import Any

import numpy as np

from .onnx import require_onnx


class OnnxGenerator:
    """The three graphs that `export_onnx` wrote for a T5.

    Args:
        folder: holds `encoder_model.onnx`, `decoder_model.onnx` and `decoder_with_past_model.onnx`.
        start: id that decoding starts with; a stopped sequence is filled with `pad`.
        eos: id that ends a sequence.
        options: for `onnxruntime.InferenceSession`, e.g. `providers`.

    Raises:
        TCSPError: onnxruntime is not installed.
    """

    def __init__(self, folder: str | os.PathLike[str], *, start: int = 0, eos: int = 1, pad: int = 0, **options: Any):
        runtime = require_onnx()
        told = {"providers": ["CPUExecutionProvider"], **options}
        self.encoder, self.first, self.next = (
            runtime.InferenceSession(str(Path(folder) / f"{name}.onnx"), **told)
            for name in ("encoder_model", "decoder_model", "decoder_with_past_model")
        )
        self.start, self.eos, self.pad = start, eos, pad

    def generate(
        self, input_ids: np.ndarray, attention_mask: np.ndarray | None = None, max_new_tokens: int = 32
    ) -> np.ndarray:
        """Greedy continuations (batch, at most 1 + max_new_tokens), each with its start token, as transformers gives.

        `input_ids`, `attention_mask`: (batch, length), int64; the mask is all ones when None.
        """
        mask = np.ones_like(input_ids) if attention_mask is None else attention_mask
        (memory,) = self.encoder.run(None, {"input_ids": input_ids, "attention_mask": mask})
        ids = np.full((len(input_ids), 1), self.start, dtype=np.int64)
        running = np.ones(len(input_ids), dtype=bool)
        fed = {"decoder_input_ids": ids, "encoder_hidden_states": memory, "encoder_attention_mask": mask}
        session, past = self.first, dict[str, np.ndarray]()
        for _ in range(max_new_tokens):
            names = [value.name for value in session.get_outputs()]
            found = dict(zip(names, session.run(None, fed), strict=True))
            token = np.where(running, found.pop("logits")[:, -1].argmax(-1), self.pad)
            ids = np.concatenate([ids, token[:, None]], axis=1)
            running &= token != self.eos
            if not running.any():
                break
            past |= {name.replace("present", "past_key_values"): value for name, value in found.items()}
            session = self.next
            fed = {"decoder_input_ids": token[:, None], "encoder_attention_mask": mask, **past}
        return ids
