"""Fingerprints: of a model (is this the one that was calibrated?) and of the data (what was it calibrated on?)."""

import hashlib
from collections.abc import Iterable

import torch
from torch import nn

from ..offload import distinct_parameters, read_tensor

_SAMPLED = 4096


def model_fingerprint(model: nn.Module) -> str:
    """Hash of every parameter's name, shape and an even sample of at most 4,096 of its values.

    Values are read as float32, so a float16 checkpoint loaded in float16 or float32 has the same fingerprint.
    """
    digest = hashlib.sha256()
    places = {name: (module, own) for name, module, own in distinct_parameters(model)}
    for name in sorted(places):
        parameter = read_tensor(*places[name])
        flat = parameter.reshape(-1)
        step = max(1, flat.numel() // _SAMPLED)
        sample = flat[::step].to(device="cpu", dtype=torch.float32).contiguous()
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()


def sequence_hash(token_ids: Iterable[int], seed: int) -> int:
    """128-bit hash of one sequence of token ids and the seed; the same on every machine."""
    text = ",".join(map(str, token_ids))
    return int.from_bytes(hashlib.blake2b(f"{seed}:{text}".encode(), digest_size=16).digest(), "little")


class DataFingerprint:
    """Order-free hash of a multiset of sequences: the sum of their hashes, so that shards add up."""

    def __init__(self, value: str = "0") -> None:
        self._sum = int(value, 16)

    def add(self, hash_value: int) -> None:
        self._sum = (self._sum + hash_value) % (1 << 128)

    def merge(self, other: "DataFingerprint") -> None:
        self.add(other._sum)

    def __str__(self) -> str:
        return f"{self._sum:032x}"
