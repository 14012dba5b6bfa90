"""The report is one self-contained, well-formed page, whatever the numbers."""

from html.parser import HTMLParser

import numpy as np
import pytest

from demo.report import Curves, Figure, Panel, Report, StageRun, duration, render
from utils import charts

VOID = {"meta", "img", "br", "line", "rect", "path"}


class Page(HTMLParser):
    """Collects tags and attributes, and checks that every tag is closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID or (tag == "path" and not self.get_starttag_text().endswith("/>")):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag == "rect":  # one with a tooltip inside
            return
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data):
        self.text += data


def accuracy(value: float) -> dict:
    return {
        "accuracy": value,
        "std": 0.01,
        "genuine": 1200,
        "impostor": 1200,
        "people": 120,
        "eer": 0.1,
        "tar_at_far_1e-2": 0.5,
    }


@pytest.fixture
def report() -> Report:
    faces = np.random.default_rng(0).integers(0, 255, (3, 16, 16, 3), dtype=np.uint8)
    steps = list(range(0, 5000, 10))
    return Report(
        title="Faces & <people>",
        lead="One sentence.",
        created="1 May 2026, 10:00",
        seconds=125.4,
        accuracy={"rendered": accuracy(0.9), "two_stage": accuracy(0.8), "untrained": accuracy(0.6)},
        data={"rendered": "3 people"},
        panels=[
            Panel("rendered", "Rendered", "caption", [faces, faces]),
            Panel("two_stage", "Drawn", "caption", [faces]),
        ],
        pipeline=[Figure("Aligned", "112 pixels", faces)],
        timesteps=[960, 920, 880],
        d=np.array([[0.1, 0.2], [0.05, 0.0], [0.01, 0.04]]),
        switch_t=[880, -1],
        threshold=0.02,
        curves=[
            Curves("Diffusion", "loss", "loss", {"loss": (steps, [1 / (1 + s) for s in steps])}, log_y=True),
            Curves("Recognisers", "loss", "loss", {"rendered": ([0, 1], [2, 1]), "two_stage": ([0, 1], [3, np.nan])}),
            Curves("Nothing", "loss", "loss", {"loss": ([], [])}),
        ],
        detection=[("rendered, training", 100, 97)],
        stages=[StageRun("Render", 12.3, ["python main.py a='<b>'"], "100 images", resumed=True)],
        environment={"processor": "two cores"},
        settings={"seed": 0},
    )


def test_is_self_contained_and_well_formed(report):
    html = render(report)
    page = Page(html)
    assert page.open == []
    for tag, attributes in page.seen:
        assert tag not in ("script", "link", "iframe", "object")
        for name in ("src", "href", "srcset"):
            assert attributes.get(name, "data:").startswith("data:image/jpeg;base64,") or name not in attributes
    assert "url(" not in html and "@import" not in html and "http" not in html
    assert sum(tag == "img" for tag, _ in page.seen) == 3 * 4


def test_escapes_and_says_what_ran(report):
    html = render(report)
    assert "<b>'" not in html and "<people>" not in html
    text = Page(html).text
    assert "Faces & <people>" in text and "python main.py a='<b>'" in text
    assert "2 min 05 s" in text and "resumed" in text
    assert "97.0 %" in text and "90.00" in text and "1,200 + 1,200" in text
    assert "1 of 2 samples switched to their identity before stage 2, the median one at t = 880" in text
    assert "No values were recorded." in text


def test_follows_the_theme(report):
    html = render(report)
    assert "prefers-color-scheme: dark" in html
    colours = [value for _, attributes in Page(html).seen for name, value in attributes.items() if name == "style"]
    assert colours and all("var(--" in value or value.startswith("--n:") for value in colours)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(3.21, "3.2 s"), (59.4, "59 s"), (61, "1 min 01 s"), (3599.6, "1 h 00 min"), (7320, "2 h 02 min")],
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_ticks_are_round():
    assert charts.ticks(0.0, 1.0) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert charts.ticks(-3.0, 14.0) == [0.0, 5.0, 10.0]
    assert charts.ticks(2.0, 2.0) == [2.0]


def test_thin_keeps_means():
    xs, ys = charts.thin(np.arange(1000.0), np.arange(1000.0) * 2, 100)
    assert len(xs) == 100 and xs[0] == 4.5 and ys[-1] == 2 * 994.5


def test_smooth_starts_without_bias():
    assert charts.smooth(np.array([4.0, 4.0, 4.0])) == pytest.approx([4.0, 4.0, 4.0])
    assert charts.smooth(np.array([1.0, 0.0]), weight=0.5) == pytest.approx([1.0, 1 / 3])
