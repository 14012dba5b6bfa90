"""Eyes and brows of one person: what rests is made once, lids, gaze and brows anew for each photograph.

Each eye works on a small box of the head's grid. In it u runs from the inner corner (-1) to the outer (1) and v upwards
in the same unit (half the width of the eye). All arrays are (r, c), colours (3, r, c) linear RGB.
"""

import numpy as np

from utils.data.rendered.geometry import F, HeadGrid, blend, bump, linear, smoothstep
from utils.data.rendered.identity import Identity, Nuisance

_BALL = 0.175  # radius of the eyeball, head units
_SLOPE = -0.16  # eyes lie on a face that curves back towards the ears


def _within(v: np.ndarray, low: np.ndarray, high: np.ndarray, soft: float) -> np.ndarray:
    """1 where low < v < high, with edges `soft` wide."""
    k = F(1 / soft)
    return np.clip((v - low) * k + F(0.5), 0, 1) * np.clip((high - v) * k + F(0.5), 0, 1)


class Eye:
    """One eye; `side` is -1 for the left of the image, 1 for the right."""

    def __init__(self, i: Identity, g: HeadGrid, side: int, points: np.ndarray, albedo: np.ndarray):
        """Shapes the socket in `points` and paints the lids in `albedo`, both (3, R, C), in place."""
        self.identity, self.side = i, side
        self.box = g.box(side * i.eye_spacing, 0.28, i.eye_height - 0.18, i.eye_height + 0.19)
        self.dx = side * g.x0[self.box] - F(i.eye_spacing)  # grows towards the ear on both sides
        self.dy = g.y0[self.box] - F(i.eye_height)
        cos, sin, w = F(np.cos(i.eye_tilt)), F(np.sin(i.eye_tilt)), F(i.eye_width)
        self.u = (self.dx * cos + self.dy * sin) / w
        self.v = (self.dy * cos - self.dx * sin) / w
        u, v = self.u, self.v
        self.uu = np.clip(u, -1, 1)
        # The upper lid peaks towards the nose, the lower one towards the ear
        self.arch = 1 - self.uu * self.uu
        self.upper = F(0.5 * i.eye_opening) * self.arch ** F(0.72) * (1 - F(0.16) * self.uu)
        self.lower = F(-0.2 * i.eye_opening) * self.arch * (1 + F(0.25) * self.uu)
        self.between = np.clip((1 - np.abs(u)) * 12, 0, 1)
        # Lids are a shell around the ball
        rho2 = self.dx**2 + self.dy**2
        self.centre = np.unravel_index(int(np.argmin(rho2)), rho2.shape)
        z = points[2][self.box]
        depth = z[self.centre] + F(0.06 - 0.025 * i.eye_depth)
        lid = depth + F(_SLOPE) * self.dx - rho2 * F(1 / (2 * _BALL + 0.03))
        shell = z + np.exp(-((rho2 / F((1.2 * i.eye_width) ** 2)) ** 2)) * np.maximum(lid - z, 0)
        crease = bump(v, self.upper + F(0.1 + 0.15 * i.eye_fold), 0.055) * np.clip((F(1.15) - np.abs(u)) * 5, 0, 1)
        ends = np.clip((F(1.1) - np.abs(u)) * 4, 0, 1)
        shell -= F(0.014 * i.eye_fold) * crease
        shell += F(0.014 * i.eye_bags) * bump(v, self.lower - F(0.42), 0.13) * ends
        z += shell - z
        ball = depth - F(0.022) + F(_SLOPE) * self.dx - rho2 * F(1 / (2 * _BALL))
        self.sink = ball - shell
        nx, ny = self.dx / F(_BALL) - F(_SLOPE), self.dy / F(_BALL)
        self.normal = np.stack([side * nx, ny, np.ones_like(nx)]) / np.sqrt(nx * nx + ny * ny + 1)
        paint = albedo[(slice(None), *self.box)]
        paint *= 1 - F(0.15 + 0.3 * i.eye_fold) * crease
        paint *= 1 - F(0.22 * i.eye_bags) * bump(v, self.lower - F(0.62), 0.1) * ends
        self.sclera = np.array([0.74, 0.69, 0.66], F)[:, None, None] * (1 - F(0.3) * np.abs(self.uu) ** 3)
        blend(self.sclera, (0.45, 0.2, 0.18), np.clip((-u - F(0.84)) * 8, 0, 1) * F(0.8))  # pink corner by the nose
        self.lashes = linear(i.brow_colour) * F(0.3)
        flick = np.exp(-(((v - (u - 1) * F(0.5)) / F(0.09)) ** 2))
        self.flick = flick * np.clip((F(1 + 0.28 * i.lashes) - u) * 6, 0, 1) * (u > 0.95) * F(0.6 * i.lashes)
        rng = np.random.default_rng([i.texture_seed, 4])
        self.spokes = [(F(rng.uniform(0.04, 0.1)), int(k), F(rng.uniform(0, 6.3))) for k in (7, 12, 19)]

    def open(self, n: Nuisance, points, albedo, specular, gloss) -> np.ndarray:
        """Lids and gaze of one photograph, in place; returns the mask of the eyeball."""
        i, u, v = self.identity, self.u, self.v
        closure = min(n.eye_closure + 0.16 * max(n.smile, 0), 0.9)
        lower = self.lower * F(1 - 0.4 * closure)
        upper = lower + (self.upper * F(1 + 0.12 * n.brow_raise) - lower) * F(1 - closure)
        eye = _within(v, lower, upper, 0.07) * self.between
        points[2][self.box] += eye * self.sink

        # Sclera, iris with limbal ring and spokes, pupil; the upper lid shades them
        ix = self.dx - F(self.side * n.gaze_x * 0.062 + 0.008)
        iy = self.dy - F(n.gaze_y * 0.036 + 0.008 * i.eye_opening)
        distance = np.sqrt(ix * ix + iy * iy) * F(1 / i.iris_radius)
        angle = np.arctan2(iy, ix)
        spokes = 1 + sum(a * np.sin(angle * k + p) for a, k, p in self.spokes)
        ring = (F(1.4) - F(0.8) * smoothstep(0.6, 1.0, distance)) * spokes * (1 - F(0.3) * iy / F(i.iris_radius))
        ball = self.sclera.copy()
        blend(ball, linear(i.iris)[:, None, None] * ring, np.clip((F(1.04) - distance) * 7, 0, 1))
        blend(ball, (0.006, 0.005, 0.005), np.clip((F(0.42) - distance) * 8, 0, 1))
        ball *= 1 - F(0.52) * np.exp(np.clip(v - upper, -2, 0) * F(1 / 0.17))

        paint = albedo[(slice(None), *self.box)]
        paint *= 1 - F(0.16) * bump(v, lower - F(0.04), 0.06) * self.between
        blend(paint, ball, eye)
        # Lashes, thicker towards the ear; a thin line below
        thick = F(0.045 + 0.06 * i.lashes) * (1 + F(0.35) * self.uu)
        lash = np.exp(-(((v - upper) / thick) ** 2)) * np.clip((F(1.04) - np.abs(u)) * 10, 0, 1)
        under = np.exp(-(((v - lower) / F(0.05)) ** 2)) * self.between
        blend(paint, self.lashes, np.minimum(lash * F(0.68 + 0.3 * i.lashes) + self.flick, 1))
        blend(paint, self.lashes, under * F(0.15 + 0.2 * i.lashes))
        wet = eye * (1 - np.minimum(lash, 1))
        specular[self.box] += wet * (F(0.95) - specular[self.box])
        gloss[self.box] += wet * (F(350) - gloss[self.box])
        return eye


