"""Images as arrays: reading, writing, listing, resizing, conversion, preview grids and identity blocks.

Legend: n images, H W height and width. Two layouts cross the project's borders, and `to_float` and `to_uint8` are the
only bridge: pixels are uint8 (..., H, W, 3) RGB in 0..255; network inputs are float32 (..., 3, H, W) in [-1, 1].
"""

import io
import json
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch.nn import functional as F
from tqdm import tqdm

from utils.config import UserError
from utils.fast_decode import decode_plain

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
# Width of the identity blocks in use: (tile size, columns), as sampled and as aligned.
SAMPLED_BLOCK = (128, 4)
ALIGNED_BLOCK = (112, 5)
# JPEG turns a black tile into values that differ from 0 by a count or two.
BLACK_LEVEL = 2


@contextmanager
def _opened(source: str | Path | io.BytesIO, name: str) -> Iterator[Image.Image]:
    """The image, its header read; what is wrong with it, then or inside the block, becomes a UserError with `name`."""
    try:
        with Image.open(source) as image:
            yield image
    except UnidentifiedImageError as error:
        raise UserError(f"{name}: not an image of a known format") from error
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{name}: not a readable image ({reason})") from error


def decode_image(data: bytes, name: str = "image") -> np.ndarray:
    """Decode an encoded image (PNG, JPEG, ...) to uint8 (H, W, 3) RGB.

    Grey, palette and CMYK images are converted, 16-bit ones scaled to 8 bits, transparent pixels laid over black, and
    the camera's orientation tag is obeyed. Raises UserError naming `name` where the data are no readable image.
    """
    plain = decode_plain(data)
    if plain is not None:
        return plain
    with _opened(io.BytesIO(data), name) as image:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16-bit grey, as I;16 or widened to 32 bits
            grey = np.asarray(image).astype(np.float64)
            grey = np.clip(np.rint(grey / 257), 0, 255).astype(np.uint8)
            return np.repeat(grey[..., None], 3, axis=2)
        if "A" in image.getbands() or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
        return np.array(image.convert("RGB"))


def image_format(data: bytes, name: str = "image") -> str:
    """The format of an encoded image by its header, as Pillow calls it (JPEG, PNG, ...); UserError where none."""
    with _opened(io.BytesIO(data), name) as image:
        return image.format


def suffix_of(data: bytes, name: str = "image") -> str:
    """The file name suffix for an encoded image, one of IMAGE_SUFFIXES; UserError for any other format."""
    found = image_format(data, name)
    suffix = next((s for s in IMAGE_SUFFIXES if Image.registered_extensions()[s] == found), None)
    if suffix is None:
        raise UserError(f"{name}: an image of the format {found}; {', '.join(IMAGE_SUFFIXES)} are read")
    return suffix


def read_bytes(path: str | Path) -> bytes:
    """The content of a file; UserError where it cannot be read."""
    try:
        with open(path, "rb") as file:  # a loader does little else: no Path for each image
            return file.read()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error


def read_image(path: str | Path) -> np.ndarray:
    """Read an image file as uint8 (H, W, 3) RGB (see `decode_image`); UserError where it cannot be read."""
    return decode_image(read_bytes(path), str(path))


def image_size(path: str | Path) -> tuple[int, int]:
    """(height, width) in pixels from the file's header; UserError where there is none."""
    with _opened(path, str(path)) as image:
        return image.height, image.width


def encode_image(image: np.ndarray, suffix: str = ".png", quality: int | None = None) -> bytes:
    """Encode uint8 (H, W, 3) RGB in the format of the file name suffix.

    quality: 1 .. 100 of JPEG (None: 95; always full colour resolution) and WebP (None: without loss).
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"an image is uint8 (H, W, 3), got {image.dtype} {image.shape}")
    format = Image.registered_extensions()[suffix.lower()]
    options: dict[str, Any] = {}
    if format == "JPEG":
        options = {"quality": 95 if quality is None else quality, "subsampling": 0}
    elif format == "WEBP":
        options = {"lossless": True} if quality is None else {"quality": quality}
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format, **options)
    return buffer.getvalue()


def write_image(path: str | Path, image: np.ndarray) -> None:
    """Write uint8 (H, W, 3) RGB; the file appears whole or not at all, its folder is made where missing."""
    write_encoded(path, encode_image(image, Path(path).suffix))


def write_encoded(path: str | Path, data: bytes) -> None:
    """Write an encoded image as it is; the file appears whole or not at all, its folder is made where missing."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def list_images(root: str | Path) -> list[str]:
    """Paths of the image files below `root`, relative, with forward slashes, sorted; hidden ones are left out."""
    root = Path(root)
    found = []
    for folder, subfolders, files in os.walk(root, followlinks=True):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        relative = PurePosixPath(Path(folder).relative_to(root).as_posix())
        found += [
            (relative / name).as_posix()
            for name in files
            if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")
        ]
    return sorted(found)


