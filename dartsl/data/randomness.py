"""Counter-based randomness: every random number is a function of (seed, stream, counter).

Nothing is consumed in sequence, so a run that resumes at any step draws what it would have drawn,
and nothing outside (another loader, a network's dropout, the number of workers) can shift it.
"""

import hashlib

import numpy as np


def generator(seed: int, stream: str, counter: int = 0) -> np.random.Generator:
    """The generator that belongs to one (seed, stream, counter).

    Args:
        seed: the seed of the run, 0 <= seed < 2**64.
        stream: what the numbers are for, e.g. "weights/augmentation"; streams are independent.
        counter: the step or pass; counters are independent too.
    """
    stream_key = int.from_bytes(hashlib.sha256(stream.encode()).digest()[:8], "little")
    key = np.array([seed, stream_key], dtype=np.uint64)
    # Philox counts its own blocks in the lowest of the four words; ours stands in the highest.
    return np.random.Generator(
        np.random.Philox(key=key, counter=np.array([0, 0, 0, counter], dtype=np.uint64))
    )
