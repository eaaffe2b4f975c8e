"""Random numbers derived from a key alone: the same on every machine, in any batch, after any restart."""

import hashlib


def uniform(*key: object) -> float:
    """A number in [0, 1) that depends on `key` alone."""
    digest = hashlib.sha256("\0".join(map(str, key)).encode()).digest()
    return int.from_bytes(digest[:7], "big") / 2**56


def row_seed(seed: int, row_id: str) -> int:
    """The seed of one row, independent of its batch and shard; below 2**31, as servers require."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{row_id}".encode()).digest()[:4]) >> 1


def is_held_out(sample_id: str, share: float) -> bool:
    """Return whether a sample is kept from training. Depends on its id alone, so all trainings hold out the same samples."""
    return uniform("held out", sample_id) < share
