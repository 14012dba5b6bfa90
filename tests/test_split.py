from pathlib import Path

import numpy as np
import pytest

import split_identity_blocks
from split_identity_blocks import SplitSettings, split_blocks
from utils.config import UserError
from utils.images import list_images, read_image, write_block, write_image


def tiles(count: int, size: int) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def split(root: Path, **changes) -> int:
    values = {"tile_size": None, "threads": 2, **changes}
    return split_blocks(SplitSettings(str(root / "in"), str(root / "out"), **values))


def test_blocks_become_folders(tmp_path):
    sampled, aligned = tiles(6, 128), tiles(5, 112)
    write_image(tmp_path / "in" / "0001.png", write_block(sampled, 4))
    write_image(tmp_path / "in" / "0002.png", write_block(aligned, 5))
    assert split(tmp_path) == 11
    expected = [f"0001/{k}.png" for k in range(6)] + [f"0002/{k}.png" for k in range(5)]
    assert list_images(tmp_path / "out") == expected
    assert np.array_equal(read_image(tmp_path / "out/0001/5.png"), sampled[5])
    assert np.array_equal(read_image(tmp_path / "out/0002/0.png"), aligned[0])
    assert split(tmp_path) == 0


def test_other_tile_sizes_are_said(tmp_path):
    write_image(tmp_path / "in" / "a.png", write_block(tiles(3, 64), 2))
    with pytest.raises(UserError, match=r"tile_size: a\.png is 128 pixels wide"):
        split(tmp_path)
    with pytest.raises(UserError, match=r"tile_size: a\.png, 128 x 128 pixels, is no whole number of tiles of 60"):
        split(tmp_path, tile_size=60)
    assert not (tmp_path / "out").exists()
    assert split(tmp_path, tile_size=64) == 3


def test_sampled_blocks_are_cut_by_their_record(tmp_path):
    write_image(tmp_path / "in" / "a.png", write_block(tiles(3, 32), 4))
    (tmp_path / "in" / "dataset.json").write_text(
        '{"settings": {"sampling.save_mode": "blocks", "sampling.image_format": "png"}}'
    )
    assert split(tmp_path) == 3


def test_a_killed_split_resumes_with_whole_identities(tmp_path, monkeypatch):
    for name in "abc":
        write_image(tmp_path / "in" / f"{name}.png", write_block(tiles(5, 112), 5))
    written = []

    def write_or_die(path, image):
        if len(written) == 7:
            raise KeyboardInterrupt
        written.append(path)
        write_image(path, image)

    with monkeypatch.context() as patch:
        patch.setattr(split_identity_blocks, "write_image", write_or_die)
        with pytest.raises(KeyboardInterrupt):
            split(tmp_path, threads=1)
    assert list_images(tmp_path / "out") == [f"a/{k}.png" for k in range(5)]
    assert split(tmp_path) == 10
    assert len(list_images(tmp_path / "out")) == 15
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a", "b", "c"]


def test_mistakes_are_named(tmp_path):
    with pytest.raises(UserError, match="input_dir: no such folder"):
        split(tmp_path)
    (tmp_path / "in").mkdir()
    with pytest.raises(UserError, match="input_dir: no images"):
        split(tmp_path)
    write_image(tmp_path / "folders" / "in" / "a" / "0.png", tiles(1, 64)[0])
    with pytest.raises(UserError, match=r"holds folders of images \(a/0\.png\), not blocks"):
        split(tmp_path / "folders")
    for suffix in ("png", "jpg"):
        write_image(tmp_path / "in" / f"a.{suffix}", write_block(tiles(5, 112), 5))
    with pytest.raises(UserError, match=r"a\.jpg and a\.png are blocks of the same identity"):
        split(tmp_path)
