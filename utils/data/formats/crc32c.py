"""CRC-32C (Castagnoli; RFC 3720, appendix B.4) and TensorFlow's mask over it, as TFRecord files carry them.

The checksum is linear: a byte changes it by an amount that depends on its value and on how many bytes follow. With a
table of these amounts numpy does a block of 256 bytes at once; only the 32 bits between blocks are a loop of Python.
"""

import numpy as np

POLYNOMIAL = 0x82F63B78  # bits reflected
BLOCK = 256
BLOCKS_AT_ONCE = 4096  # bounds the memory for a long record
MASK_DELTA = 0xA282EAD8


def _tables() -> np.ndarray:
    """(BLOCK, 256) uint32: what byte b leaves in an empty register when k bytes of zero follow it, at [k, b]."""
    first = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        first = np.where(first & 1, (first >> 1) ^ np.uint32(POLYNOMIAL), first >> 1)
    tables = [first]
    for _ in range(BLOCK - 1):
        last = tables[-1]
        tables.append(first[last & 0xFF] ^ (last >> 8))
    return np.stack(tables).astype(np.uint32)


TABLES = _tables()
ONE = TABLES[0].tolist()
# The register before a block acts like a change of the block's first four bytes.
CARRY = [TABLES[BLOCK - 1 - byte].tolist() for byte in range(4)]
FOLLOWING = np.arange(BLOCK)[::-1]


def crc32c(data: bytes) -> int:
    """The CRC-32C of `data`: 0xE3069283 for b"123456789"."""
    register = 0xFFFFFFFF
    head = len(data) % BLOCK
    for byte in data[:head]:
        register = ONE[(register ^ byte) & 0xFF] ^ (register >> 8)
    blocks = np.frombuffer(data, np.uint8, offset=head).reshape(-1, BLOCK) if len(data) > head else ()
    for start in range(0, len(blocks), BLOCKS_AT_ONCE):
        changes = TABLES[FOLLOWING, blocks[start : start + BLOCKS_AT_ONCE]]  # (blocks, BLOCK)
        for change in np.bitwise_xor.reduce(changes, axis=1).tolist():
            carried = CARRY[0][register & 0xFF] ^ CARRY[1][register >> 8 & 0xFF]
            register = carried ^ CARRY[2][register >> 16 & 0xFF] ^ CARRY[3][register >> 24] ^ change
    return register ^ 0xFFFFFFFF


def masked_crc32c(data: bytes) -> int:
    """TensorFlow's form: rotated right by 15 bits, plus a constant, so that a checksum of checksums is none of zero."""
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + MASK_DELTA) & 0xFFFFFFFF
