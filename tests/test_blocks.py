"""Identity blocks read as labelled images, and some images of a set as a set of its own."""

import pickle

import numpy as np
import pytest

from recognition.training_sets import read_training_set
from utils.config import UserError
from utils.data.formats.blocks import BlockImages
from utils.data.formats.recognise import open_labelled
from utils.data.formats.selected import SelectedImages
from utils.data.formats.writers import write_labelled
from utils.images import write_block, write_image


@pytest.fixture
def tiles() -> np.ndarray:
    return np.random.default_rng(0).integers(10, 256, (7, 112, 112, 3), dtype=np.uint8)


@pytest.fixture
def blocks(tmp_path, tiles):
    """Two identities of aligned tiles: 6 in two rows, 1 in one."""
    write_image(tmp_path / "blocks/b.png", write_block(tiles[:6], 5))
    write_image(tmp_path / "blocks/a.png", write_block(tiles[6:], 5))
    return tmp_path / "blocks"


def test_tiles_are_images_without_the_filler(blocks, tiles):
    images = open_labelled(blocks)
    assert isinstance(images, BlockImages)
    assert images.names == ["a/0", *(f"b/{k}" for k in range(6))]
    assert images.identities == ["a", "b"] and images.labels.tolist() == [0] + [1] * 6
    found = np.stack([images.pixels(k) for k in (6, 0, 1, 2, 3, 4, 5)])
    np.testing.assert_array_equal(found, tiles[[5, 6, 0, 1, 2, 3, 4]])
    assert len({images.digest(k) for k in range(7)}) == 7
    assert images.describe(3) == f"{blocks}/b.png, tile 2"
    again = pickle.loads(pickle.dumps(images))  # as for a DataLoader's workers
    np.testing.assert_array_equal(again.pixels(0), tiles[6])


def test_a_selection_keeps_names_and_closes_the_gaps_of_labels(blocks, tiles, tmp_path):
    chosen = SelectedImages(open_labelled(blocks), [3, 1])
    assert chosen.names == ["b/2", "b/0"] and chosen.identities == ["b"] and chosen.labels.tolist() == [0, 0]
    write_labelled(chosen, tmp_path / "out", "folders")
    written = open_labelled(tmp_path / "out")
    assert written.names == ["b/0.png", "b/2.png"]
    np.testing.assert_array_equal(written.pixels(1), tiles[2])
    np.testing.assert_array_equal(chosen.pixels(0), tiles[2])


def test_blocks_that_are_none_and_training_on_blocks(blocks, tmp_path):
    with pytest.raises(UserError, match=r"dataset.root: .*split_identity_blocks"):
        read_training_set(blocks)
    write_image(blocks / "c.png", np.zeros((30, 30, 3), np.uint8))
    with pytest.raises(UserError, match=r"c\.png: not an identity block of 4 tiles of 128 or 5 of 112"):
        open_labelled(blocks)
