"""Plain 8-bit JPEG and PNG files decoded without Pillow, two to three times faster: decoding is what a loader costs.

Only files are taken that have one possible reading: whatever carries an orientation, transparency, a palette, 16 bits
or any damage is left to Pillow. The pixels are Pillow's, bit for bit (both call libjpeg-turbo; PNG is lossless).
"""

from __future__ import annotations

import struct
import zlib
from typing import Any

import numpy as np

try:
    import pyspng
    import simplejpeg
except ImportError:  # optional: Pillow decodes everything, only slower
    pyspng = simplejpeg = None
try:
    from isal import isal_zlib
    from isal.igzip_lib import IsalError
except ImportError:  # optional: PNG takes half as long again without it
    isal_zlib, IsalError = None, ValueError

crc32 = zlib.crc32 if isal_zlib is None else isal_zlib.crc32
DAMAGE = (ValueError, RuntimeError, MemoryError, IsalError)
MAX_PIXELS = 1 << 25  # what is larger goes to Pillow, which has a limit of its own and words for it
JPEG_BEGIN, JPEG_APP1 = b"\xff\xd8\xff", b"\xff\xe1"
PNG_BEGIN = b"\x89PNG\r\n\x1a\n"
PNG_RGB8 = b"\x08\x02\x00\x00\x00"  # 8 bits, RGB, deflate, adaptive filters, not interlaced
# What stands beside the pixels without a say in them; texts and Exif may hold an orientation, tRNS a transparent colour
PNG_PLAIN = {b"IHDR", b"IDAT", b"IEND", b"gAMA", b"cHRM", b"sRGB", b"iCCP", b"pHYs", b"sBIT", b"bKGD", b"tIME"}
CHUNK = struct.Struct(">I4s")
BLOCK, BLOCK_HEAD = 0xFFFF, struct.Struct("<?HH")  # the largest stored block; whether it is the last, its length twice


def decode_plain(data: bytes) -> np.ndarray | None:
    """uint8 (H, W, 3) RGB of a plain JPEG or PNG; None for anything else, for damage and without the packages."""
    if simplejpeg is None:
        return None
    try:
        if data.startswith(JPEG_BEGIN):
            return _jpeg(data)
        if data.startswith(PNG_BEGIN):
            return _png(data)
    except DAMAGE:  # damaged: Pillow says how, or reads what can be read
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
    if data[24:29] != PNG_RGB8 or height * width > MAX_PIXELS:
        return None
    stream = _plain_stream(data)
    if stream is None:
        return None
    if isal_zlib is not None:
        data = _stored(data[: len(PNG_BEGIN) + 25], stream, height * (1 + 3 * width))
    return pyspng.load(data)


def _plain_stream(data: bytes) -> bytes | None:
    """The zlib stream of a PNG that holds chunks of PNG_PLAIN only, each with its checksum, at which the decoder does
    not look; None for any other."""
    position, name, parts = len(PNG_BEGIN), b"", []
    view = memoryview(data)
    while position + 12 <= len(data):
        length, name = CHUNK.unpack_from(data, position)
        end = position + 8 + length
        if name not in PNG_PLAIN or crc32(view[position + 4 : end]) != int.from_bytes(data[end : end + 4], "big"):
            return None
        if name == b"IDAT":
            parts.append(view[position + 8 : end])
        position = end + 4
    return b"".join(parts) if name == b"IEND" else None


def _stored(header: bytes, stream: bytes, size: int) -> bytes:
    """The same PNG with its `size` bytes of filtered rows stored, not compressed (RFC 1951, section 3.2.4).

    ISA-L inflates two to three times faster than the zlib of the decoder, to which this leaves undoing the filters.
    """
    inflate = isal_zlib.decompressobj()
    rows = memoryview(inflate.decompress(stream, size + 1))
    if len(rows) != size or not inflate.eof:  # at the end the stream's own checksum has been compared
        raise ValueError("a stream of another length")
    body: list[Any] = [b"\x78\x01"]
    for start in range(0, size, BLOCK):
        part = rows[start : start + BLOCK]
        body += [BLOCK_HEAD.pack(start + BLOCK >= size, len(part), len(part) ^ 0xFFFF), part]
    return b"".join([header, _chunk(b"IDAT", b"".join([*body, stream[-4:]])), _chunk(b"IEND", b"")])


def _chunk(name: bytes, data: bytes) -> bytes:
    return b"".join([CHUNK.pack(len(data), name), data, crc32(data, crc32(name)).to_bytes(4, "big")])
