"""What the HTML reports of the project share: their style sheet (`page.css`), and pictures inside the page."""

import base64
from pathlib import Path

STYLE = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
SERIES_COLOURS = tuple(f"--c{number}" for number in range(1, 9))  # variables of page.css, light and dark


def series_colour(index: int) -> str:
    """The CSS variable of the series with this number, from 0; they begin anew after the eighth."""
    return SERIES_COLOURS[index % len(SERIES_COLOURS)]


def data_uri(data: bytes, media_type: str) -> str:
    """`data:image/png;base64,...`: a file inside the page, so that the page needs no other."""
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"
