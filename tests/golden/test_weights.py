"""The weights and pixels of the original's run are reproduced bit for bit."""

import hashlib

import numpy as np
import pytest

from tests.golden.data import DIRECTORY, NAMES, load
from tests.golden.weights import pixels, project

# SHA-256 of all parameters, in the JSON file's order, and then the pixels.
DIGESTS = {
    "all": "042095fdf9fb60f430aa799a2042879c247b27238a687943bd2d24d743ad2656",
    "qformer": "e2052542ac99729e160c81a4b74dcadf7016d3183d866ea34159af50e2594b65",
    "aggregator": "e0cff521bbe00ddadb8fe059703a68ceab40eb21ffe405399d64727e229908bb",
}


@pytest.mark.parametrize("name", NAMES)
def test_weights_and_pixels_are_those_of_the_original_s_run(name: str) -> None:
    golden = load(name)
    digest = hashlib.sha256()
    for parameter in golden.parameters.values():
        digest.update(parameter.numpy().tobytes())
    digest.update(pixels(golden.meta["seed"], 2, golden.meta["image_size"]).tobytes())
    assert digest.hexdigest() == DIGESTS[name]


def test_three_numbers_tell_arrays_apart() -> None:
    array = np.random.RandomState(0).standard_normal((5, 7))
    stands_for = project(1, "x", array)
    assert stands_for[0] == pytest.approx(np.linalg.norm(array))
    assert project(1, "x", 3 * array) == pytest.approx(3 * stands_for)
    for other in (project(2, "x", array), project(1, "y", array), project(1, "x", array.T)):
        assert other[0] == pytest.approx(stands_for[0])
        assert np.abs(other[1:] - stands_for[1:]).min() > 0.1


def test_the_data_is_small() -> None:
    assert sum(file.stat().st_size for file in DIRECTORY.glob("*.*")) < 2**20