def resize(images: np.ndarray, size: int | tuple[int, int], antialias: bool = True) -> np.ndarray:
    """Resize uint8 (..., H, W, 3) bilinearly to `size` (a side, or (height, width)).

    With `antialias` the filter widens with the shrinking factor; without it four neighbours are interpolated whatever
    the factor, as `torch.nn.functional.interpolate` does (the published presets go from 128 to 112 that way).
    """
    height, width = (size, size) if isinstance(size, int) else size
    if images.shape[-3:-1] == (height, width):
        return images
    flat = images.reshape(-1, *images.shape[-3:])
    if antialias:
        pixels = np.empty((len(flat), height, width, 3), np.uint8)
        for pixel, image in zip(pixels, flat, strict=True):
            pixel[...] = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
    else:
        tensor = torch.from_numpy(np.ascontiguousarray(flat)).permute(0, 3, 1, 2).float()  # (n, 3, H, W) 0..255
        tensor = F.interpolate(tensor, size=(height, width), mode="bilinear", align_corners=False)
        pixels = tensor.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return np.ascontiguousarray(pixels).reshape(*images.shape[:-3], height, width, 3)


def centre_square(image: np.ndarray) -> np.ndarray:
    """The largest centred square of (H, W, 3), so that resizing to a square keeps a face's proportions."""
    height, width = image.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return image[top : top + side, left : left + side]


def to_float(
    images: np.ndarray | torch.Tensor, memory_format: torch.memory_format = torch.contiguous_format
) -> torch.Tensor:
    """uint8 (..., H, W, 3) pixels => float32 (..., 3, H, W) in [-1, 1]: (x / 255 - 0.5) / 0.5.

    `memory_format`: torch.channels_last, for (B, H, W, 3) only, is how pixels lie already and saves reordering them.
    """
    tensor = torch.from_numpy(np.ascontiguousarray(images)) if isinstance(images, np.ndarray) else images
    return tensor.movedim(-1, -3).float().contiguous(memory_format=memory_format).div_(127.5).sub_(1.0)


def to_uint8(images: torch.Tensor) -> np.ndarray:
    """float (..., 3, H, W) in [-1, 1] => uint8 (..., H, W, 3) pixels, rounded; values outside are clamped."""
    pixels = images.detach().float().add(1.0).mul(127.5).round().clamp(0, 255).to(torch.uint8)
    return np.ascontiguousarray(pixels.movedim(-3, -1).cpu().numpy())


