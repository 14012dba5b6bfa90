"""Reading a network's settings off the shapes of its parameters.

Every setting shows in several parameters, and the most frequent value wins: so one parameter that is missing or of
another shape does not change what a file is taken for, and the strict comparison afterwards names just that one.
"""

import re
from collections import Counter
from collections.abc import Iterable

Shapes = dict[str, tuple[int, ...]]  # parameter name -> shape
Source = tuple[str, int]  # a regular expression for whole names, and the axis whose size tells


def agreed(shapes: Shapes, *sources: Source, default: int) -> int:
    """The size that most of the named axes have; `default` where none of the parameters is there."""
    sizes = Counter(
        shape[axis]
        for pattern, axis in sources
        for name, shape in matching(shapes, pattern)
        if -len(shape) <= axis < len(shape)
    )
    return sizes.most_common(1)[0][0] if sizes else default


def matching(shapes: Shapes, pattern: str) -> Iterable[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the parameters whose whole name matches a regular expression."""
    compiled = re.compile(pattern)
    return [(name, shape) for name, shape in shapes.items() if compiled.fullmatch(name)]


def has(shapes: Shapes, pattern: str, at_least: int = 2) -> bool:
    """Whether a part of the network is there: a single parameter that matches may be one too many."""
    return len(list(matching(shapes, pattern))) >= at_least


def indices(shapes: Shapes, pattern: str, at_least: int = 2) -> list[int]:
    """The numbers of a list of blocks, from the first group of `pattern`, that so many parameters bear; sorted."""
    compiled = re.compile(pattern)
    counts = Counter(int(match[1]) for name in shapes if (match := compiled.match(name)))
    return sorted(index for index, count in counts.items() if count >= at_least)
