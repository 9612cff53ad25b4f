"""The parameters and pixels of the golden models, generated from a seed: the original ran on exactly these numbers.

numpy's `RandomState` is frozen: it draws the same numbers everywhere, except for the last bits of a logarithm or a
sine, which differ between machines. Rounding to float32 removes these differences.
"""

import re
import zlib

import numpy as np

# Pattern, mean and standard deviation; the first match counts. Other parameters are weights of products, with gain one.
NORMAL = (
    (r"\.scale$", 1.0, 0.1),
    (r"(norm\d?|LayerNorm|ln_vision|ln_adapter)\.weight$", 1.0, 0.1),
    (r"bias$", 0.0, 0.1),
    (r"soft_prompt_hint$", 0.0, 1.0),
    (r"(shared|embeddings|_attention_bias)\.weight$", 0.0, 0.5),
    (r"(query_tokens|cls_token|pos_embed)$", 0.0, 0.5),
)
ROUTER = re.compile(r"router_ratio([12])$")

# Bounds of a wave's frequencies along width and height (in periods per image), its phase and its amplitude.
WAVE_LOW, WAVE_HIGH = (0.5, 0.5, 0.0, 0.2), (4.0, 4.0, 6.28, 1.0)
WAVES = 4


def _stream(seed: int, prime: int, label: str) -> np.random.RandomState:
    return np.random.RandomState((prime * seed + zlib.crc32(label.encode())) % 2**32)


def weight(seed: int, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return the parameter that the original calls `name`, in float32 and of that shape."""
    drawn = _stream(seed, 1000003, name).standard_normal(shape)
    if router := ROUTER.search(name):  # one row per task: around 1 for its own adapter, 0 for the other
        own = np.array([[1.0], [0.0]] if router[1] == "1" else [[0.0], [1.0]])
        return (own + 0.3 * drawn).astype(np.float32)
    for pattern, mean, std in NORMAL:
        if re.search(pattern, name):
            return (mean + std * drawn).astype(np.float32)
    return (drawn / np.sqrt(np.prod(shape[1:]))).astype(np.float32)


def pixels(seed: int, batch: int, size: int) -> np.ndarray:
    """Return smooth images, a sum of waves in each channel: float32 [batch, 3, size, size]."""
    drawn = np.random.RandomState(seed).uniform(WAVE_LOW, WAVE_HIGH, (batch, 3, WAVES, 4))
    x_frequency, y_frequency, phase, amplitude = (drawn[..., i, None, None] for i in range(4))
    along = np.linspace(0, 1, size)
    waves = amplitude * np.sin(2 * np.pi * (x_frequency * along + y_frequency * along[:, None]) + phase)
    return waves.sum(axis=2).astype(np.float32)


def project(seed: int, name: str, array: np.ndarray) -> np.ndarray:
    """Return three numbers that represent an array: its norm and its products with two random vectors, in float64."""
    flat = np.asarray(array, np.float64).ravel()
    stream = _stream(seed, 7919, f"project {name}")
    return np.array(
        [np.linalg.norm(flat), stream.standard_normal(flat.size) @ flat, stream.standard_normal(flat.size) @ flat]
    )
