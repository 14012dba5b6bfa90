"""Neck, shoulders and clothes: the neck turns gradually from the direction of the shoulders to that of the head."""

import numpy as np

from utils.data.rendered.geometry import F, Surface, bump, by_density, grid_normals, linear, noise, smoothstep
from utils.data.rendered.identity import Identity, Nuisance

# Top to bottom: height, half-width, half-depth, centre (z), share of the head's rotation
_SECTIONS = np.array(
    [
        (-0.50, 0.42, 0.42, -0.15, 1.0),
        (-1.00, 0.43, 0.45, -0.18, 0.75),
        (-1.40, 0.46, 0.47, -0.24, 0.3),
        (-1.60, 0.54, 0.50, -0.28, 0.08),
        (-1.73, 0.78, 0.53, -0.31, 0.0),
        (-1.88, 1.18, 0.58, -0.32, 0.0),
        (-2.08, 1.52, 0.66, -0.32, 0.0),
        (-2.45, 1.70, 0.76, -0.32, 0.0),
        (-2.90, 1.72, 0.84, -0.32, 0.0),
    ]
)
_NECKLINE = {"crew": -1.62, "vneck": -1.6, "collar": -1.5, "stripes": -1.64}


class Torso:
    """The resting neck and torso of one person; `surface` dresses and turns it."""

    def __init__(self, identity: Identity, size: int):
        k = size / 128
        t = by_density(0, 1, int(110 * k), 0.5, 0.3, 1.4)
        knots = np.concatenate([[0], np.cumsum(np.hypot(np.diff(_SECTIONS[:, 0]), np.diff(_SECTIONS[:, 1])))])
        dense = np.linspace(0, 1, 300)
        kernel = np.exp(-0.5 * (np.arange(-24, 25) / 8.0) ** 2)
        columns = []
        for c in range(5):
            values = np.interp(dense, knots / knots[-1], _SECTIONS[:, c])
            values = np.convolve(np.pad(values, 24, mode="edge"), kernel / kernel.sum(), "valid")
            columns.append(np.interp(t, dense, values).astype(F)[:, None])
        y, width, depth, centre, self.follow = columns
        phi = np.linspace(-1.9, 1.9, int(140 * k)).astype(F)[None]
        self.aphi = np.abs(phi)
        # The throat: two tendons with a hollow between them
        relief = F(0.02) * bump(self.aphi, 0.5, 0.16) * bump(y, -1.35, 0.22)
        relief -= F(0.03) * bump(phi, 0, 0.18) * bump(y, -1.62, 0.09)
        build = F(identity.neck_width)
        self.sin, self.cos = np.sin(phi), np.cos(phi)
        x = (width * build + relief) * self.sin
        z = centre + (depth * build + relief) * self.cos
        self.y = y
        self.rest = np.stack([x, np.broadcast_to(y, x.shape), z]).astype(F)
        self.skin = linear(identity.skin)[:, None, None] * F(0.93)

    def surface(self, n: Nuisance, head: np.ndarray, pivot: np.ndarray) -> Surface:
        """Neck and clothes of one photograph, in camera space. `head` (3, 3) is the head's rotation about `pivot`."""
        cy, sy = np.cos(n.torso_yaw), np.sin(n.torso_yaw)
        body = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]], F)
        y, shape = self.y, self.rest.shape
        neckline = F(_NECKLINE[n.clothes]) + F(0.1) * np.minimum(self.aphi, F(1.2))
        if n.clothes == "vneck":
            neckline = neckline - F(0.6) * np.clip(1 - np.abs(self.rest[0]) / F(0.34), 0, 1)
        if n.clothes == "collar":
            neckline = neckline - F(0.4) * np.clip(1 - np.abs(self.rest[0]) / F(0.2), 0, 1)
        cloth = np.clip((neckline - y) * 40 + F(0.5), 0, 1)
        seam = bump(y, neckline - F(0.035), 0.03)
        folds = noise(np.random.default_rng([n.seed, 5]), shape[1], shape[2], 7, 12)
        out = cloth * (F(0.035) + F(0.014) * folds) + F(0.05 if n.clothes == "collar" else 0.02) * seam
        grown = self.rest.copy()
        grown[0] += out * self.sin
        grown[2] += out * self.cos
        flat = grown.reshape(3, -1) - pivot[:, None]
        turned, still = (head @ flat).reshape(shape), (body @ flat).reshape(shape)
        points = still + self.follow * (turned - still) + pivot[:, None, None]
        colour = linear(n.clothes_colour)[:, None, None]
        if n.clothes == "stripes":
            second = linear(n.clothes_colour_2)[:, None, None]
            colour = colour + (second - colour) * smoothstep(-0.25, 0.25, np.sin(y * 26))
        colour = colour * ((1 + F(0.05) * folds) * (1 - F(0.25) * seam))
        albedo = self.skin + cloth * (colour - self.skin)
        return Surface(
            points.reshape(3, -1),
            grid_normals(points).reshape(3, -1),
            albedo.reshape(3, -1),
            (F(0.12) * (1 - F(0.7) * cloth)).ravel(),
            np.full(cloth.size, 12.0, F),
            scatter=0.7,
        )
