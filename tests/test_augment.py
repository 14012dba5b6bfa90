"""Augmentation of training faces: the numbers of each operation, and what a configuration turns on."""

import importlib
import math
import warnings

import numpy as np
import pytest
from PIL import Image

from recognition.augment import Augmentation, gaussian_blur, mirror, photometric, rand_augment, random_erasing
from recognition.augment.rand_augment import BINS, OPERATIONS
from utils.config import CONFIG_DIR, UserError, settings


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def random_image(size: int = 24) -> np.ndarray:
    return generator(7).integers(1, 255, (size, size, 3), dtype=np.uint8)


class Fixed:
    """A generator that draws one number."""

    def __init__(self, value: float) -> None:
        self.value = value

    def uniform(self, low: float, high: float) -> float:
        assert low <= self.value <= high
        return self.value


# The configurations


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("none", {}),
        ("flip", {"flip": 0.5}),
        ("adaface", {"flip": 0.5, "crop": 0.2, "low_resolution": 0.2, "photometric": 0.2}),
        ("uiface", {"flip": 0.5, "crop": 0.2, "low_resolution": 0.2, "photometric": 0.2}),
        ("admis", {"flip": 0.5, "resized_crop": 0.2}),
        ("idiff_face", {"flip": 0.5, "rand_augment": 1.0}),
        ("erasing_blur", {"flip": 0.5, "blur": 0.2, "erasing": 0.5}),
        ("small_faces", {"flip": 0.5, "low_resolution": 0.1, "photometric": 0.2}),
    ],
)
def test_published_combinations(compose, name: str, expected: dict) -> None:
    section = compose("recognition_train_config", f"augment={name}").augment
    assert settings(section, Augmentation, "augment") == Augmentation(**{"flip": 0.0, **expected})
    if name == "uiface":
        assert compose("recognition_train_config").augment == section


