"""Head, ears and glasses as clouds of surface points.

Every surface is a grid of points in head units (see `identity`), dense enough that neighbouring points fall on
neighbouring samples of the image; `render` projects them and keeps the nearest at each sample.

Legend: R rows (crown to chin), C columns (around the head), N points.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from utils.data.rendered.identity import Identity

F = np.float32

# The average head from the crown to the underside of the chin.
# Horizontal sections: height, half-width, and z of their front, back and centre
_SECTIONS = np.array(
    [
        (1.300, 0.00, -0.10, -0.10, -0.10),
        (1.285, 0.18, 0.12, -0.32, -0.10),
        (1.220, 0.37, 0.36, -0.55, -0.10),
        (1.080, 0.56, 0.60, -0.80, -0.10),
        (0.850, 0.72, 0.80, -1.00, -0.08),
        (0.550, 0.80, 0.915, -1.10, -0.08),
        (0.250, 0.83, 0.965, -1.10, -0.06),
        (-0.050, 0.83, 0.960, -1.05, -0.05),
        (-0.350, 0.81, 0.950, -0.90, -0.03),
        (-0.650, 0.745, 0.935, -0.70, 0.00),
        (-0.900, 0.64, 0.920, -0.50, 0.02),
        (-1.100, 0.50, 0.910, -0.30, 0.06),
        (-1.230, 0.36, 0.870, -0.10, 0.15),
        (-1.290, 0.240, 0.770, 0.10, 0.30),
        (-1.280, 0.110, 0.620, 0.30, 0.40),
        (-1.250, 0.00, 0.450, 0.45, 0.45),
    ]
)


@dataclass
class Surface:
    """Points with what shading needs. `points`, `normals`, `albedo` (linear RGB) are (3, N) float32, the rest (N,)."""

    points: np.ndarray
    normals: np.ndarray
    albedo: np.ndarray
    specular: np.ndarray  # strength of the highlight
    gloss: np.ndarray  # its exponent
    scatter: float = 0.0  # subsurface scattering: softens and reddens the terminator
    two_sided: bool = False
    tangents: np.ndarray | None = None  # hair: direction of the strands, (3, N)
    live: np.ndarray | None = None  # (N,) bool: points that can be seen at all; None is all of them


def linear(srgb) -> np.ndarray:
    """sRGB in [0, 1] => linear light."""
    return np.power(np.asarray(srgb, dtype=F), F(2.2))


def dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(3, N), (3, N) => (N,)."""
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def smoothstep(low: float, high: float, x: np.ndarray) -> np.ndarray:
    t = np.clip((x - low) * F(1.0 / (high - low)), 0, 1)
    return t * t * (3 - 2 * t)


def blend(albedo: np.ndarray, colour, mask: np.ndarray) -> None:
    """albedo (3, ...) moves to `colour`, (3,) or (3, ...), by mask (...), in place."""
    colour = np.asarray(colour, F)
    if colour.ndim == 1:
        colour = colour[:, None, None]
    albedo += mask * (colour - albedo)


def bump(x: np.ndarray, centre: float, deviation: float) -> np.ndarray:
    t = (x - centre) * F(1.0 / deviation)
    return np.exp(F(-0.5) * t * t)


def noise(rng: np.random.Generator, rows: int, columns: int, n_rows: int, n_columns: int) -> np.ndarray:
    """Smooth noise of unit deviation on a (rows, columns) grid, with n_rows x n_columns random knots."""
    knots = rng.standard_normal((n_rows, n_columns)).astype(F)
    out = _interpolation(rows, n_rows) @ knots @ _interpolation(columns, n_columns).T
    return out / (out.std() + F(1e-6))


@lru_cache(maxsize=64)
def _interpolation(n: int, n_knots: int) -> np.ndarray:
    """(n, n_knots) weights of a cubic B-spline between evenly spaced knots."""
    position = np.linspace(0, n_knots - 1, n)
    d = np.minimum(np.abs(position[:, None] - np.arange(n_knots)[None]), 2)
    return np.where(d < 1, 2 / 3 - d**2 + d**3 / 2, (2 - d) ** 3 / 6).astype(F)


