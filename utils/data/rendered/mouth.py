"""The mouth of one person, shaped and painted anew for each expression.

Arrays are (r, c) on a box of the head's grid.
"""

import numpy as np

from utils.data.rendered.geometry import F, HeadGrid, blend, bump, linear, noise
from utils.data.rendered.identity import Identity, Nuisance


def _within(v: np.ndarray, low: np.ndarray, high: np.ndarray, soft: float) -> np.ndarray:
    """1 where low < v < high, with edges `soft` wide."""
    k = F(1 / soft)
    return np.clip((v - low) * k + F(0.5), 0, 1) * np.clip((high - v) * k + F(0.5), 0, 1)


class Mouth:
    def __init__(self, i: Identity, g: HeadGrid):
        self.identity = i
        self.box = g.box(0.0, 1.45 * i.mouth_width, i.mouth_height - 0.25, i.mouth_height + 0.16)
        self.x = g.x0[self.box]
        self.ax = np.abs(self.x)
        rng = np.random.default_rng([i.texture_seed, 6])
        columns = self.x.shape[1]
        self.lines = 1 + F(0.09) * noise(rng, 1, columns, 1, max(columns // 3, 2))
        self.bow = F(0.008) * bump(self.x, 0, 0.05) - F(0.006) * bump(self.ax, 0.1, 0.05)
        peak = 1 + F(0.25) * bump(self.ax, 0.075, 0.05) - F(0.4 * i.cupid) * bump(self.x, 0, 0.032)
        self.upper, self.lower = F(i.upper_lip) * peak, F(i.lower_lip)
        self.lips = linear(i.lip_colour)[:, None, None] * self.lines
        self.gaps = 1 - F(0.25) * np.abs(np.sin(self.x * F(38))) ** 12  # between the teeth
        self.tongue = bump(self.x, 0, 0.13)

    @staticmethod
    def drop(n: Nuisance) -> float:
        """How far the jaw falls, head units."""
        return 0.14 * n.mouth_open

    def shape(self, n: Nuisance, points, albedo, specular, gloss) -> tuple[float, float]:
        """Lips and teeth of one photograph, in place. Returns x and y of the right corner on the plane of features."""
        i, smile = self.identity, max(n.smile, 0)
        y = points[1][self.box]
        half = i.mouth_width * (1 + 0.17 * smile - 0.1 * n.mouth_open)
        s = self.ax * F(1 / half)
        s2 = np.minimum(s * s, 1)
        curve = 0.07 * n.smile + 0.02 * i.mouth_curve
        line = F(i.mouth_height - 0.3 * curve) + F(curve) * np.minimum(s * s, 1.5) + self.bow
        gape = 0.15 * n.mouth_open + 0.07 * max(n.smile - 0.4, 0)
        fall = 1 - s2
        gap = F(gape) * fall ** F(0.6)
        top, bottom = line + F(0.15) * gap, line - F(0.85) * gap
        upper = self.upper * F(1 - 0.15 * smile) * fall ** F(0.65)
        lower = self.lower * F(1 - 0.1 * smile) * fall ** F(0.55)
        inside = np.clip((1 - s) * F(30) + F(0.5), 0, 1)
        upper_mask = _within(y, top, top + upper, 0.016) * inside
        lower_mask = _within(y, bottom - lower, bottom, 0.02) * inside
        # Relief: two rolls with a groove between them, the hollow of the open mouth, dimples at the corners
        tu = np.clip((y - top) / np.maximum(upper, F(0.01)), 0, 1)
        tl = np.clip((bottom - y) / np.maximum(lower, F(0.01)), 0, 1)
        dz = F(0.042) * upper_mask * np.sin(F(np.pi) * tu ** F(0.7))
        dz += F(0.058) * lower_mask * np.sin(F(np.pi) * tl ** F(0.75))
        groove = bump(y, line, 0.014) * np.clip((F(1.08) - s) * 8, 0, 1)
        dz -= F(0.022) * groove * (1 - np.minimum(gap * 30, 1))
        hole = _within(y, bottom, top, 0.014) * np.minimum(gap * F(60), 1) * inside
        dz -= F(0.09) * hole
        dz -= F(0.02) * bump(s, 1.1, 0.1) * bump(y, line, 0.04)
        points[2][self.box] += dz

        colours = albedo[(slice(None), *self.box)]
        blend(colours, self.lips * (F(0.9) - F(0.22) * (1 - tu)), upper_mask * F(0.9))
        blend(colours, self.lips * (1 - F(0.16) * (1 - tl)), lower_mask * F(0.85))
        if gape > 0.004:
            cavity = np.full_like(colours, 0.02)
            cavity[0] = 0.06
            blend(cavity, (0.3, 0.1, 0.1), self.tongue * bump(y, bottom + F(0.01), 0.03) * F(min(gape * 7, 1)))
            teeth = np.clip((y - (top - F(0.07))) * F(40), 0, 1) * np.clip((F(0.86) - s) * F(5), 0, 1)
            shade = self.gaps * (F(0.55) + F(0.45) * np.clip((top - y) * 40, 0, 1))
            blend(cavity, np.array([0.78, 0.74, 0.66], F)[:, None, None] * shade, teeth)
            blend(colours, cavity, hole)
        closed = groove * (1 - np.minimum(gap * F(40), 1))
        colours *= 1 - F(0.62) * closed - F(0.2) * bump(s, 1.05, 0.07) * bump(y, line, 0.022)
        wet = upper_mask * F(0.6) + lower_mask
        specular[self.box] += wet * F(0.22) - hole * F(0.08)
        gloss[self.box] += wet * F(16)
        return half, i.mouth_height + 0.7 * curve