def _rows(tiles: np.ndarray, columns: int) -> np.ndarray:
    """Lay (n, h, w, 3) out as (rows, columns, h, w, 3), the last row filled with black tiles."""
    if len(tiles) == 0:
        raise ValueError("no tiles to lay out")
    rows = -(-len(tiles) // columns)
    filled = np.zeros((rows * columns, *tiles.shape[1:]), tiles.dtype)
    filled[: len(tiles)] = tiles
    return filled.reshape(rows, columns, *tiles.shape[1:])


def grid(images: np.ndarray | Sequence[np.ndarray], columns: int, padding: int = 2) -> np.ndarray:
    """A preview of uint8 (n, h, w, 3), row by row with `padding` white pixels between tiles: uint8 (H, W, 3)."""
    images = np.stack(list(images))
    padded = np.pad(images, ((0, 0), (padding, 0), (padding, 0), (0, 0)), constant_values=255)
    rows = _rows(padded, min(columns, len(padded)))
    canvas = rows.transpose(0, 2, 1, 3, 4).reshape(rows.shape[0] * rows.shape[2], -1, 3)
    return np.pad(canvas, ((0, padding), (0, padding), (0, 0)), constant_values=255)


def write_block(tiles: np.ndarray, columns: int) -> np.ndarray:
    """Lay tiles uint8 (n, h, w, 3) out as an identity block: rows without padding, the last filled with black tiles."""
    rows = _rows(tiles, columns)  # (rows, columns, h, w, 3)
    return np.ascontiguousarray(rows.transpose(0, 2, 1, 3, 4).reshape(rows.shape[0] * rows.shape[2], -1, 3))


def read_block(image: np.ndarray, tile_size: int) -> np.ndarray:
    """Cut an identity block uint8 (H, W, 3) into tiles (n, tile_size, tile_size, 3), without its black filler.

    Filler stands at the end of the last row only: a black tile before an image is kept as an image. Raises UserError
    where the block is not a whole number of tiles.
    """
    height, width = image.shape[:2]
    if height % tile_size or width % tile_size:
        raise UserError(
            f"tile_size: a block of {width} x {height} pixels is not a whole number of {tile_size} x {tile_size} "
            "tiles; say the size of one tile"
        )
    rows, columns = height // tile_size, width // tile_size
    tiles = image.reshape(rows, tile_size, columns, tile_size, 3).transpose(0, 2, 1, 3, 4)
    tiles = tiles.reshape(-1, tile_size, tile_size, 3)
    count = len(tiles)
    while count > len(tiles) - columns and tiles[count - 1].max() <= BLACK_LEVEL:
        count -= 1
    return np.ascontiguousarray(tiles[:count])


def block_tile_size(width: int) -> int | None:
    """Tile size of a block of this width in pixels: 4 tiles of 128 as sampled, 5 of 112 as aligned, else None."""
    return {size * columns: size for size, columns in (SAMPLED_BLOCK, ALIGNED_BLOCK)}.get(width)


def tile_of_block(file: str | Path, tile_size: int | None = None) -> int | None:
    """Side in pixels of the tiles of an image file with the size of a block, several whole tiles; None for any other.

    tile_size: that of the tiles where it is known; None: one of those in use. UserError for an unreadable file.
    """
    height, width = image_size(file)
    tile = tile_size or block_tile_size(width)
    return tile if tile and width % tile == 0 and height % tile == 0 and max(width, height) > tile else None


def recorded_tile_size(folder: str | Path) -> int | None:
    """Tile size in pixels of the blocks that sample.py drew into `folder`, by its record; None for any other folder."""
    record = Path(folder) / "dataset.json"
    if not record.is_file():
        return None
    settings = json.loads(record.read_text(encoding="utf-8"))["settings"]
    if settings["sampling.save_mode"] != "blocks":
        return None
    block = next(Path(folder).glob(f"*.{settings['sampling.image_format']}"), None)
    return None if block is None else image_size(block)[1] // SAMPLED_BLOCK[1]


def default_threads() -> int:
    """Number of processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def load_images(
    images: Iterable[str | Path | Callable[[], np.ndarray]],
    size: int,
    *,
    root: str | Path = ".",
    antialias: bool = True,
    threads: int | None = None,
    progress: str | None = None,
) -> np.ndarray:
    """Read images into one uint8 (n, size, size, 3) array, for caches; order as given.

    Each is a path, or a function that gives uint8 (H, W, 3) RGB; it is cut to its centred square and resized. `root` is
    put before relative paths; `threads` None takes every processor (decoding and resizing release the interpreter
    lock); `progress` labels a bar, None shows none. The first unreadable file raises UserError.
    """
    images = list(images)
    pixels = np.empty((len(images), size, size, 3), np.uint8)

    def load(index: int) -> None:
        source = images[index]
        image = source() if callable(source) else read_image(Path(root) / source)
        pixels[index] = resize(centre_square(image), size, antialias)

    with ThreadPoolExecutor(threads or default_threads()) as pool:
        done = pool.map(load, range(len(images)))
        try:
            for _ in tqdm(done, total=len(images), desc=progress, unit="image", disable=progress is None):
                pass
        except UserError:
            pool.shutdown(cancel_futures=True)
            raise
    return pixels
