"""The report of an evaluation: one `report.html` that needs no other file and no network.

`write_report` fills `template.html` (Jinja2) and puts the style sheets, the scripts, the charts and as many thumbnails
as `max_bytes` allows into it.
"""

from evaluation.report.page import Figure, read_figures, write_report

__all__ = ["Figure", "read_figures", "write_report"]
