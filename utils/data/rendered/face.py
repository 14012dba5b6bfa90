"""The face itself: skin painted once a person; eyes, brows and mouth anew for each expression.

Features live in the plane (x0, y) of the head grid; see `geometry.HeadGrid`. Albedo is linear RGB. (R, C) are the rows
and columns of the grid.
"""

import numpy as np

from utils.data.rendered.eyes import Brow, Eye
from utils.data.rendered.geometry import (
    F,
    HeadGrid,
    Surface,
    blend,
    bump,
    ear,
    face_displacement,
    grid_normals,
    linear,
    noise,
    nose_base,
    nose_tip,
    smoothstep,
)
from utils.data.rendered.identity import Identity, Nuisance
from utils.data.rendered.mouth import Mouth

_BLOOD = np.array([0.62, 0.16, 0.13], F)[:, None, None]  # what shines through thin skin


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
        self.eyes = [Eye(i, g, side, self.points, self.albedo) for side in (-1, 1)]
        strands = noise(self.rng, *g.shape, g.shape[0] // 5, g.shape[1] // 2)
        self.brows = [Brow(i, g, side, strands) for side in (-1, 1)]
        self.mouth = Mouth(i, g)
        tip = nose_tip(i)
        self.nose_box = g.box(0.0, 0.06, tip - 0.05, tip + 0.05)
        # What an expression moves, and where normals have to be found again
        self.mobile = g.box(0.0, 0.8, -9.0, 0.6)
        x, y = g.x0[self.mobile], g.y[self.mobile[0]]
        ax, front = np.abs(x), g.face[self.mobile]
        # The jaw falls sharply between the lips and gently beside them
        lips = np.clip(1 - (ax / F(i.mouth_width)) ** 2, 0, 1)
        sharp = smoothstep(i.mouth_height + 0.02, i.mouth_height - 0.17, y)
        gentle = smoothstep(i.mouth_height + 0.25, i.mouth_height - 0.4, y)
        jaw = gentle + lips * (sharp - gentle)
        self.jaw = (jaw * smoothstep(0.3, 0.8, g.cos[:, self.mobile[1]])).astype(F)
        fold = F(0.33) - (y + F(0.6)) * F(0.5)
        cheeks = F(0.045) * bump(ax, 0.44, 0.13) * bump(y, -0.40, 0.13)
        cheeks = cheeks - F(0.025) * bump(ax, fold, 0.035) * bump(y, -0.64, 0.12)
        self.cheeks = (cheeks * front).astype(F)
        self.normals = grid_normals(self.points)
        covered = i.hair_style not in ("bald", "horseshoe", "buzz", "receding")
        hidden = (g.y > i.hairline + 0.22) & covered
        self.live = np.ascontiguousarray(np.broadcast_to(~hidden, g.shape)).ravel()
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
        hole_x, hole_y = (ax - F(0.068 * i.nose_width)) / F(0.034), (y - F(base + 0.012)) / F(0.017 + 0.008 * i.nostril)
        albedo *= 1 - F(0.7) * np.clip(F(1.25) * np.exp(-(hole_x**2) - (hole_y - F(0.35) * hole_x) ** 2), 0, 1) * g.face
        alar_x, alar_y = (ax - F(0.125 * i.nose_width + 0.062)) / F(0.02), (y - F(base + 0.05)) / F(0.05)
        albedo *= 1 - F(0.2) * np.exp(-(alar_x**2) - alar_y**2) * g.face
        # Folds darken with age, on top of what the relief does
        fold = ax - np.interp(y, [-1.0, -0.85, -0.5], [0.42, 0.385, 0.2]).astype(F)
        along = smoothstep(-1.0, -0.8, y) * smoothstep(-0.45, -0.55, y) * g.face
        albedo *= 1 - (0.05 + 0.16 * i.wrinkles) * bump(fold, 0, 0.022) * along

        specular = 0.16 + 0.2 * i.shine * (
            bump(x, 0, 0.35) * bump(y, 0.5, 0.25) + bump(x, 0, 0.07) * bump(y, -0.3, 0.25)
        )
        specular = specular + 0.12 * i.shine * bump(ax, 0.5, 0.14) * bump(y, -0.25, 0.13)
        beard = self._beard(albedo, specular)
        if i.hair_style != "bald":
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
        blend(albedo, linear(i.hair_colour) * 0.8, strength * smoothstep(0.05, 0.16, from_line))

    def _beard(self, albedo: np.ndarray, specular: np.ndarray) -> np.ndarray:
        """Paints facial hair into the albedo; returns its thickness (R, C)."""
        i, g, rng = self.identity, self.grid, self.rng
        thickness = np.zeros(g.shape, F)
        if i.facial_hair == "none":
            return thickness
        y, ax = g.y, np.abs(g.x0)
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
            blend(albedo, colour * 0.7 + 0.12 * linear(i.skin), cover * 0.85)
            return thickness
        cover = np.clip(mask * soul * (1.0 + 0.25 * strands) * (0.55 + 0.5 * i.facial_hair_density), 0, 1)
        shade = np.clip(1 + 0.3 * strands, 0.3, 2)
        blend(albedo, colour[:, None, None] * shade[None], cover)
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
        points, albedo, specular = self.points.copy(), self.albedo.copy(), self.specular.copy()
        gloss = np.full(self.grid.shape, 13.0, F)
        part = (slice(None), *self.mobile)
        if nuisance.mouth_open:
            points[1][self.mobile] -= F(self.mouth.drop(nuisance)) * self.jaw
        if nuisance.smile > 0:
            points[2][self.mobile] += F(nuisance.smile) * self.cheeks
        corner_x, corner_y = self.mouth.shape(nuisance, points, albedo, specular, gloss)
        masks = [eye.open(nuisance, points, albedo, specular, gloss) for eye in self.eyes]
        for brow in self.brows:
            brow.raise_(nuisance, points, albedo)
        normals = self.normals.copy()
        normals[part] = grid_normals(points[part])
        landmarks = {
            "nose": self.nearest(points, 0.0, nose_tip(self.identity), self.nose_box),
            "mouth_left": self.nearest(points, -corner_x, corner_y, self.mouth.box),
            "mouth_right": self.nearest(points, corner_x, corner_y, self.mouth.box),
        }
        for eye, mask, name in zip(self.eyes, masks, ("eye_left", "eye_right"), strict=True):
            box = (slice(None), *eye.box)
            normals[box] += mask * (eye.normal - normals[box])
            landmarks[name] = points[box][(slice(None), *eye.centre)].astype(np.float64)
        surface = Surface(
            points.reshape(3, -1),
            normals.reshape(3, -1),
            albedo.reshape(3, -1),
            specular.ravel(),
            gloss.ravel(),
            scatter=1.0,
            live=self.live,
        )
        return surface, landmarks

    def nearest(self, points: np.ndarray, x: float, y: float, box: tuple[slice, slice] | None = None) -> np.ndarray:
        """The surface point nearest to (x, y) in the plane of features, of those in `box`."""
        box = box or self.grid.box(x, 0.06, y - 0.08, y + 0.08)
        distance = np.abs(self.grid.x0[box] - F(x)) + np.abs(points[1][box] - F(y))
        row, column = np.unravel_index(int(np.argmin(distance)), distance.shape)
        return points[:, box[0].start + row, box[1].start + column].astype(np.float64)