def by_density(low: float, high: float, n: int, centre: float, half_width: float, gain: float) -> np.ndarray:
    """n samples of [low, high], `gain` times denser within `half_width` of `centre`."""
    x = np.linspace(low, high, 2001)
    density = 1 + (gain - 1) / (1 + np.exp((np.abs(x - centre) - half_width) * 14 / half_width))
    cumulative = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return np.interp(np.linspace(0, cumulative[-1], n), cumulative, x)


def grid_normals(points: np.ndarray) -> np.ndarray:
    """Unit normals of a (3, R, C) grid by central differences; outwards when rows run down and columns to the right."""
    down, right = np.empty_like(points), np.empty_like(points)
    down[:, 1:-1] = points[:, 2:] - points[:, :-2]
    down[:, 0], down[:, -1] = points[:, 1] - points[:, 0], points[:, -1] - points[:, -2]
    right[:, :, 1:-1] = points[:, :, 2:] - points[:, :, :-2]
    right[:, :, 0], right[:, :, -1] = points[:, :, 1] - points[:, :, 0], points[:, :, -1] - points[:, :, -2]
    normals = np.empty_like(points)
    for i, (j, k) in enumerate(((1, 2), (2, 0), (0, 1))):
        normals[i] = down[j] * right[k] - down[k] * right[j]
    normals *= 1 / np.sqrt(dot(normals, normals) + F(1e-12))
    return normals


@dataclass
class Profile:
    """Sections of one head at n_t heights, t from 0 (crown) to 1 (under the chin); all (n_t,)."""

    t: np.ndarray
    y: np.ndarray
    width: np.ndarray
    front: np.ndarray
    back: np.ndarray
    centre: np.ndarray
    squareness: float

    def at(self, name: str, t: np.ndarray) -> np.ndarray:
        return np.interp(t, self.t, getattr(self, name)).astype(F)


def head_profile(identity: Identity, n: int = 400) -> Profile:
    """The horizontal sections of this head, smoothed so that no knot shows."""
    y, width, front, back, centre = _SECTIONS.T
    knots = np.concatenate([[0], np.cumsum(np.hypot(np.diff(y), np.diff(front) * 0.7 + np.diff(width) * 0.3))])
    t = np.linspace(0, 1, n)
    kernel = np.exp(-0.5 * (np.arange(-30, 31) / 11.0) ** 2)
    kernel /= kernel.sum()

    def dense(values: np.ndarray) -> np.ndarray:
        values = np.interp(t, knots / knots[-1], values)
        padded = np.concatenate([2 * values[0] - values[30:0:-1], values, 2 * values[-1] - values[-2:-32:-1]])
        return np.convolve(padded, kernel, "valid")

    y, width, front, back, centre = (dense(v) for v in (y, width, front, back, centre))
    i = identity
    width *= i.head_width * np.interp(
        y,
        [-1.3, -1.1, -0.75, -0.25, 0.3, 0.6, 1.3],
        [i.chin_width, 0.5 * (i.chin_width + i.jaw_width), i.jaw_width, i.cheek_width, 1, i.temple_width, 1],
    )
    below = np.clip(-0.8 - y, 0, None)
    front = front + 0.07 * i.chin_protrusion * np.clip(below / 0.4, 0, 1) * (front > centre + 0.1)
    back = back * np.where(y > -0.6, i.head_depth, 1)
    y = np.where(y > 0.25, 0.25 + (y - 0.25) * (1 + 1.5 * (i.head_height - 1) + 0.6 * (i.forehead_height - 1)), y)
    y = y - below * 2.2 * (i.chin_length - 1)
    return Profile(t, y, np.maximum(width, 1e-3), front, back, centre, i.face_squareness)


