"""The face itself: skin painted once a person, eyes, brows and mouth shaped and painted anew for each expression.

Features live in the plane (x0, y) of the head grid; see `geometry.HeadGrid`. Albedo is linear RGB. (R, C) are the rows and columns of the grid.
"""

import numpy as np

from utils.data.rendered.geometry import (
    F,
    HeadGrid,
    Surface,
    bump,
    ear,
    face_displacement,
    grid_normals,
    linear,
    noise,
    nose_base,
    smoothstep,
)
from utils.data.rendered.identity import Identity, Nuisance

_BLOOD = np.array([0.62, 0.16, 0.13], F)[:, None, None]  # what shines through thin skin


def _blend(albedo: np.ndarray, colour: np.ndarray, mask: np.ndarray) -> None:
    """albedo (3, ...) moves to colour (3,) or (3, ...) by mask (...), in place."""
    colour = np.asarray(colour, F)
    if colour.ndim == 1:
        colour = colour[:, None, None]
    albedo += mask[None] * (colour - albedo)


def _band(v: np.ndarray, low: np.ndarray, high: np.ndarray, soft: float) -> np.ndarray:
    """1 where low < v < high, with edges `soft` wide."""
    k = F(1 / soft)
    return np.clip((v - low) * k + F(0.5), 0, 1) * np.clip((high - v) * k + F(0.5), 0, 1)


