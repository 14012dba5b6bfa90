"""The short way of decoding: Pillow's pixels where it answers, no answer where a file needs more than that."""

import io
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image

from utils import fast_decode
from utils.config import UserError
from utils.fast_decode import decode_plain
from utils.images import decode_image


def photograph(height: int = 37, width: int = 29) -> Image.Image:
    rows, columns = np.mgrid[:height, :width]
    channels = [rows * 5, columns * 7, rows * columns // 3]
    return Image.fromarray((np.stack(channels, -1) % 256).astype(np.uint8))


def encoded(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def with_chunk(png: bytes, name: bytes, payload: bytes) -> bytes:
    """The PNG with one more chunk before its pixels."""
    chunk = struct.pack(">I", len(payload)) + name + payload + struct.pack(">I", zlib.crc32(name + payload))
    at = png.index(b"IDAT") - 4
    return png[:at] + chunk + png[at:]


@pytest.mark.parametrize(
    ("format", "options"),
    [
        ("PNG", {}),
        ("PNG", {"compress_level": 1}),
        ("JPEG", {"quality": 95, "subsampling": 0}),
        ("JPEG", {"quality": 60}),
        ("JPEG", {"subsampling": 1, "progressive": True}),
    ],
)
def test_pixels_are_those_of_pillow(format: str, options: dict) -> None:
    pytest.importorskip("simplejpeg")
    data = encoded(photograph(), format, **options)
    pixels = decode_plain(data)
    assert pixels is not None and pixels.dtype == np.uint8 and pixels.flags.writeable
    assert np.array_equal(pixels, np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
    assert np.array_equal(decode_image(data), pixels)


@pytest.mark.parametrize("size", [(1, 1), (37, 29), (149, 146), (150, 146), (300, 200)])  # 65,535 bytes fit a block
def test_pixels_do_not_depend_on_who_inflates(size: tuple[int, int], monkeypatch) -> None:
    pytest.importorskip("isal")
    data = encoded(photograph(*size), "PNG")
    pixels = decode_plain(data)
    assert np.array_equal(pixels, np.asarray(photograph(*size)))
    monkeypatch.setattr(fast_decode, "inflater", zlib)
    assert np.array_equal(decode_plain(data), pixels)


@pytest.mark.parametrize("length", [0, 37 * 88 - 1, 37 * 88 + 1, 10**8])
def test_a_stream_of_another_length_is_left_to_pillow(length: int) -> None:
    pytest.importorskip("isal")
    data = encoded(photograph(), "PNG")
    stream = zlib.compress(bytes(length))
    body = b"IDAT" + stream
    chunk = struct.pack(">I", len(stream)) + body + struct.pack(">I", zlib.crc32(body))
    tracemalloc.start()
    assert decode_plain(data[:33] + chunk + data[-12:]) is None
    assert tracemalloc.get_traced_memory()[1] < 10**6  # nobody inflates more than the header promises
    tracemalloc.stop()


def chunks(png: bytes) -> dict[bytes, bytes]:
    """The chunks of a PNG by name, whole."""
    found, position = {}, 8
    while position < len(png):
        length, name = struct.unpack_from(">I4s", png, position)
        found[name] = png[position : position + 12 + length]
        position += 12 + length
    return found


def chunk(name: bytes, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload)) + name + payload + struct.pack(">I", zlib.crc32(name + payload))


@pytest.mark.parametrize("with_isal", [True, False])
@pytest.mark.parametrize(
    "order",
    [
        "IHDR other IDAT IEND",
        "IHDR IHDR IDAT IEND",
        "IHDR IEND IDAT IEND",
        "IHDR first time rest IEND",
        "IHDR IDAT IEND more",
        "IHDR gamma IDAT IEND",
        "IHDR profile IDAT IEND",
        "IHDR changed IEND",
        "IHDR time IDAT",
    ],
)
def test_a_png_of_another_order_is_left_to_pillow(order: str, with_isal: bool, monkeypatch) -> None:
    pytest.importorskip("simplejpeg")
    if not with_isal:
        monkeypatch.setattr(fast_decode, "inflater", zlib)
        monkeypatch.setattr(fast_decode, "DAMAGE", (*fast_decode.DAMAGE, zlib.error))
    data = encoded(photograph(), "PNG")
    parts = {name.decode(): part for name, part in chunks(data).items()}
    stream = parts["IDAT"][8:-4]
    parts |= {
        "other": chunk(b"IHDR", struct.pack(">II", 5, 5) + b"\x08\x02\0\0\0"),
        "first": chunk(b"IDAT", stream[:50]),
        "rest": chunk(b"IDAT", stream[50:]),
        "time": chunk(b"tIME", bytes(7)),
        "more": chunk(b"IEND", b""),
        "gamma": chunk(b"gAMA", b""),
        "profile": chunk(b"iCCP", b"name\0\0" + zlib.compress(bytes(100))),
        "changed": chunk(b"IDAT", stream[:-1] + bytes([stream[-1] ^ 1])),  # the stream's own checksum
    }

    def made(order: str) -> bytes:
        return data[:8] + b"".join(parts[name] for name in order.split())

    assert decode_plain(made(order)) is None
    assert np.array_equal(decode_plain(made("IHDR time first rest IEND")), np.asarray(photograph()))


def test_a_grey_jpeg_becomes_rgb() -> None:
    data = encoded(photograph().convert("L"), "JPEG")
    assert np.array_equal(decode_image(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


def test_what_needs_more_is_left_to_pillow() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    picture = photograph()
    for data, shape in [
        (encoded(picture, "JPEG", exif=exif), (29, 37, 3)),
        (encoded(picture, "PNG", exif=exif), (29, 37, 3)),
        (encoded(picture.convert("CMYK"), "JPEG"), (37, 29, 3)),
        (encoded(picture.convert("RGBA"), "PNG"), (37, 29, 3)),
        (encoded(picture.convert("P"), "PNG"), (37, 29, 3)),
        (encoded(picture, "PNG", transparency=(0, 0, 0)), (37, 29, 3)),
        (encoded(picture, "BMP"), (37, 29, 3)),
    ]:
        assert decode_plain(data) is None
        assert decode_image(data).shape == shape
    plain = encoded(picture, "PNG")
    assert decode_plain(with_chunk(plain, b"tEXt", b"Comment\0drawn")) is None
    assert np.array_equal(decode_image(with_chunk(plain, b"gAMA", struct.pack(">I", 45455))), np.asarray(picture))


@pytest.mark.parametrize("format", ["PNG", "JPEG"])
def test_damage_is_still_told(format: str) -> None:
    data = encoded(photograph(200, 200), format)
    with pytest.raises(UserError, match="cut short: not a readable image"):
        decode_image(data[: len(data) // 2], "cut short")


def test_a_png_whose_pixels_were_changed_is_refused() -> None:
    data = bytearray(encoded(photograph(), "PNG"))
    data[data.index(b"IDAT") + 40] ^= 4
    assert decode_plain(bytes(data)) is None
    with pytest.raises(UserError, match="not a readable image"):
        decode_image(bytes(data))


def test_without_the_packages_pillow_does_it(monkeypatch) -> None:
    monkeypatch.setattr(fast_decode, "simplejpeg", None)
    data = encoded(photograph(), "PNG")
    assert decode_plain(data) is None
    assert np.array_equal(decode_image(data), np.asarray(photograph()))
