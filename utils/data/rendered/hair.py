"""Hair as a shell around the head: rows run along the strands from the crown down, columns around the head."""

from dataclasses import dataclass

import numpy as np

from utils.data.rendered.geometry import F, HeadGrid, Surface, bump, grid_normals, linear, noise, radius, smoothstep
from utils.data.rendered.identity import Identity


@dataclass(frozen=True)
class Style:
    """One cut. Lengths in head units; `front` is added to the person's hairline."""

    top: float  # thickness above
    side: float  # thickness at the temples
    end: float = -0.55  # height at which the hair ends behind the ears; long hair hangs below the jaw
    front: float = 0.0
    fringe: float | None = None  # height of the fringe over the forehead
    opening: float = 1.2  # half-angle of the face that long hair leaves free
    curl: float = 0.0  # amplitude of locks
    locks: int = 18  # around the head
    recede: float = 0.0  # depth of the bare temples
    crown: float | None = None  # nothing grows above this height
    lift: float = 0.0  # extra thickness over the forehead
    flare: float = 0.0  # how much the ends stand out (+) or turn in (-)


STYLES = {
    "horseshoe": Style(top=0.03, side=0.07, crown=0.42),
    "buzz": Style(top=0.025, side=0.015, recede=0.05),
    "receding": Style(top=0.07, side=0.05, front=0.1, recede=0.22),
    "short": Style(top=0.13, side=0.06),
    "side_part": Style(top=0.17, side=0.07, lift=0.03),
    "quiff": Style(top=0.18, side=0.045, lift=0.14),
    "fringe": Style(top=0.15, side=0.11, fringe=0.36, end=-0.65),
    "curly": Style(top=0.24, side=0.19, curl=0.055, locks=26, end=-0.6),
    "afro": Style(top=0.46, side=0.42, curl=0.03, locks=44, end=-0.5),
    "bob": Style(top=0.14, side=0.15, end=-1.05, opening=1.12, flare=-0.03),
    "long": Style(top=0.12, side=0.12, end=-2.1, opening=1.14, flare=0.04),
    "wavy": Style(top=0.16, side=0.2, end=-1.9, opening=1.1, curl=0.05, locks=16, flare=0.12),
    "top_bun": Style(top=0.07, side=0.04, end=-0.5),
}


