"""A little ONNX recogniser, encoded by hand: flatten the image, multiply by a matrix.

Protocol buffers: a field is its number and kind, then an integer in groups of seven bits or a length and bytes. The
numbers of the fields are those of onnx.proto.
"""

from pathlib import Path

import numpy as np

FLOAT, OPSET, IR_VERSION = 1, 13, 8


def integer(value: int) -> bytes:
    groups = [value & 127]
    while value := value >> 7:
        groups.append(value & 127)
    return bytes(group | 128 for group in groups[:-1]) + bytes(groups[-1:])


def number(field: int, value: int) -> bytes:
    return integer(field << 3) + integer(value)


def message(field: int, *parts: bytes) -> bytes:
    content = b"".join(parts)
    return integer(field << 3 | 2) + integer(len(content)) + content


def value_info(field: int, name: str, shape: tuple[int | str, ...]) -> bytes:
    dims = [message(1, message(2, d.encode()) if isinstance(d, str) else number(1, d)) for d in shape]
    return message(field, message(1, name.encode()), message(2, message(1, number(1, FLOAT), message(2, *dims))))


def node(kind: str, inputs: tuple[str, ...], output: str) -> bytes:
    names = [message(1, name.encode()) for name in inputs]
    return message(1, *names, message(2, output.encode()), message(4, kind.encode()))


def write_onnx(path: Path, weight: np.ndarray, shape: tuple[int | str, ...]) -> None:
    """y = flatten(x) @ weight (float32 (numbers, D)) for images x of this shape, letters for open sizes."""
    weight = weight.astype("<f4")
    tensor = [number(1, size) for size in weight.shape]
    tensor += [number(2, FLOAT), message(8, b"w"), message(9, weight.tobytes())]
    graph = [
        node("Flatten", ("data",), "flat"),
        node("MatMul", ("flat", "w"), "y"),
        message(2, b"recogniser"),
        message(5, *tensor),
        value_info(11, "data", shape),
        value_info(12, "y", (shape[0], weight.shape[1])),
    ]
    path.write_bytes(number(1, IR_VERSION) + message(7, *graph) + message(8, message(1, b""), number(2, OPSET)))