def radius(width, front, back, centre, phi: np.ndarray, squareness: float) -> np.ndarray:
    """Distance of the surface from the section's centre in direction phi (0 is forwards).

    A superellipse, with another exponent in front than behind.
    Sections (R, 1) and phi (1, C), or the same shapes, => (R, C).
    """
    sine, cosine = np.abs(np.sin(phi)) + F(1e-6), np.cos(phi)
    forward = smoothstep(-0.2, 0.3, cosine)
    n = F(2.1) * (1 - forward) + F(squareness) * forward
    depth = np.maximum(np.where(cosine > 0, front - centre, centre - back), F(1e-3))
    cosine = np.abs(cosine) + F(1e-6)
    return np.power(np.power(sine / width, n) + np.power(cosine / depth, n), -1 / n).astype(F)


class HeadGrid:
    """The grid of one head: base points, and coordinates (x0, y0) in which features are placed; all (R, C)."""

    def __init__(self, identity: Identity, size: int):
        k = size / 128
        self.profile = profile = head_profile(identity)
        self.phi = by_density(-2.1, 2.1, int(240 * k), 0.0, 0.9, 1.5).astype(F)[None]
        t = by_density(0.0, 1.0, int(240 * k), 0.58, 0.22, 1.6)
        self.y, self.width, self.front, self.back, self.centre = (
            profile.at(name, t)[:, None] for name in ("y", "width", "front", "back", "centre")
        )
        self.r = radius(self.width, self.front, self.back, self.centre, self.phi, profile.squareness)
        self.sin, self.cos = np.sin(self.phi), np.cos(self.phi)
        self.x0 = self.r * self.sin
        self.y0 = np.broadcast_to(self.y, self.r.shape)
        # Features belong to the front: the underside of the chin has the same x, y as the chin and must not have them
        self.face = smoothstep(0.0, 0.25, self.cos) * smoothstep(0.6, 0.78, self.front)
        self.shape = self.r.shape

    def box(self, x: float, reach: float, low: float, high: float) -> tuple[slice, slice]:
        """Rows and columns of the face around |x0 - x| < reach, low < y0 < high."""
        rows = np.flatnonzero((self.y[:, 0] > low) & (self.y[:, 0] < high) & ((self.front[:, 0] > 0.5) | (low < -2)))
        middle = self.x0[int(np.argmin(np.abs(self.y[:, 0] - min(max(0.5 * (low + high), -0.8), 0.3))))]
        columns = np.flatnonzero((np.abs(middle - x) < reach) & (self.cos[0] > 0))
        return slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)

    def points(self, displacement: np.ndarray) -> np.ndarray:
        """Base surface displaced outwards by `displacement` (R, C) => (3, R, C)."""
        r = self.r + displacement
        return np.stack([r * self.sin, np.broadcast_to(self.y, self.shape), self.centre + r * self.cos]).astype(F)


