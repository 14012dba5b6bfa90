"""Plain 8-bit JPEG and PNG files decoded without Pillow, up to three times faster: decoding is what a loader costs.

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
    from isal import isal_zlib as inflater
    from isal.igzip_lib import IsalError
except ImportError:  # optional: PNG takes twice as long without it
    inflater, IsalError = zlib, zlib.error

DAMAGE = (ValueError, RuntimeError, MemoryError, IsalError)  # which Pillow describes, or can read around
MAX_PIXELS = 1 << 25  # what is larger goes to Pillow, which has a limit of its own and words for it
JPEG_BEGIN, JPEG_APP1 = b"\xff\xd8\xff", b"\xff\xe1"
PNG_BEGIN = b"\x89PNG\r\n\x1a\n"
PNG_RGB8 = b"\x08\x02\x00\x00\x00"  # 8 bits, RGB, deflate, adaptive filters, not interlaced
# What stands beside the pixels without a say in them, and its length; texts and Exif may hold an orientation, tRNS a
# transparent colour, and a colour profile has to be inflated to be judged
PNG_PLAIN = {b"gAMA": 4, b"cHRM": 32, b"sRGB": 1, b"pHYs": 9, b"tIME": 7}
PNG_HEADER = len(PNG_BEGIN) + 25  # bytes up to the end of IHDR
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
    return pyspng.load(_stored(data[:PNG_HEADER], stream, height * (1 + 3 * width)))


def _plain_stream(data: bytes) -> bytes | None:
    """The zlib stream of a PNG of IHDR, chunks of PNG_PLAIN, one run of IDAT and IEND, each with its checksum; None for
    any other."""
    position, name, parts = len(PNG_BEGIN), b"", []
    view = memoryview(data)
    while position + 12 <= len(data) and name != b"IEND":
        before = name
        length, name = CHUNK.unpack_from(data, position)
        end = position + 8 + length
        if inflater.crc32(view[position + 4 : end]) != int.from_bytes(data[end : end + 4], "big"):
            return None
        if name == b"IHDR":
            in_place = position == len(PNG_BEGIN) and end + 4 == PNG_HEADER
        elif name == b"IDAT":
            in_place = not parts or before == b"IDAT"
            parts.append(view[position + 8 : end])
        else:
            in_place = length == (0 if name == b"IEND" else PNG_PLAIN.get(name))
        if not in_place:
            return None
        position = end + 4
    return b"".join(parts) if name == b"IEND" and position == len(data) else None


def _stored(header: bytes, stream: bytes, size: int) -> bytes:
    """The same PNG with its `size` bytes of filtered rows stored, not compressed (RFC 1951, section 3.2.4).

    ISA-L inflates two to three times faster than the zlib of the decoder, to which this leaves undoing the filters; and
    either way the stream's own checksum is compared, at which the decoder does not look.
    """
    inflate = inflater.decompressobj()
    rows = memoryview(inflate.decompress(stream, size + 1))
    if len(rows) != size or not inflate.eof:
        raise ValueError("a stream of another length")
    body: list[Any] = [b"\x78\x01"]
    for start in range(0, size, BLOCK):
        part = rows[start : start + BLOCK]
        body += [BLOCK_HEAD.pack(start + BLOCK >= size, len(part), len(part) ^ 0xFFFF), part]
    return b"".join([header, _chunk(b"IDAT", b"".join([*body, stream[-4:]])), _chunk(b"IEND", b"")])


def _chunk(name: bytes, data: bytes) -> bytes:
    return b"".join([CHUNK.pack(len(data), name), data, inflater.crc32(data, inflater.crc32(name)).to_bytes(4, "big")])
