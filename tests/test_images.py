import numpy as np
import pytest
import torch
from PIL import Image

from utils.config import UserError
from utils.images import (
    block_tile_size,
    grid,
    list_images,
    load_images,
    read_block,
    read_image,
    resize,
    to_float,
    to_uint8,
    write_block,
    write_image,
)


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "CMYK", "I;16", "RGB"])
def test_every_mode_reads_as_rgb(tmp_path, mode):
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    if mode == "I;16":
        Image.fromarray(np.full((4, 6), 40 * 257, np.uint16)).save(path)
    else:
        Image.new("L", (6, 4), 40).convert(mode).save(path)
    image = read_image(path)
    assert image.shape == (4, 6, 3) and image.dtype == np.uint8
    assert np.abs(image.astype(int) - 40).max() <= 1


def test_transparent_pixels_are_black(tmp_path):
    Image.new("RGBA", (2, 2), (200, 100, 50, 0)).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png").max() == 0


def test_orientation_tag_is_obeyed(tmp_path):
    image = Image.fromarray(np.zeros((4, 8, 3), np.uint8))
    exif = image.getexif()
    exif[0x0112] = 6  # rotate by a quarter turn
    image.save(tmp_path / "a.jpg", exif=exif)
    assert read_image(tmp_path / "a.jpg").shape == (8, 4, 3)


def test_unreadable_files_are_named(tmp_path):
    (tmp_path / "text.png").write_text("no image")
    write_image(tmp_path / "cut.png", noise(32, 32, 3))
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:300])
    for name in ("text.png", "cut.png", "absent.png"):
        with pytest.raises(UserError, match=name):
            read_image(tmp_path / name)


def test_write_leaves_only_the_file(tmp_path):
    image = noise(5, 7, 3)
    write_image(tmp_path / "new" / "a.png", image)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.png"]
    assert np.array_equal(read_image(tmp_path / "new" / "a.png"), image)
    with pytest.raises(ValueError, match="float64"):
        write_image(tmp_path / "b.png", image / 255)
    assert not (tmp_path / "b.png").exists()


def test_list_images_is_sorted_and_relative(tmp_path):
    for name in ("b/1.png", "b/0.JPG", "a/x/2.png", "c.png", "b/.hidden.png", ".trash/1.png", "b/notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert list_images(tmp_path) == ["a/x/2.png", "b/0.JPG", "b/1.png", "c.png"]


def test_float_and_back():
    image = noise(2, 3, 5, 3)
    tensor = to_float(image)
    assert tensor.shape == (2, 3, 3, 5) and tensor.dtype == torch.float32
    assert to_float(np.array([[[0, 255, 51]]], np.uint8)).flatten().tolist() == pytest.approx([-1.0, 1.0, -0.6])
    assert np.array_equal(to_uint8(tensor), image)
    assert to_uint8(torch.full((3, 1, 1), 7.0)).max() == 255


def test_resize_pins():
    ramp = np.repeat(np.array([0, 100, 200, 40], np.uint8)[None, :, None], 4, axis=0).repeat(3, axis=2)
    assert resize(ramp, 2, antialias=False)[0, :, 0].tolist() == [50, 120]
    # triangle filter of twice the width: weights 3/7, 3/7, 1/7 at the left end
    assert resize(ramp, 2, antialias=True)[0, :, 0].tolist() == [71, 117]
    batch = noise(2, 8, 8, 3)
    for antialias in (True, False):
        shrunk = resize(batch, (4, 6), antialias)
        assert shrunk.shape == (2, 4, 6, 3)
        assert np.array_equal(shrunk[1], resize(batch[1], (4, 6), antialias))


def test_blocks_round_trip():
    tiles = noise(7, 16, 16, 3)
    block = write_block(tiles, 5)
    assert block.shape == (32, 80, 3)
    assert np.array_equal(block[:16, 16:32], tiles[1]) and block[16:, 32:].max() == 0
    assert np.array_equal(read_block(block, 16), tiles)


def test_only_trailing_black_tiles_are_filler():
    tiles = noise(6, 8, 8, 3)
    tiles[[1, 4]] = 0  # a black image before the last one is an image
    assert len(read_block(write_block(tiles, 4), 8)) == 6
    tiles[3:] = 0
    assert len(read_block(write_block(tiles[:4], 4), 8)) == 3


def test_block_errors():
    with pytest.raises(UserError, match=r"80 x 32 pixels.*15 x 15"):
        read_block(np.zeros((32, 80, 3), np.uint8), 15)
    assert [block_tile_size(width) for width in (512, 560, 500)] == [128, 112, None]


def test_grid():
    sheet = grid(np.zeros((3, 4, 5, 3), np.uint8), columns=2, padding=1)
    assert sheet.shape == (11, 13, 3)
    assert sheet[0].min() == 255 and sheet[1, 1].max() == 0 and sheet[-1].min() == 255


def test_load_images(tmp_path):
    images = noise(5, 6, 10, 3)
    names = [f"{index}.png" for index in range(5)]
    for name, image in zip(names, images, strict=True):
        write_image(tmp_path / name, image)
    loaded = load_images(names, 6, root=tmp_path, threads=2)
    assert np.array_equal(loaded, images[:, :, 2:8])
    (tmp_path / "3.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"3\.png"):
        load_images(names, 6, root=tmp_path, threads=2)


def test_channels_last_pixels_stay_where_they_are() -> None:
    pixels = torch.arange(2 * 5 * 4 * 3, dtype=torch.uint8).reshape(2, 5, 4, 3)
    images = to_float(pixels, torch.channels_last)
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(images, to_float(pixels)) and to_float(pixels).is_contiguous()
