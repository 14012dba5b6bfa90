"""Plain 8-bit JPEG and PNG files decoded without Pillow, two to three times faster: decoding is what a loader costs.

Only files are taken that have one possible reading: whatever carries an orientation, transparency, a palette, 16 bits
or any damage is left to Pillow. The pixels are Pillow's, bit for bit (both call libjpeg-turbo; PNG is lossless).
"""

from __future__ import annotations

import struct
import zlib

import numpy as np

try:
    import pyspng
    import simplejpeg
except ImportError:  # optional: Pillow decodes everything, only slower
    pyspng = simplejpeg = None

MAX_PIXELS = 1 << 25  # what is larger goes to Pillow, which has a limit of its own and words for it
JPEG_BEGIN, JPEG_APP1 = b"\xff\xd8\xff", b"\xff\xe1"
PNG_BEGIN = b"\x89PNG\r\n\x1a\n"
PNG_RGB8 = b"\x08\x02\x00\x00\x00"  # 8 bits, RGB, deflate, adaptive filters, not interlaced
# What stands beside the pixels without a say in them; texts and Exif may hold an orientation, tRNS a transparent colour
PNG_PLAIN = {b"IHDR", b"IDAT", b"IEND", b"gAMA", b"cHRM", b"sRGB", b"iCCP", b"pHYs", b"sBIT", b"bKGD", b"tIME"}
CHUNK = struct.Struct(">I4s")


def decode_plain(data: bytes) -> np.ndarray | None:
    """uint8 (H, W, 3) RGB of a plain JPEG or PNG; None for anything else, for damage and without the packages."""
    if simplejpeg is None:
        return None
    try:
        if data.startswith(JPEG_BEGIN):
            return _jpeg(data)
        if data.startswith(PNG_BEGIN):
            return _png(data)
    except (ValueError, RuntimeError, MemoryError):  # damaged: Pillow says how, or reads what can be read
        return None
    return None


def _jpeg(data: bytes) -> np.ndarray | None:
    # In coded pixels 0xFF is followed by 0 or a restart marker, so these two bytes are the header of Exif or XMP
    if JPEG_APP1 in data:
        return None
    height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    if colours not in ("YCbCr", "Gray") or height * width > MAX_PIXELS:
        return None
    return simplejpeg.decode_jpeg(data, "RGB")


def _png(data: bytes) -> np.ndarray | None:
    width, height = struct.unpack(">II", data[16:24]) if len(data) > 29 else (0, 0)
    if data[24:29] != PNG_RGB8 or height * width > MAX_PIXELS or not _is_plain(data):
        return None
    return pyspng.load(data)


def _is_plain(data: bytes) -> bool:
    """Whether the PNG holds chunks of PNG_PLAIN only, each with its checksum, which the decoder does not look at."""
    position, name = len(PNG_BEGIN), b""
    view = memoryview(data)
    while position + 12 <= len(data):
        length, name = CHUNK.unpack_from(data, position)
        end = position + 8 + length
        if name not in PNG_PLAIN or zlib.crc32(view[position + 4 : end]) != int.from_bytes(data[end : end + 4], "big"):
            return False
        position = end + 4
    return name == b"IEND"
