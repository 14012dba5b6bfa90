"""What a malicious pickle holds."""

from collections.abc import Callable
from typing import Any


class Call:
    """Pickles as a call: whoever unpickles it without care runs `function(*arguments)`."""

    def __init__(self, function: Callable, *arguments: Any) -> None:
        self.parts = (function, arguments)

    def __reduce__(self) -> tuple:
        return self.parts