def face_displacement(i: Identity, g: HeadGrid) -> np.ndarray:
    """Relief of the resting face, without eyelids and lips: (R, C) head units outwards."""
    x, y = g.x0, g.y
    ax = np.abs(x)
    d = np.zeros(g.shape, F)
    # Brow ridge, sockets, cheekbones, hollow cheeks
    d += F(0.045 * i.brow_ridge) * bump(y, i.brow_height - 0.03, 0.09) * bump(ax, 0.3, 0.2)
    d += F(0.02) * bump(y, 0.5, 0.2) * bump(ax, 0.25, 0.2)
    d -= F(0.075 + 0.05 * i.eye_depth) * bump(ax, i.eye_spacing, 0.15) * bump(y, i.eye_height + 0.03, 0.115)
    d += F(0.02 + 0.065 * i.cheekbone) * bump(ax, 0.55, 0.15) * bump(y, -0.2, 0.13)
    d += F(0.05 * i.cheek_fullness) * bump(ax, 0.47, 0.18) * bump(y, -0.6, 0.2)
    d += F(0.03) * bump(ax, 0.36, 0.13) * bump(y, -0.38, 0.13)
    d -= F(0.03) * bump(ax, 0.85, 0.12) * bump(y, 0.3, 0.2)
    # Muzzle, fold under the lip, chin
    mouth = i.mouth_height
    d += F(0.065) * bump(x, 0, 0.27) * bump(y, mouth + 0.03, 0.17)
    d -= F(0.05) * bump(x, 0, 0.2) * bump(y, mouth - 0.185, 0.055)
    d += F(0.075) * bump(x, 0, 0.17 * i.chin_width) * bump(y, -1.12, 0.11)
    d -= F(0.03 * i.chin_cleft) * bump(x, 0, 0.022) * bump(y, -1.13, 0.08)
    d -= F(0.014) * bump(x, 0, 0.03) * smoothstep(mouth + 0.02, mouth + 0.1, y) * smoothstep(-0.54, -0.62, y)
    # Fold from the nose to the corner of the mouth, deeper with age
    fold = ax - np.interp(y, [-1.0, -0.85, -0.5], [0.42, 0.385, 0.2]).astype(F)
    along = smoothstep(-1.0, -0.8, y) * smoothstep(-0.45, -0.55, y)
    d -= F(0.008 + 0.035 * i.wrinkles) * bump(fold, 0, 0.028) * along
    # Wrinkles of the forehead and at the outer corners of the eyes
    if i.wrinkles > 0.05:
        lines = np.sin(y * F(58) + F(6) * x * x + F(i.index % 7))
        d += F(0.006 * i.wrinkles) * lines * bump(y, 0.56, 0.13) * bump(x, 0, 0.35)
        corner = np.sin(y * F(75) + ax * F(14))
        d += F(0.006 * i.wrinkles) * corner * bump(ax, i.eye_spacing + 0.26, 0.06) * bump(y, 0, 0.1)
    return (d + nose_displacement(i, x, y)) * g.face


def nose_base(i: Identity) -> float:
    """Height of the base of the nose."""
    return -0.53 * (1 + 0.8 * (i.nose_length - 1))


def nose_tip(i: Identity) -> float:
    """Height of the tip of the nose."""
    return nose_base(i) + 0.085 + 0.03 * i.nose_turn