def test_every_combination_is_tested() -> None:
    tested = test_published_combinations.pytestmark[0].args[1]
    assert {path.stem for path in (CONFIG_DIR / "augment").glob("*.yaml")} == {name for name, _ in tested}


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"crop": 1.5}, r"augment\.crop: 1\.5; a probability"),
        ({"erasing": -0.1}, r"augment\.erasing: -0\.1; a probability"),
        ({"blur": float("nan")}, r"augment\.blur: nan"),
        ({"blurr": 0.1}, r"augment\.blurr: unknown key; did you mean augment\.blur"),
        ({"flip": "often"}, r"augment\.flip: "),
        ({"rand_augment_magnitude": 31}, r"augment\.rand_augment_magnitude: 31; a bin from 1 to 30"),
        ({"rand_augment_operations": 0}, r"augment\.rand_augment_operations: 0"),
    ],
)
def test_settings_that_cannot_be(section: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        settings(section, Augmentation, "augment")


@pytest.mark.parametrize(
    "name", ["flip", "resized_crop", "crop", "low_resolution", "photometric", "rand_augment", "blur", "erasing"]
)
def test_every_probability_turns_its_operation_on(name: str) -> None:
    image = random_image()
    image.flags.writeable = False
    one = Augmentation(**{"flip": 0.0, name: 1.0})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        results = [one(image, generator(seed)) for seed in range(3)]
    assert all(r.shape == image.shape and r.dtype == np.uint8 for r in results)
    assert not all(np.array_equal(r, image) for r in results)
    assert np.array_equal(one(image, generator(0)), results[0])
    assert Augmentation(**{"flip": 0.0, name: 0.0})(image, generator()) is image


# Single operations


def test_mirror() -> None:
    image = random_image()
    assert np.array_equal(mirror(image), image[:, ::-1])


@pytest.mark.parametrize("seed", range(6))
def test_photometric_is_the_formula_in_float64(seed: int) -> None:
    image = random_image()
    draws = generator(seed)
    order, factors = draws.permutation(3), draws.uniform(0.5, 1.5, 3)
    x = image.astype(np.float64)
    for operation, factor in zip(order, factors, strict=True):
        grey = x @ [0.299, 0.587, 0.114]
        anchor = (0.0, grey.mean(), grey[..., None])[operation]
        x = np.clip(factor * x + (1 - factor) * anchor, 0, 255)
    difference = np.abs(np.rint(x) - photometric(image, generator(seed)))
    assert difference.max() <= 1 and (difference > 0).mean() < 0.01  # float32 may round the other way


def test_erasing_fills_one_rectangle_with_noise() -> None:
    image, shares, ratios = np.zeros((64, 64, 3), np.uint8), [], []
    for seed in range(300):
        result = random_erasing(image, generator(seed))
        changed = result.any(axis=2)
        rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
        height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
        shares.append(height * width / changed.size)
        ratios.append(height / width)
        assert changed[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].mean() > 0.95
    assert not image.any()
    assert 0.01 < min(shares) < 0.04 and 0.3 < max(shares) <= 0.4
    assert 0.25 < min(ratios) < 0.5 and 2.0 < max(ratios) < 3.8
    assert abs(result[changed].mean() - 127.5) < 10


@pytest.mark.parametrize("sigma", [0.5, 1.0, 2.0])
def test_blur_comes_near_a_gaussian(sigma: float) -> None:
    image = random_image(48)
    offsets = np.arange(-10, 11)
    kernel = np.exp(-(offsets**2) / (2 * sigma**2))
    kernel /= kernel.sum()
    x = image.astype(np.float64)
    for axis in (0, 1):
        x = np.apply_along_axis(lambda line: np.convolve(line, kernel, mode="same"), axis, x)
    inner = np.s_[12:-12, 12:-12]
    error = np.abs(gaussian_blur(image, Fixed(sigma))[inner] - x[inner])
    assert error.mean() < 2 and x[inner].std() < 50  # of levels; the image has a standard deviation of 74
    flat = np.full((20, 20, 3), 77, np.uint8)
    assert np.array_equal(gaussian_blur(flat, Fixed(sigma)), flat)


# RandAugment


def applied(name: str, image: np.ndarray, m: float = 0.0) -> np.ndarray:
    return np.asarray(OPERATIONS[name].apply(Image.fromarray(image), m)).astype(int)


def grey(image: np.ndarray) -> np.ndarray:
    """Pillow's greyscale in integers."""
    red, green, blue = image.astype(np.int64).transpose(2, 0, 1)
    return (19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16


def sampled(image: np.ndarray, source) -> np.ndarray:
    """Pixel (y, x) from the one that holds the point source(y, x) of the image; black where there is none."""
    result = np.zeros_like(image)
    height, width = image.shape[:2]
    for y in range(height):
        for x in range(width):
            v, u = (math.floor(c) for c in source(y + 0.5, x + 0.5))
            if 0 <= v < height and 0 <= u < width:
                result[y, x] = image[v, u]
    return result


def test_the_operations_and_the_ranges_of_their_magnitudes() -> None:
    assert list(OPERATIONS) == [
        *("identity", "shear_x", "translate_x", "rotate", "brightness", "colour", "contrast", "sharpness"),
        *("posterise", "solarise", "autocontrast", "equalise", "greyscale"),
    ]
    assert BINS == 31
    at = {name: [round(op.magnitude(bin), 4) for bin in (1, 16, 30)] for name, op in OPERATIONS.items()}
    assert at["shear_x"] == [0.01, 0.16, 0.3]
    assert at["translate_x"] == [0.0151, 0.2417, 0.4532]
    assert at["rotate"] == [1.0, 16.0, 30.0]
    for name in ("brightness", "colour", "contrast", "sharpness"):
        assert at[name] == [0.03, 0.48, 0.9]
    assert at["posterise"] == [7.8667, 5.8667, 4.0]
    assert at["solarise"] == [246.5, 119.0, 0.0]
    signed = {name for name, operation in OPERATIONS.items() if operation.signed}
    assert signed == {"shear_x", "translate_x", "rotate", "brightness", "colour", "contrast", "sharpness"}


@pytest.mark.parametrize("m", [0.16, -0.3])
def test_geometry_takes_the_nearest_pixel(m: float) -> None:
    image = random_image(20)
    assert np.array_equal(applied("shear_x", image, m), sampled(image, lambda y, x: (y, x + m * y)))
    pixels = int(m * 20)  # towards zero
    assert np.array_equal(applied("translate_x", image, m), sampled(image, lambda y, x: (y, x - pixels)))
    angle = math.radians(100 * m)
    cos, sin = math.cos(angle), math.sin(angle)
    turned = sampled(image, lambda y, x: (10 + sin * (x - 10) + cos * (y - 10), 10 + cos * (x - 10) - sin * (y - 10)))
    assert np.array_equal(applied("rotate", image, 100 * m), turned)  # against the clock


@pytest.mark.parametrize("m", [0.48, -0.48, 0.9])
def test_enhancements_are_blends(m: float) -> None:
    image = random_image()
    x = image.astype(np.float64)
    around = sum(np.roll(x, (i, j), (0, 1)) for i in (-1, 0, 1) for j in (-1, 0, 1))
    blend = {
        "brightness": np.zeros_like(x),
        "contrast": np.full_like(x, int(grey(image).mean() + 0.5)),
        "colour": np.repeat(grey(image)[..., None], 3, axis=2),
        "sharpness": (around + 4 * x) / 13,
    }
    for name, weak in blend.items():
        expected = np.clip(weak + (1 + m) * (x - weak), 0, 255)
        inner = np.s_[1:-1, 1:-1]  # the smoothing leaves the border as it is
        assert np.abs(applied(name, image, m)[inner] - expected[inner]).max() <= 1.5, name


def test_operations_on_levels() -> None:
    image = random_image()
    x = image.astype(int)
    assert np.array_equal(applied("identity", image), x)
    assert np.array_equal(applied("posterise", image, 5.8667), x & 0b11111100)
    assert np.array_equal(applied("posterise", image, 4.0), x & 0b11110000)
    assert np.array_equal(applied("solarise", image, 119.0), np.where(x < 119, x, 255 - x))
    assert np.array_equal(applied("greyscale", image), np.repeat(grey(image)[..., None], 3, axis=2))
    dull = image // 2 + 40
    low, high = dull.min((0, 1)).astype(float), dull.max((0, 1)).astype(float)
    stretched = (dull - low) * 255 / (high - low)
    assert np.abs(applied("autocontrast", dull) - stretched).max() <= 1
    equal = applied("equalise", dull)
    for channel in range(3):
        before, after = dull[..., channel].ravel(), equal[..., channel].ravel()
        step = (before.size - (before == before.max()).sum()) // 255
        below = np.array([(before < level).sum() for level in before])
        assert np.array_equal(after, np.minimum((step // 2 + below) // step, 255))


def test_draws_are_uniform_over_operations_and_bins(monkeypatch) -> None:
    module = importlib.import_module("recognition.augment.rand_augment")  # the package calls its function the same
    seen: list[tuple[str, float]] = []
    recorders = {
        name: module.Operation(lambda p, m, name=name: seen.append((name, m)) or p, 0.0, 30.0, signed=k % 2 == 0)
        for k, name in enumerate(OPERATIONS)
    }
    monkeypatch.setattr(module, "OPERATIONS", recorders)
    image = random_image(4)
    for seed in range(800):
        rand_augment(image, generator(seed), 4, 16)
    assert len(seen) == 3200
    counts = np.array([sum(n == name for n, _ in seen) for name in recorders])
    assert counts.min() > 180 and counts.max() < 320  # 246 expected
    bins = np.rint(np.abs([m for _, m in seen])).astype(int)
    assert set(bins) == set(range(1, 17))
    assert np.bincount(bins)[1:].min() > 130  # 200 expected
    negative = [m < 0 for n, m in seen if recorders[n].signed]
    assert 0.45 < np.mean(negative) < 0.55
    assert all(m > 0 for n, m in seen if not recorders[n].signed)