class Brow:
    """One eyebrow."""

    def __init__(self, i: Identity, g: HeadGrid, side: int, strands: np.ndarray):
        """`strands` (R, C) is noise for the hairs."""
        self.identity = i
        self.box = g.box(side * 0.4, 0.4, i.brow_height - 0.15, i.brow_height + 0.27)
        self.x, self.y = side * g.x0[self.box], g.y0[self.box]
        self.hairs = np.clip(F(0.95) + F(0.22) * strands[self.box], 0, 1.2) * F(0.45 + 0.55 * i.brow_density)
        self.colour = linear(i.brow_colour) * F(0.75)

    def raise_(self, n: Nuisance, points, albedo) -> None:
        i = self.identity
        up, frown = max(n.brow_raise, 0), max(-n.brow_raise, 0)
        t = (self.x - F(i.brow_gap - 0.02 * frown)) * F(1 / (2 * i.brow_length - 0.14))
        tt = np.clip(t, 0, 1)
        centre = F(i.brow_height + 0.07 * up - 0.015 * frown - 0.035) + F(0.35 * i.brow_tilt) * (tt - F(0.3))
        centre += F(0.075 * i.brow_arch + 0.03) * (1 - ((tt - F(0.6)) / F(0.6)) ** 2) - F(0.05 * frown) * (1 - tt) ** 2
        thickness = F(i.brow_thickness) * (F(0.6) + F(0.4) * np.minimum(tt * 6, 1)) * (1 - F(0.72) * tt**2)
        mask = np.clip((1 - np.abs(self.y - centre) / thickness) * F(1.5), 0, 1)
        mask *= np.clip((t + F(0.03)) * 14, 0, 1) * np.clip((1 - t) * 10, 0, 1)
        blend(albedo[(slice(None), *self.box)], self.colour, np.minimum(mask * self.hairs, F(0.96)))
        points[2][self.box] += F(0.012) * mask