class Face:
    """Head and ears of one person in head space; `express` gives them an expression."""

    def __init__(self, identity: Identity, size: int):
        self.identity = i = identity
        self.grid = g = HeadGrid(identity, size)
        self.rng = np.random.default_rng([i.texture_seed, 1])
        self.displacement = face_displacement(i, g)
        self.albedo, self.specular, beard = self._skin()
        self.displacement = self.displacement + beard
        self.points = g.points(self.displacement)
        self.eye_patch = g.patch(0.72, i.eye_height - 0.28, 0.6)
        self.mouth_patch = g.patch(0.62, i.mouth_height - 0.45, i.mouth_height + 0.26)
        brow = noise(self.rng, g.shape[0], g.shape[1], g.shape[0] // 5, g.shape[1] // 2)
        self.brow_strands = brow[self.eye_patch]
        self.lip_lines = noise(self.rng, 1, g.shape[1], 1, g.shape[1] // 3)[:, self.mouth_patch[1]]
        self.iris_spokes = self.rng.uniform(0.2, 0.5, 3), self.rng.uniform(0, 6.3, 3)
        self.ears = [self._ear(side, size) for side in (-1, 1)]

    def _skin(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Albedo (3, R, C), specular strength (R, C) and beard thickness (R, C) of the resting face."""
        i, g, rng = self.identity, self.grid, self.rng
        x, y, ax = g.x0, g.y, np.abs(g.x0)
        rows, columns = g.shape
        skin = linear(i.skin)
        albedo = np.broadcast_to(skin[:, None, None], (3, rows, columns)).copy()
        blotches = 0.035 * noise(rng, rows, columns, 16, 18) + 0.025 * noise(rng, rows, columns, 60, 60)
        albedo *= 1 + blotches
        # Blood: cheeks, nose, ears of fair skin more than of dark
        flush = (0.13 + 0.08 * i.redness) * (1 - 0.7 * i.melanin)
        blush = bump(ax, 0.47, 0.17) * bump(y, -0.36, 0.16) + 0.8 * bump(x, 0, 0.11) * bump(
            y, nose_base(i) + 0.06, 0.08
        )
        blush = (blush + 0.5 * bump(x, 0, 0.13) * bump(y, -1.13, 0.08)) * g.face
        albedo += np.clip(flush * blush, 0, 0.4) * (_BLOOD * albedo.mean(0) * 1.9 - albedo)
        # Sockets, bags under the eyes, darker lids
        socket = bump(ax, i.eye_spacing - 0.02, 0.16) * bump(y, i.eye_height - 0.02, 0.12) * g.face
        albedo *= 1 - (0.08 + 0.2 * i.eye_shadow) * socket * np.array([0.75, 1.0, 0.9], F)[:, None, None]
        # Freckles: many small spots over nose and cheeks
        if i.freckles > 0.05:
            spots = noise(rng, rows, columns, int(rows / 2.2), int(columns / 2.2))
            where = bump(ax, 0.3, 0.3) * bump(y, -0.28, 0.26) * g.face
            mask = smoothstep(1.35 - 0.4 * i.freckles, 2.1, spots) * where * min(i.freckles, 1.0) * 0.75
            albedo *= 1 - mask * np.array([0.45, 0.62, 0.72], F)[:, None, None]
        for mole_x, mole_y, mole_r in i.moles:
            spot = np.exp(-((x - mole_x) ** 2 + (y - mole_y) ** 2) / F(2 * (0.6 * mole_r) ** 2)) * g.face
            albedo *= 1 - np.clip(1.3 * spot, 0, 0.85) * np.array([0.75, 0.85, 0.9], F)[:, None, None]
        if i.age > 0.6:  # age spots
            spots = smoothstep(1.5, 2.4, noise(rng, rows, columns, 34, 34)) * (i.age - 0.6)
            albedo *= 1 - spots * np.array([0.4, 0.55, 0.65], F)[:, None, None]
        # Nostrils, seen from the front and from below
        base = nose_base(i)
        hole = np.exp(
            -(((ax - F(0.078 * i.nose_width)) / 0.04) ** 2) - ((y - F(base - 0.002)) / (0.018 + 0.012 * i.nostril)) ** 2
        )
        albedo *= 1 - 0.82 * np.clip(1.35 * hole, 0, 1) * g.face
        alar = np.exp(-(((ax - F(0.185 * i.nose_width)) / 0.018) ** 2) - ((y - F(base + 0.05)) / 0.05) ** 2)
        albedo *= 1 - 0.22 * alar * g.face
        # Folds darken with age, on top of what the relief does
        fold = ax - np.interp(y, [-1.0, -0.85, -0.5], [0.42, 0.385, 0.2]).astype(F)
        along = smoothstep(-1.0, -0.8, y) * smoothstep(-0.45, -0.55, y) * g.face
        albedo *= 1 - (0.05 + 0.16 * i.wrinkles) * bump(fold, 0, 0.022) * along

        specular = 0.16 + 0.2 * i.shine * (
            bump(x, 0, 0.35) * bump(y, 0.5, 0.25) + bump(x, 0, 0.07) * bump(y, -0.3, 0.25)
        )
        specular = specular + 0.12 * i.shine * bump(ax, 0.5, 0.14) * bump(y, -0.25, 0.13)
        beard = self._beard(albedo, specular)
        if i.hair_style in ("buzz", "horseshoe", "receding", "top_bun") or i.hair_style not in ("bald",):
            self._scalp(albedo)
        return albedo.astype(F), (specular * np.ones_like(x)).astype(F), beard

    def _scalp(self, albedo: np.ndarray) -> None:
        """Roots: the scalp under the hair takes its colour, so that no skin shines through."""
        i, g = self.identity, self.grid
        from_line = g.y - np.interp(
            np.abs(g.phi),
            [0, 0.5, 0.9, 1.1, 1.3, 1.6, 2.4],
            np.array([0, 0.02, -0.06, -0.4, -0.8, -0.7, -1.2]) + i.hairline,
        )
        strength = {"horseshoe": 0.0, "receding": 0.0, "buzz": 0.75}.get(i.hair_style, 0.9)
        _blend(albedo, linear(i.hair_colour) * 0.8, strength * smoothstep(0.05, 0.16, from_line))

    def _beard(self, albedo: np.ndarray, specular: np.ndarray) -> np.ndarray:
        """Paints facial hair into the albedo; returns its thickness (R, C)."""
        i, g, rng = self.identity, self.grid, self.rng
        thickness = np.zeros(g.shape, F)
        if i.facial_hair == "none":
            return thickness
        x, y, ax = g.x0, g.y, np.abs(g.x0)
        mouth = i.mouth_height
        cheek = np.interp(ax, [0, 0.2, 0.42, 0.62, 0.8], [mouth + 0.1, mouth + 0.06, mouth - 0.06, mouth + 0.3, -0.1])
        jaw = smoothstep(0.03, -0.05, y - cheek) * smoothstep(-0.25, 0.15, g.cos)
        jaw = jaw * (1 - 0.8 * bump(ax, i.mouth_width + 0.06, 0.05) * bump(y, mouth - 0.02, 0.06))
        lip = mouth + 0.05 + 0.8 * i.upper_lip
        moustache = (
            smoothstep(0.32, 0.24, ax)
            * smoothstep(lip - 0.03, lip, y + 0.35 * ax**1.5)
            * smoothstep(lip + 0.13, lip + 0.08, y + 0.5 * ax)
        )
        goatee = smoothstep(0.33, 0.25, ax + 0.15 * (y + 1.1)) * smoothstep(mouth + 0.02, mouth - 0.06, y) * g.face
        goatee = goatee * (1 - bump(ax, 0.2, 0.05) * bump(y, mouth - 0.15, 0.07))
        mask = {
            "stubble": np.maximum(jaw, moustache),
            "moustache": moustache,
            "goatee": np.maximum(goatee, moustache),
            "beard": np.maximum(jaw, moustache),
        }[i.facial_hair]
        rows, columns = g.shape
        strands = noise(rng, rows, columns, rows // 4, int(columns / 1.8))
        soul = 1 - 0.5 * bump(ax, 0.13, 0.06) * bump(y, mouth - 0.16, 0.04)
        colour = linear(i.hair_colour) * 0.85
        if i.facial_hair == "stubble":
            dots = noise(rng, rows, columns, rows // 2, columns // 2)
            cover = mask * soul * i.facial_hair_density * np.clip(0.5 + 0.18 * dots, 0, 1)
            _blend(albedo, colour * 0.7 + 0.12 * linear(i.skin), cover * 0.85)
            return thickness
        cover = np.clip(mask * soul * (1.0 + 0.25 * strands) * (0.55 + 0.5 * i.facial_hair_density), 0, 1)
        shade = np.clip(1 + 0.3 * strands, 0.3, 2)
        _blend(albedo, colour[:, None, None] * shade[None], cover)
        specular *= 1 - 0.6 * cover
        length = 0.025 + 0.07 * i.facial_hair_length * (i.facial_hair == "beard") * smoothstep(mouth + 0.1, -1.1, y)
        return (mask * length * (1 + 0.22 * np.clip(strands, -2, 2)) * g.face).astype(F)

    def _ear(self, side: int, size: int) -> Surface:
        points, bowl = ear(self.identity, self.grid, side, size)
        albedo = np.broadcast_to(linear(self.identity.skin)[:, None, None], points.shape).copy()
        albedo += 0.12 * (1 - 0.6 * self.identity.melanin) * (_BLOOD * albedo.mean(0) * 1.9 - albedo)
        albedo *= 1 - 0.55 * bowl
        n = points[0].size
        normals = grid_normals(points)
        return Surface(
            points.reshape(3, -1),
            normals.reshape(3, -1),
            albedo.reshape(3, -1).astype(F),
            np.full(n, 0.15, F),
            np.full(n, 14.0, F),
            scatter=1.0,
            two_sided=True,
        )

    def express(self, nuisance: Nuisance) -> tuple[Surface, dict[str, np.ndarray]]:
        """The head with the expression and gaze of one photograph => surface and 3-D landmarks (3,) in head space."""
        g = self.grid
        points, albedo = self.points.copy(), self.albedo.copy()
        specular = self.specular.copy()
        gloss = np.full(g.shape, 13.0, F)
        drop = 0.15 * nuisance.mouth_open
        mouth = self.identity.mouth_height
        if drop:
            points[1] -= drop * smoothstep(mouth + 0.01, mouth - 0.07, g.y) * smoothstep(-0.1, 0.5, g.cos)
        smile = nuisance.smile
        if smile:
            ax = np.abs(g.x0)
            cheek = 0.045 * bump(ax, 0.44, 0.13) * bump(g.y, -0.40, 0.13) - 0.03 * bump(
                ax - 0.33, 0.11 * (-0.6 - g.y) / 0.2, 0.03
            ) * bump(g.y, -0.66, 0.14)
            points[2] += max(smile, 0) * cheek * g.face
        landmarks = self._mouth(nuisance, points, albedo, specular, gloss)
        eye_normals = self._eyes(nuisance, points, albedo, specular, gloss, landmarks)
        normals = grid_normals(points)
        mask, eyeball = eye_normals
        patch = (slice(None), *self.eye_patch)
        normals[patch] += mask * (eyeball - normals[patch])
        nose = nose_base(self.identity) + 0.085 + 0.03 * self.identity.nose_turn
        landmarks["nose"] = self._nearest(points, 0.0, nose)
        return (
            Surface(
                points.reshape(3, -1),
                normals.reshape(3, -1),
                albedo.reshape(3, -1),
                specular.ravel(),
                gloss.ravel(),
                scatter=1.0,
            ),
            landmarks,
        )

    def _nearest(self, points: np.ndarray, x: float, y: float) -> np.ndarray:
        """The surface point of the face nearest to (x, y) in the plane of features."""
        column = int(np.argmin(np.abs(self.grid.x0[self.grid.shape[0] // 2] - x)))
        columns = slice(max(column - 14, 0), column + 15)
        distance = (
            (self.grid.x0[:, columns] - x) ** 2 + (points[1, :, columns] - y) ** 2 + (self.grid.face[:, columns] < 0.5)
        )
        row, offset = np.unravel_index(int(np.argmin(distance)), distance.shape)
        return points[:, row, columns.start + offset].astype(np.float64)

    def _mouth(self, n: Nuisance, points, albedo, specular, gloss) -> dict[str, np.ndarray]:
        i, g = self.identity, self.grid
        patch = self.mouth_patch
        part = (slice(None), *patch)
        x, y = g.x0[patch], points[1][patch]
        smile = n.smile
        half = i.mouth_width * (1 + 0.17 * max(smile, 0) - 0.1 * n.mouth_open)
        s = np.abs(x) * F(1 / half)
        s2 = np.clip(s * s, 0, 1)
        curve = 0.075 * smile + 0.02 * i.mouth_curve
        line = (
            i.mouth_height
            + curve * (np.minimum(s * s, 1.5) - F(0.3))
            + F(0.008) * bump(x, 0, 0.05)
            - F(0.006) * bump(np.abs(x), 0.1, 0.05)
        )
        gape = 0.16 * n.mouth_open + 0.06 * max(smile - 0.45, 0)
        gap = gape * (1 - s2) ** F(0.6)
        top, bottom = line + F(0.12) * gap, line - F(0.88) * gap
        fall = (1 - s2) ** F(0.65)
        peak = 1 + F(0.25) * bump(np.abs(x), 0.075, 0.05) - F(0.4 * i.cupid) * bump(x, 0, 0.032)
        upper = F(i.upper_lip * (1 - 0.15 * max(smile, 0))) * fall * peak
        lower = F(i.lower_lip * (1 - 0.1 * max(smile, 0))) * (1 - s2) ** F(0.55)
        inside = np.clip((1 - s) * F(30) + F(0.5), 0, 1)
        upper_mask = _band(y, top, top + upper, 0.016) * inside
        lower_mask = _band(y, bottom - lower, bottom, 0.02) * inside
        # Relief: two rolls with a groove between them
        tu = np.clip((y - top) / np.maximum(upper, F(0.01)), 0, 1)
        tl = np.clip((bottom - y) / np.maximum(lower, F(0.01)), 0, 1)
        dz = F(0.042) * upper_mask * np.sin(np.pi * tu**0.7) + F(0.055) * lower_mask * np.sin(np.pi * tl**0.75)
        groove = bump(y, line, 0.014) * (s < 1.12) * np.clip((F(1.12) - s) * 8, 0, 1)
        dz -= F(0.022) * groove * (1 - np.clip(gap * 30, 0, 1))
        hole = _band(y, bottom, top, 0.012) * np.clip(gap * F(60), 0, 1) * inside
        dz -= F(0.10) * hole
        dz -= F(0.02) * bump(s, 1.1, 0.1) * bump(y, line, 0.04)  # dimples at the corners
        points[2][patch] += dz
        # Colour
        lips = linear(i.lip_colour)
        shade = (
            (1 + F(0.1) * self.lip_lines)
            * (1 - F(0.22) * (1 - tu) * upper_mask)
            * (1 - F(0.14) * (1 - tl) * lower_mask)
        )
        colours = albedo[part]
        _blend(colours, lips[:, None, None] * shade[None] * F(0.92), upper_mask * F(0.88))
        _blend(colours, lips[:, None, None] * shade[None], lower_mask * F(0.85))
        if gape > 0.004:
            teeth_top = np.clip((y - (top - F(0.075))) * F(40), 0, 1) * np.clip((F(0.82) - s) * F(6), 0, 1)
            gaps = 1 - F(0.22) * np.clip(np.abs(np.sin(x * F(38))) ** 12, 0, 1)
            teeth = (
                np.array([0.72, 0.68, 0.6], F)[:, None, None] * gaps * (F(0.5) + F(0.5) * np.clip((top - y) * 40, 0, 1))
            )
            cavity = np.array([0.06, 0.016, 0.016], F)[:, None, None] * np.ones_like(x)
            _blend(
                cavity,
                np.array([0.26, 0.08, 0.08], F),
                bump(x, 0, 0.13) * bump(y, bottom + F(0.01), 0.035) * F(min(gape * 7, 1)),
            )
            _blend(cavity, teeth, teeth_top)
            _blend(colours, cavity, hole)
        closed = groove * (1 - np.clip(gap * F(40), 0, 1)) * np.clip((F(1.05) - s) * 10, 0, 1)
        colours *= 1 - F(0.62) * closed * np.array([0.9, 1, 1], F)[:, None, None]
        colours *= 1 - F(0.18) * bump(s, 1.06, 0.07) * bump(y, line, 0.025)
        wet = np.maximum(upper_mask * F(0.6), lower_mask)
        specular[patch] += wet * F(0.25) - hole * specular[patch] * F(0.5)
        gloss[patch] += wet * F(16)
        corner = i.mouth_height + curve * 0.7
        return {"mouth_left": self._nearest(points, -half, corner), "mouth_right": self._nearest(points, half, corner)}

    def _eyes(self, n: Nuisance, points, albedo, specular, gloss, landmarks) -> tuple[np.ndarray, np.ndarray]:
        """Shapes and paints eyes and brows; returns mask (r, c) and normals (3, r, c) of the eyeballs on the eye patch."""
        i, g = self.identity, self.grid
        patch = self.eye_patch
        part = (slice(None), *patch)
        whole_x, whole_y = g.x0[patch], points[1][patch]
        colours = albedo[part]
        middle = whole_x.shape[1] // 2
        ball_mask = np.zeros(whole_x.shape, F)
        ball_normals = np.zeros((3, *whole_x.shape), F)
        closure = np.clip(n.eye_closure + 0.2 * max(n.smile, 0), 0, 0.9)
        for side, columns in ((-1, slice(0, middle)), (1, slice(middle, None))):
            view = (slice(None), columns)
            x, y = side * whole_x[view], whole_y[view]  # x grows towards the ear on both sides
            z = points[2][patch][view]
            spec, shine, paint = specular[patch][view], gloss[patch][view], colours[(slice(None), *view)]
            dx, dy = x - F(i.eye_spacing), y - F(i.eye_height)
            cos, sin = F(np.cos(i.eye_tilt)), F(np.sin(i.eye_tilt))
            w = i.eye_width
            u, v = (dx * cos + dy * sin) / F(w), (dy * cos - dx * sin) / F(w)
            # Lids: the upper one peaks towards the nose, the lower one towards the ear
            uu = np.clip(u, -1, 1)
            arch = 1 - uu * uu
            opening = i.eye_opening * (1 + 0.14 * max(n.brow_raise, 0))
            lower = F(-0.2 * (1 - 0.4 * closure) * i.eye_opening) * arch * (1 + F(0.25) * uu)
            upper_open = F(0.46 * opening) * arch ** F(0.75) * (1 - F(0.18) * uu)
            upper = lower + (upper_open - lower) * F(1 - closure)
            inside_u = np.clip((1 - np.abs(u)) * 12, 0, 1)
            soft = 0.07
            eye = _band(v, lower, upper, soft) * inside_u
            # Lids are a shell around the ball, which sits a little deeper between them
            rho2 = dx * dx + dy * dy
            row, column = np.unravel_index(int(np.argmin(rho2)), rho2.shape)
            depth = z[row, column] + F(0.055 - 0.02 * i.eye_depth)
            slope = F(-0.16)
            lid = depth + slope * dx - rho2 * F(1 / (2 * 0.19))
            reach = F(1.15 * w)
            weight = np.exp(-((rho2 / (reach * reach)) ** 2))
            shell = z + weight * np.maximum(lid - z, 0)
            crease_v = upper_open + F(0.10 + 0.14 * i.eye_fold)
            crease = bump(v, crease_v, 0.06) * np.clip((F(1.15) - np.abs(u)) * 5, 0, 1)
            shell -= F(0.012 * i.eye_fold) * crease
            bag = bump(v, lower - F(0.42), 0.13) * np.clip((F(1.1) - np.abs(u)) * 4, 0, 1)
            shell += F(0.014 * i.eye_bags) * bag
            ball = depth - F(0.02) + slope * dx - rho2 * F(1 / (2 * 0.17))
            z += eye * (ball - shell) + (shell - z)
            ball_mask[view] = eye
            nx, ny = dx / F(0.17) - slope, dy / F(0.17)
            scale = 1 / np.sqrt(nx * nx + ny * ny + 1)
            ball_normals[0][view], ball_normals[1][view], ball_normals[2][view] = side * nx * scale, ny * scale, scale

            # Eyeball: sclera, iris with limbal ring and spokes, pupil; the upper lid shades it
            gx, gy = side * n.gaze_x * 0.07, n.gaze_y * 0.04 + 0.006 * i.eye_opening
            ix, iy = dx - F(gx), dy - F(gy)
            distance = np.sqrt(ix * ix + iy * iy) * F(1 / i.iris_radius)
            sclera = np.array([0.72, 0.68, 0.65], F)[:, None, None] * (1 - F(0.28) * np.clip(np.abs(u), 0, 1) ** 3)
            sclera = sclera * np.array([1, 0.93, 0.92], F)[:, None, None] ** (u * u)
            iris_colour = linear(i.iris)
            angle = np.arctan2(iy, ix)
            amplitude, phase = self.iris_spokes
            spokes = (
                1
                + F(0.2 * amplitude[0]) * np.sin(angle * 9 + F(phase[0]))
                + F(0.2 * amplitude[1]) * np.sin(angle * 17 + F(phase[1]))
            )
            ring = (
                (F(1.35) - F(0.75) * smoothstep(0.62, 1.0, distance))
                * spokes
                * (1 - F(0.25) * np.clip(iy / F(i.iris_radius), -1, 1))
            )
            ball_colour = sclera
            _blend(ball_colour, iris_colour[:, None, None] * ring[None], np.clip((F(1.04) - distance) * 7, 0, 1))
            _blend(ball_colour, np.array([0.008, 0.007, 0.007], F), np.clip((F(0.43) - distance) * 8, 0, 1))
            ball_colour *= 1 - F(0.6) * np.exp(-np.clip(upper - v, 0, 2) * F(1 / 0.16))
            # Pink corner by the nose
            _blend(ball_colour, np.array([0.45, 0.2, 0.18], F), np.clip((-u - F(0.86)) * 8, 0, 1) * F(0.8))
            paint *= 1 - F(0.3 + 0.12 * i.eye_fold) * crease * F(0.4 + 0.6 * i.eye_fold)
            paint *= 1 - F(0.22 * i.eye_bags) * bump(v, lower - F(0.62), 0.1) * np.clip((F(1.05) - np.abs(u)) * 4, 0, 1)
            rim = bump(v, lower, 0.06) * inside_u
            paint *= 1 - F(0.16) * rim
            _blend(paint, ball_colour, eye)
            # Lashes, thicker towards the ear; a thin line below
            thick = F(0.045 + 0.06 * i.lashes) * (1 + F(0.35) * uu)
            lash = np.exp(-(((v - upper) / thick) ** 2)) * np.clip((F(1.04) - np.abs(u)) * 10, 0, 1)
            flick = (
                np.exp(-(((v - (u - 1) * F(0.55)) / F(0.09)) ** 2))
                * np.clip((F(1.0 + 0.3 * i.lashes) - u) * 6, 0, 1)
                * (u > 0.95)
                * F(i.lashes)
            )
            under = (
                np.exp(-(((v - lower) / F(0.05)) ** 2))
                * np.clip((F(1.0) - np.abs(u)) * 8, 0, 1)
                * F(0.25 + 0.3 * i.lashes)
            )
            dark = linear(i.brow_colour) * 0.35
            _blend(paint, dark, np.clip(lash * F(0.72 + 0.28 * i.lashes) + flick * F(0.5), 0, 1))
            _blend(paint, dark, np.clip(under, 0, 1) * F(0.6))
            wet = eye * (1 - np.clip(lash, 0, 1))
            spec += wet * (F(1.1) - spec)
            shine += wet * (F(160) - shine)

            self._brow(n, x, y, paint, z, self.brow_strands[view])
            rest = np.argmin(rho2)
            row, column = np.unravel_index(int(rest), rho2.shape)
            name = "eye_left" if side < 0 else "eye_right"
            landmarks[name] = points[part][(slice(None), *view)][:, row, column].astype(np.float64)
        return ball_mask, ball_normals

    def _brow(self, n: Nuisance, x, y, paint, z, strands) -> None:
        i = self.identity
        raise_, frown = max(n.brow_raise, 0), max(-n.brow_raise, 0)
        start = i.brow_gap - 0.02 * frown
        t = (x - F(start)) * F(1 / (2 * i.brow_length - 0.16))
        tt = np.clip(t, 0, 1)
        centre = i.brow_height + 0.07 * raise_ - 0.015 * frown + (i.brow_tilt * 0.35) * (tt - F(0.3))
        centre = (
            centre
            + F(0.075 * i.brow_arch + 0.035) * (1 - ((tt - F(0.62)) / F(0.62)) ** 2)
            - F(0.05 * frown) * (1 - tt) ** 2
            - F(0.035)
        )
        thickness = F(i.brow_thickness) * (F(0.55) + F(0.45) * np.minimum(tt * 6, 1)) * (1 - F(0.72) * tt**2.2)
        across = (y - centre) / thickness
        mask = (
            np.clip((1 - np.abs(across)) * F(1.6), 0, 1)
            * np.clip((t + F(0.03)) * 14, 0, 1)
            * np.clip((1 - t) * 10, 0, 1)
        )
        hairs = np.clip(F(0.95) + F(0.22) * strands, 0, 1.2)
        cover = np.clip(mask * hairs * F(0.45 + 0.55 * i.brow_density), 0, 0.96)
        _blend(paint, linear(i.brow_colour) * 0.75, cover)
        z += F(0.012) * mask