def hair_surfaces(i: Identity, g: HeadGrid, size: int) -> list[Surface]:
    """The hair of one person, in head space."""
    if i.hair_style == "bald":
        return []
    style = STYLES[i.hair_style]
    rng = np.random.default_rng([i.texture_seed, 3])
    k = size / 128
    hanging = style.end < -0.8
    end = 0.1 + (style.end - 0.1) * (0.75 + 0.25 * i.hair_length) if hanging else style.end

    # Rows: the head's own sections down to the widest, then (long hair) straight down
    profile = g.profile
    widest = int(np.argmax(profile.width))
    dense = {name: getattr(profile, name) for name in ("y", "width", "front", "back", "centre")}
    if hanging:
        n = 300
        down = np.linspace(0, 1, n)[1:]
        y_end = end - 0.15
        dense = {name: np.concatenate([v[:widest], np.full(n - 1, v[widest])]) for name, v in dense.items()}
        dense["y"][widest:] = profile.y[widest] + down * (y_end - profile.y[widest])
        taper = 1 - 0.06 * smoothstep(0.15, 0.6, down)
        dense["width"][widest:] *= taper
        dense["back"][widest:] *= taper * (1 - 0.15 * smoothstep(0.1, 0.7, down))
    else:
        cut = int(np.searchsorted(-profile.y, 0.8))
        dense = {name: v[:cut] for name, v in dense.items()}
    length = np.concatenate([[0], np.cumsum(np.hypot(np.diff(dense["y"]), np.diff(dense["width"])))])
    n_rows, n_columns = int(max(70, 63 * length[-1]) * k), int(300 * k)
    rows = np.linspace(0, length[-1], n_rows)
    y, width, front, back, centre = (
        np.interp(rows, length, dense[name]).astype(F)[:, None] for name in ("y", "width", "front", "back", "centre")
    )
    phi = np.linspace(-np.pi, np.pi, n_columns).astype(F)[None]
    aphi = np.abs(phi)
    r = radius(width, front, back, centre, phi, profile.squareness)

    # Where each strand ends: hairline, sideburn, round the ear, nape
    top = float(i.hairline) + style.front
    jitter = noise(rng, 1, n_columns, 1, 90)[0] * 0.02 + noise(rng, 1, n_columns, 1, 30)[0] * 0.015
    sideburn = -0.05 - (0.3 if i.facial_hair == "beard" else 0.22 * i.masculinity)
    line = np.interp(
        aphi[0],
        [0, 0.25, 0.55, 0.85, 1.02, 1.2, 1.38, 1.5, 1.85, 2.1, np.pi],
        [
            top - 0.05 * i.widows_peak,
            top,
            top + style.recede * 1.2,
            top - 0.13 + style.recede,
            top - 0.36,
            sideburn,
            sideburn + 0.02,
            0.2,
            0.15,
            min(style.end, -0.3),
            min(style.end, -0.3),
        ],
    )
    if style.fringe is not None:
        soft = 0.05 * i.hair_curl * np.cos(phi[0] * 2 + 3 * i.hair_part)
        line = np.where(aphi[0] < 0.95, np.minimum(line, style.fringe - 0.06 * (1 - i.hair_length) + soft), line)
        line = np.where((aphi[0] >= 0.95) & (aphi[0] < 1.2), np.minimum(line, 0.0), line)
    if hanging:
        opening = style.opening + 0.06 * (i.hair_volume - 1)
        line = np.where(aphi[0] > opening, end + 3 * jitter, line)
    line = (line + jitter).astype(F)[None]

    # Thickness: thin at the line (unless it hangs over), fuller above; parted hair is swept to one side
    above = np.clip((y - line) / F(0.3), 0, 1)
    height = smoothstep(0.2, 1.0, y)
    volume = F(i.hair_volume)
    thickness = (style.side + (style.top - style.side) * height) * volume
    away = smoothstep(0.1, 0.5, rows.astype(F))[
        :, None
    ]  # all columns meet at the crown, so nothing may depend on them there
    part = away * bump(phi, i.hair_part, 0.10) * smoothstep(0.35, 0.9, y) * (phi * np.sign(i.hair_part) > -0.6)
    if i.hair_style in ("side_part", "bob", "long", "wavy", "quiff"):
        side = np.tanh((phi - F(i.hair_part)) * F(-4 * np.sign(i.hair_part)))
        thickness = thickness * (1 + 0.22 * side * away * height * smoothstep(2.2, 1.2, aphi)) - 0.05 * part
    thickness = thickness + style.lift * volume * bump(phi, 0, 0.6) * bump(y, top + 0.1, 0.2)
    root = F(0.12) if style.fringe is None else F(0.75)
    if not hanging:
        thickness = thickness * (root + (1 - root) * np.sqrt(above))
    else:
        thickness = thickness * np.where(aphi < style.opening, F(0.12) + F(0.88) * np.sqrt(above), 1)
        thickness = thickness + style.flare * smoothstep(-0.2, end, y)

    # Strands: streaks along the rows, sheared by the sweep; locks for curls
    shear = phi * n_columns / (2 * np.pi)
    sweep = 0.25 * np.sign(i.hair_part) * n_columns / (2 * np.pi) * np.clip(rows / 1.2, 0, 1)[:, None]
    wave = 0.0
    if style.curl and i.hair_style == "wavy":
        wave = (
            n_columns
            / (2 * np.pi)
            * 0.09
            * np.sin(rows[:, None] * (5 + 3 * i.hair_curl) + 1.5 * noise(rng, 1, n_columns, 1, 14))
        )
    index = np.mod(shear + n_columns / 2 + sweep + wave, n_columns - 1)
    fine, coarse, slow = (noise(rng, 1, n_columns, 1, int(c))[0] for c in (n_columns / 1.6, n_columns / 5, 14))
    whole = index.astype(np.int32)
    streaks = 0.45 * fine[whole] + 0.6 * coarse[whole] + 0.3 * slow[whole]
    streaks = streaks + 0.25 * noise(rng, n_rows, n_columns, 14, n_columns // 4)
    locks = np.zeros((n_rows, n_columns), F)
    if style.curl:
        n_locks = int(style.locks * (0.75 + 0.5 * i.hair_curl))
        locks = noise(rng, n_rows, n_columns, max(int(n_locks * length[-1] / 5.5), 4), n_locks)
        locks = np.tanh(locks)
        thickness = thickness + style.curl * volume * locks * away * np.clip(above * 3, 0.2, 1)
    thickness = thickness + 0.003 * np.clip(streaks, -2, 2)

    # Offset along the normal of the section profile, so that the crown rises and the sides widen
    d_width, d_y = np.gradient(width[:, 0]), np.gradient(y[:, 0])
    norm = np.hypot(d_width, d_y) + 1e-9
    out, up = (-d_y / norm).astype(F)[:, None], (d_width / norm).astype(F)[:, None]
    if hanging:
        out[y < 0.1], up[y < 0.1] = 1, 0
    points = np.stack(
        [
            (r + thickness * out) * np.sin(phi),
            y + thickness * up,
            centre + (r + thickness * out) * np.cos(phi),
        ]
    ).astype(F)
    normals = grid_normals(points)
    tangents = np.empty_like(points)
    tangents[:, :-1] = points[:, 1:] - points[:, :-1]
    tangents[:, -1] = tangents[:, -2]
    tangents *= 1 / (np.sqrt((tangents**2).sum(0)) + F(1e-9))

    # Ragged ends: a point lives when it is above the line, with a dithered edge
    edge = (0.06 if not hanging else 0.09) * rng.random((n_rows, n_columns), dtype=F)
    alive = y - line > edge - 0.01 * streaks
    if style.crown is not None:
        bald = (
            style.crown
            - 0.12 * smoothstep(1.0, 2.6, aphi)
            + 0.3 * rng.random((n_rows, n_columns), dtype=F) * i.hair_volume * 0.3
        )
        alive &= (y < bald) & (aphi > 1.0)
    if i.hair_style == "buzz":
        alive &= rng.random((n_rows, n_columns)) < 0.75
    shade = 1 + 0.16 * np.clip(streaks, -2.2, 2.2) + 0.3 * locks - 0.35 * part
    shade = shade * (0.72 + 0.28 * np.clip(above * 1.5, 0, 1))
    albedo = _hair_albedo(i, shade, rng)
    # Only hair that stands off the head can be seen from inside
    free = (y < 0.7) & alive
    surfaces = [
        _surface(points, normals, tangents, albedo, np.flatnonzero(alive & ~free), i),
        _surface(points, normals, tangents, albedo, np.flatnonzero(free), i, two_sided=True),
    ]
    if i.hair_style == "top_bun":
        surfaces.append(_bun(i, g, k, rng))
    return surfaces


def _hair_albedo(i: Identity, shade: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    base = linear(i.hair_colour)
    albedo = base[:, None, None] * np.clip(shade, 0.25, 2)[None]
    if 0.1 < i.hair_grey < 0.95:  # salt among the pepper
        white = (rng.random(shade.shape[1]) < 0.3 * i.hair_grey).astype(F) * 0.12
        albedo = albedo + white[None, None, :]
    return albedo.astype(F)


def _surface(points, normals, tangents, albedo, keep, i: Identity, two_sided: bool = False) -> Surface:
    n = keep.size
    shine = 0.10 + 0.25 * float(np.mean(i.hair_colour))
    return Surface(
        points.reshape(3, -1)[:, keep],
        normals.reshape(3, -1)[:, keep],
        albedo.reshape(3, -1)[:, keep],
        np.full(n, shine, F),
        np.full(n, 28.0, F),
        two_sided=two_sided,
        tangents=tangents.reshape(3, -1)[:, keep],
    )


def _bun(i: Identity, g: HeadGrid, k: float, rng: np.random.Generator) -> Surface:
    """A knot of hair on the top of the head."""
    u = np.linspace(0.02, np.pi - 0.02, int(60 * k)).astype(F)[:, None]
    v = np.linspace(-np.pi, np.pi, int(90 * k)).astype(F)[None]
    size = 0.3 + 0.1 * i.hair_length
    strands = noise(rng, u.size, v.size, int(30 * k), 7)
    r = size * (1 + 0.03 * strands)
    crown = float(g.profile.y.max())
    points = np.stack(
        [r * np.sin(u) * np.sin(v), crown + 0.55 * size + 0.85 * r * np.cos(u), -0.25 + r * np.sin(u) * np.cos(v)]
    ).astype(F)
    normals = grid_normals(points)
    tangents = np.empty_like(points)
    tangents[:, :, :-1] = points[:, :, 1:] - points[:, :, :-1]
    tangents[:, :, -1] = tangents[:, :, -2]
    tangents *= 1 / (np.sqrt((tangents**2).sum(0)) + F(1e-9))
    albedo = _hair_albedo(i, 1 + 0.2 * np.clip(strands, -2, 2), rng)
    return _surface(points, normals, tangents, albedo, np.arange(u.size * v.size), i)