def nose_displacement(i: Identity, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Relief of the nose: a ridge that ends in a rounded tip, and two wings, joined by a soft maximum."""
    ax = np.abs(x)
    base, tip = nose_base(i), nose_tip(i)
    top = i.eye_height + 0.13
    u = np.maximum((top - y) / F(top - tip), 0)  # 0 at the root, 1 at the tip and, softly, no more
    u = np.maximum(F(0.5) * (u + 1 - np.sqrt((u - 1) ** 2 + F(0.02))), 0)
    ridge = F(0.075 * i.nose_bridge) * smoothstep(0.0, 0.35, u) + F(0.225 * i.nose_height) * u ** F(1.5)
    ridge += F(0.035 * i.nose_hump) * bump(u, 0.45, 0.16) + F(0.02 * i.nose_tip) * bump(u, 1, 0.12)
    below = F(0.5) * (tip - y + np.sqrt((tip - y) ** 2 + F(0.0016))) / F(0.064 + 0.012 * i.nose_turn)
    end = np.exp(-(below ** F(2.2)))
    width = F(0.062) + F(0.014 * (i.nose_bridge - 1)) * (1 - u) + F(0.026 * i.nose_tip) * u * u
    width = width * (1 - F(0.28) * np.minimum(below, 1.5))
    body = ridge * end * np.exp(-((ax / (F(1.4) * width)) ** F(2.2)))
    wing_x, wing_y = F(0.125 * i.nose_width), F(base + 0.055)
    wings = F(0.145) * np.exp(-(((ax - wing_x) / F(0.07)) ** 2) - ((y - wing_y) / F(0.075)) ** 2)
    return np.sqrt(np.sqrt(body**4 + wings**4))


def ear(i: Identity, g: HeadGrid, side: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """One ear: points (3, n, m) and depth of its folds (n, m) in [0, 1]."""
    k = size / 128
    rho = np.linspace(0.02, 1.0, int(26 * k)).astype(F)[:, None]
    psi = np.linspace(0, 2 * np.pi, int(80 * k)).astype(F)[None]
    a, b = 0.16 * i.ear_size, 0.31 * i.ear_size
    u = rho * np.cos(psi) * a * (1 + 0.22 * np.sin(psi))
    v = rho * np.sin(psi) * b
    rim = bump(rho, 0.86, 0.11)
    bowl = bump(rho, 0.35, 0.24) * smoothstep(-1.0, 0.3, np.sin(psi))
    inner = bump(rho, 0.6, 0.08) * smoothstep(-0.2, 0.5, np.sin(psi))
    height = 0.045 * rim - 0.075 * bowl + 0.02 * inner
    out = np.array([side * np.cos(i.ear_angle), 0, np.sin(i.ear_angle)], F)
    back = np.array([side * np.sin(i.ear_angle), 0, -np.cos(i.ear_angle)], F)
    root = np.array(
        [side * (float(np.interp(-0.12, g.profile.y[::-1], g.profile.width[::-1])) - 0.035), -0.15, -0.0], F
    )
    points = root[:, None, None] + back[:, None, None] * (u + a)[None] + out[:, None, None] * height[None]
    points[1] += v
    points[2] -= 0.1 * v  # ears lean backwards
    if side < 0:
        points = points[:, :, ::-1]
        bowl = bowl[:, ::-1]
    return np.ascontiguousarray(points), bowl


def tube(path: np.ndarray, thickness: float, n_around: int = 6) -> tuple[np.ndarray, np.ndarray]:
    """A tube along `path` (3, n) => points and normals, both (3, n * n_around)."""
    travelled = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(path), axis=0))])
    even = np.linspace(0, travelled[-1], path.shape[1])
    path = np.stack([np.interp(even, travelled, axis) for axis in path])
    forward = np.gradient(path, axis=1)
    forward /= np.linalg.norm(forward, axis=0) + 1e-9
    side = np.cross(forward.T, np.array([0.13, 0.21, 0.97])).T
    side /= np.linalg.norm(side, axis=0) + 1e-9
    up = np.cross(forward.T, side.T).T
    angle = np.linspace(0, 2 * np.pi, n_around, endpoint=False)
    normals = side[:, :, None] * np.cos(angle) + up[:, :, None] * np.sin(angle)
    points = path[:, :, None] + thickness * normals
    return points.reshape(3, -1).astype(F), normals.reshape(3, -1).astype(F)


def glasses(i: Identity, front: float, temple: float, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Frames on the nose at depth `front`, reaching the ears at half-width `temple`: points and normals, (3, N)."""
    k = size / 128
    angle = np.linspace(0, 2 * np.pi, int(170 * k))
    square = i.glasses == "square"
    exponent = 0.55 if square else 1.0
    half_width, half_height = 0.25 * i.glasses_size, (0.19 if square else 0.225) * i.glasses_size

    def corner(v: np.ndarray) -> np.ndarray:
        return np.sign(v) * np.abs(v) ** exponent

    def depth(x: np.ndarray) -> np.ndarray:
        return front - 0.28 * x * x

    parts = []
    centre_x, centre_y = i.eye_spacing + 0.015, i.eye_height - 0.02
    for side in (-1, 1):
        x = side * centre_x + half_width * corner(np.cos(angle))
        y = centre_y + half_height * corner(np.sin(angle)) * (1 - 0.08 * corner(np.cos(angle)) * side)
        parts.append(tube(np.stack([x, y, depth(x)]), 0.02, int(6 * k)))
        s = np.linspace(0, 1, int(80 * k))
        x = side * (centre_x + half_width + s**0.5 * max(temple + 0.03 - centre_x - half_width, 0.05))
        edge = depth(np.array(centre_x + half_width))
        parts.append(tube(np.stack([x, centre_y + 0.07 + 0.05 * s, edge - (edge + 0.12) * s]), 0.018, int(6 * k)))
    gap = centre_x - half_width
    x = np.linspace(-gap, gap, int(30 * k))
    parts.append(tube(np.stack([x, centre_y + 0.05 + 0.03 * (1 - (x / gap) ** 2), depth(x) + 0.02]), 0.018, int(6 * k)))
    return np.concatenate([p for p, _ in parts], 1), np.concatenate([n for _, n in parts], 1)
