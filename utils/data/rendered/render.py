"""From an identity and a nuisance to pixels.

The surfaces of `face`, `hair` and `torso` are turned, projected and drawn far to near into index buffers of twice the
resolution, so that the nearest point wins at each sample; only the points that are seen are shaded: soft cast shadows
from a variance shadow map (Donnelly and Lauritzen 2006), wrapped diffuse light that reddens at the terminator as skin
does, Blinn-Phong highlights (Kajiya and Kay 1989 for hair), light from the sky, screen-space ambient occlusion. Then
the camera: exposure, blur and noise.

Legend: N points, M seen points, (H, W) pixels, S samples along a side of the index buffers.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from utils.data.rendered.face import Face
from utils.data.rendered.geometry import F, Surface, dot, glasses, linear, noise
from utils.data.rendered.hair import hair_surfaces
from utils.data.rendered.identity import Identity, Nuisance
from utils.data.rendered.torso import Torso

LANDMARKS = ("eye_left", "eye_right", "nose", "mouth_left", "mouth_right")
_SUPERSAMPLING = 2
_CAMERA = np.array([0.0, 0.0, 9.0], F)  # position of the camera, head units
_SCALE = 0.28  # one head unit, image widths
_CENTRE = (0.5, 0.50)  # where the pivot lands, image widths
_PIVOT = np.array([0.0, -0.25, -0.1], F)  # the head turns about this point
_NOWHERE = F(-1.7)  # depth where there is nothing


@dataclass
class Person:
    """Everything that does not change between the photographs of one person."""

    face: Face
    fine: list[Surface]  # ears and glasses
    coarse: list[Surface]  # hair
    torso: Torso


@dataclass
class _Cloud:
    """Points of several surfaces that may be seen, in camera space, and where they came from."""

    points: np.ndarray  # (3, N)
    sources: list[tuple[Surface, np.ndarray, np.ndarray]]  # surface, its rotation, indices of its points
    bounds: np.ndarray  # first point of each surface, and N


@lru_cache(maxsize=4)
def _person(identity: Identity, size: int) -> Person:
    face = Face(identity, size)
    fine = list(face.ears)
    if identity.glasses != "none":
        g = face.grid
        eye = face.nearest(face.points, identity.eye_spacing, identity.eye_height)
        temple = float(g.width[np.argmin(np.abs(g.y - 0.05)), 0])
        points, normals = glasses(identity, float(eye[2]) + 0.2, temple, size)
        colour = np.repeat(linear(identity.glasses_colour)[:, None], points.shape[1], 1)
        n = points.shape[1]
        fine.append(Surface(points, normals, colour, np.full(n, 0.7, F), np.full(n, 45.0, F)))
    return Person(face, fine, hair_surfaces(identity, face.grid, size), Torso(identity, size))


def rotation(yaw: float, pitch: float, roll: float) -> np.ndarray:
    """(3, 3) rotation: yaw about the vertical, then pitch (positive looks down), then roll."""
    cy, sy, cp, sp, cr, sr = np.cos(yaw), np.sin(yaw), np.cos(pitch), np.sin(pitch), np.cos(roll), np.sin(roll)
    about_y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    about_x = np.array([[1, 0, 0], [0, cp, -sp], [0, sp, cp]])
    about_z = np.array([[cr, -sr, 0], [sr, cr, 0], [0, 0, 1]])
    return (about_z @ about_x @ about_y).astype(F)


def _gather(surfaces: list[tuple[Surface, np.ndarray]]) -> _Cloud:
    """Turns surfaces to camera space and leaves out what faces away."""
    parts, sources = [], []
    for surface, turn in surfaces:
        kept = surface.live
        if not surface.two_sided:
            camera = turn.T @ (_CAMERA - _PIVOT) + _PIVOT
            facing = camera @ surface.normals - dot(surface.points, surface.normals)
            kept = np.flatnonzero(facing > F(-0.3) if kept is None else (facing > F(-0.3)) & kept)
        points = surface.points if kept is None else surface.points.take(kept, 1)
        parts.append(turn @ points + (_PIVOT - turn @ _PIVOT)[:, None])
        sources.append((surface, turn, kept))
    bounds = np.cumsum([0, *(p.shape[1] for p in parts)])
    return _Cloud(np.concatenate(parts, 1), sources, bounds)


def _draw(
    u: np.ndarray, v: np.ndarray, depth: np.ndarray, resolution: int, width: int
) -> tuple[np.ndarray, np.ndarray]:
    """The nearest point at each sample: index (S, S) int32, -1 where there is none, and its depth (S, S).

    u, v (N,) in samples; `depth` (N,) grows towards the viewer. Each point covers width x width samples.
    """
    half, stride = F((width - 1) / 2), resolution + width - 1
    column, row = np.floor(u - half).astype(np.int32), np.floor(v - half).astype(np.int32)
    seen = np.flatnonzero((column > -width) & (row > -width) & (column < resolution) & (row < resolution))
    index = np.full((stride, stride), -1, np.int32)
    nearest = np.full((stride, stride), _NOWHERE, F)
    if seen.size:
        near = depth[seen]
        low = near.min()
        key = ((near - low) * F(65535 / max(near.max() - low, 1e-6))).astype(np.uint16)
        seen = seen[np.argsort(key, kind="stable")].astype(np.int32)  # 16-bit keys: a radix sort
        # Far to near, at the first sample that each point covers: the last assignment stays
        cells = (row[seen] + (width - 1)) * stride + column[seen] + (width - 1)
        index.ravel()[cells] = seen
        nearest.ravel()[cells] = depth[seen]
    # Spread each over the samples it covers, first along columns, then along rows; the nearer stays
    for axis in (1, 0):
        best, which = None, None
        for k in range(width):
            part = (slice(None), slice(k, k + resolution)) if axis else (slice(k, k + resolution), slice(None))
            if best is None:
                best, which = nearest[part], index[part]
            else:
                closer = nearest[part] > best
                best, which = np.where(closer, nearest[part], best), np.where(closer, index[part], which)
        nearest, index = best, which
    return index, nearest


def _shadow(
    casters: list[tuple[Surface, np.ndarray]], points: np.ndarray, light: np.ndarray, n: Nuisance
) -> np.ndarray:
    """Share of the light that reaches `points` (3, M) in camera space => (M,) in [0, 1]; `light` points to the light.

    Chebyshev's bound on the share of nearer surface around each point, from blurred depth and squared depth.
    """
    up = np.array([0.0, 1.0, 0.0]) if abs(light[1]) < 0.9 else np.array([0.0, 0.0, 1.0])
    right = np.cross(up, light)
    right /= np.linalg.norm(right)
    frame = np.stack([right, np.cross(light, right), light]).astype(F)
    resolution = 100
    zoom, middle = F(resolution / 4.4), F(resolution / 2)
    local = [(frame @ turn) @ s.points[:, ::4] + (frame @ (_PIVOT - turn @ _PIVOT))[:, None] for s, turn in casters]
    local = np.concatenate(local, 1)
    _, depth = _draw(local[0] * zoom + middle, local[1] * zoom + middle, local[2], resolution, 2)
    blur = blur_matrix(resolution, round(0.9 * n.shadow_softness, 1))
    moments = np.stack([blur @ depth @ blur.T, blur @ (depth * depth) @ blur.T], -1).reshape(-1, 2)

    at = frame @ points
    u, v = np.clip(at[:2] * zoom + (middle - F(0.5)), 0, resolution - F(1.01))
    column, row = u.astype(np.int32), v.astype(np.int32)
    fu, fv = (u - column)[:, None], (v - row)[:, None]
    cell = row * resolution + column
    above = moments.take(cell, 0) * (1 - fu) + moments.take(cell + 1, 0) * fu
    below = moments.take(cell + resolution, 0) * (1 - fu) + moments.take(cell + resolution + 1, 0) * fu
    mean, square = (above + (below - above) * fv).T
    variance = np.maximum(square - mean * mean, F(0.002))
    behind = np.maximum(mean - at[2] - F(0.05), 0)
    share = variance / (variance + behind * behind)
    return np.clip((share - F(0.12)) * F(1 / 0.88), 0, 1)


def _occlusion(depth: np.ndarray, row: np.ndarray, column: np.ndarray, own: np.ndarray) -> np.ndarray:
    """Ambient light that crevices receive, (M,): depth (S, S) against its blurred self, at two widths."""
    step = 4
    small = np.maximum(depth[step // 2 :: step, step // 2 :: step], F(-0.9))
    n = small.shape[0]
    own = np.maximum(own, F(-0.9))
    cell = np.minimum(row // step, n - 1) * n + np.minimum(column // step, n - 1)
    result = np.ones(row.size, F)
    for width, gain in ((1.3, 1.9), (4.0, 0.55)):
        blur = blur_matrix(n, width * n / 64)
        blurred = (blur @ small @ blur.T).ravel()
        result *= 1 - np.clip((blurred.take(cell) - own - F(0.012)) * F(gain), 0, 0.62)
    return result


@lru_cache(maxsize=64)
def blur_matrix(n: int, deviation: float) -> np.ndarray:
    """(n, n) Gaussian blur; rows sum to one, so the border does not darken."""
    d = np.arange(n)[:, None] - np.arange(n)[None]
    weights = np.exp(-0.5 * (d / max(deviation, 1e-3)) ** 2)
    return (weights / weights.sum(1, keepdims=True)).astype(F)


@dataclass
class _Material:
    """What the seen points are like, in camera space; (3, M) or (M,)."""

    normal: np.ndarray
    albedo: np.ndarray
    specular: np.ndarray
    gloss: np.ndarray
    scatter: np.ndarray
    strands: list[tuple[slice, np.ndarray]]  # hair: which points, and the direction of their strands (3, m)


def _materials(clouds: list[tuple[_Cloud, np.ndarray]]) -> _Material:
    """Reads the attributes of the seen points of each cloud."""
    normals, albedos, speculars, glosses, scatters, strands = [], [], [], [], [], []
    count = 0
    for cloud, seen in clouds:
        cuts = np.searchsorted(seen, cloud.bounds)
        for k, (surface, turn, kept) in enumerate(cloud.sources):
            index = seen[cuts[k] : cuts[k + 1]] - cloud.bounds[k]
            index = index if kept is None else kept[index]
            normals.append(turn @ surface.normals.take(index, 1))
            albedos.append(surface.albedo.take(index, 1))
            speculars.append(surface.specular.take(index))
            glosses.append(surface.gloss.take(index))
            scatters.append(np.full(index.size, surface.scatter, F))
            if surface.tangents is not None:
                strands.append((slice(count, count + index.size), turn @ surface.tangents.take(index, 1)))
            count += index.size
    return _Material(
        np.concatenate(normals, 1),
        np.concatenate(albedos, 1),
        np.concatenate(speculars),
        np.concatenate(glosses),
        np.concatenate(scatters),
        strands,
    )


def _shade(m: _Material, points: np.ndarray, n: Nuisance, light: np.ndarray, shadow: np.ndarray, occlusion: np.ndarray):
    """Linear colours (M + 1, 3) of the seen points; the last row is black, for samples where there is nothing."""
    view = _CAMERA[:, None] - points
    view *= 1 / np.sqrt(dot(view, view))
    normal = m.normal
    facing = dot(normal, view)
    normal *= np.sign(facing)  # the inside of hair
    lambert = light @ normal
    light_colour = linear(n.light_colour) * F(1.32 * n.light_strength)
    ambient = linear(n.ambient_colour) * F(0.85 * n.ambient)
    # Fill light from the other side of the camera
    fill = np.array([-np.sign(light[0]) * 0.6, 0.1, 0.8], F)
    filled = np.clip((fill / np.linalg.norm(fill)) @ normal, 0, 1) * occlusion * F(0.75 * n.fill_strength)
    sky = (F(0.6) + F(0.4) * normal[1]) * occlusion

    half = light[:, None] + view
    half *= 1 / np.sqrt(dot(half, half) + F(1e-9))
    shine = np.clip(dot(normal, half), 0, 1)
    for part, tangent in m.strands:  # the highlight of a strand depends on the angle to its tangent
        along = dot(tangent, half[:, part])
        shine[part] = np.sqrt(np.clip(1 - along * along, 0, 1)) * np.sqrt(np.clip(F(0.3) + lambert[part], 0, 1))
    highlight = m.specular * np.exp((shine - 1) * m.gloss) * np.sqrt(m.gloss) * F(0.15)
    highlight *= np.clip(lambert * 3 + F(0.15), 0, 1) * shadow
    rim = (1 - np.abs(facing)) ** 4 * m.specular * occlusion * F(0.5)

    colours = np.zeros((points.shape[1] + 1, 3), F)
    for c, (wrap, bounce) in enumerate(
        ((0.34, 1.04), (0.15, 0.97), (0.09, 0.92))
    ):  # red light goes farthest under skin
        w = F(wrap) * m.scatter
        diffuse = np.clip((lambert + w) / (1 + w), 0, 1)
        lit = shadow + (1 - shadow) * w * F(0.35)
        colours[:-1, c] = (
            m.albedo[c] * (light_colour[c] * diffuse * lit + F(bounce) * filled + ambient[c] * sky)
            + light_colour[c] * highlight
            + ambient[c] * rim
        )
    return colours


def _background(n: Nuisance, size: int) -> np.ndarray:
    """Out-of-focus surroundings, linear (3, H, W)."""
    rng = np.random.default_rng([n.seed, 7])
    small = 40
    a, b, c = (linear(colour)[:, None, None] for colour in n.background)
    v, u = np.meshgrid(np.linspace(0, 1, small, dtype=F), np.linspace(0, 1, small, dtype=F), indexing="ij")
    angle = rng.uniform(0, 2 * np.pi)
    t = np.clip(F(0.5) + (u - F(0.5)) * F(np.cos(angle)) + (v - F(0.5)) * F(np.sin(angle)), 0, 1)
    image = a + (b - a) * t
    image += (c - image) * np.clip(((u - F(0.5)) ** 2 + (v - F(0.45)) ** 2) * F(1.6), 0, 1)
    for _ in range(n.background_shapes):
        x, y, w, h = rng.uniform(0, 1), rng.uniform(0, 1), rng.uniform(0.05, 0.35), rng.uniform(0.08, 0.6)
        squared, tilt, alpha = rng.random() < 0.6, rng.normal(0, 0.2), rng.uniform(0.25, 0.8)
        du = ((u - F(x)) * F(np.cos(tilt)) + (v - F(y)) * F(np.sin(tilt))) * F(1 / w)
        dv = ((v - F(y)) * F(np.cos(tilt)) - (u - F(x)) * F(np.sin(tilt))) * F(1 / h)
        du, dv = du * du, dv * dv
        distance = np.maximum(du, dv) if squared else du + dv
        shade = linear(np.clip(np.array(n.background[rng.integers(3)]) + rng.normal(0, 0.12, 3), 0.02, 1))
        image += (shade[:, None, None] - image) * (np.clip((1 - distance) * 4, 0, 1) * F(alpha))
    image *= 1 + F(0.05) * noise(rng, small, small, 9, 9)
    up = _resize_matrix(size, small) @ blur_matrix(small, 1.0)
    return up @ image @ up.T


@lru_cache(maxsize=8)
def _resize_matrix(n: int, small: int) -> np.ndarray:
    """(n, small) linear interpolation."""
    position = (np.arange(n) + 0.5) / n * small - 0.5
    weights = np.clip(1 - np.abs(np.clip(position, 0, small - 1)[:, None] - np.arange(small)), 0, 1)
    return weights.astype(F)


def render_with_landmarks(identity: Identity, nuisance: Nuisance, size: int = 128) -> tuple[np.ndarray, np.ndarray]:
    """Photograph of a person => uint8 (size, size, 3) RGB and landmarks float32 (5, 2): x and y in pixels, in the order
    of `LANDMARKS`, left and right as seen in the image."""
    n = nuisance
    person = _person(identity, size)
    head = rotation(n.yaw, n.pitch, n.roll)
    still = np.eye(3, dtype=F)
    face, landmarks = person.face.express(n)
    fine = _gather([(face, head), *((s, head) for s in person.fine)])
    coarse = _gather([*((s, head) for s in person.coarse), (person.torso.surface(n, head, _PIVOT), still)])

    samples = size * _SUPERSAMPLING
    unit = F(_SCALE * n.scale * samples)
    centre_x, centre_y = F((_CENTRE[0] + n.shift_x) * samples), F((_CENTRE[1] + n.shift_y) * samples)

    def project(p: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        near = unit * _CAMERA[2] / (_CAMERA[2] - p[2])
        return centre_x + (p[0] - _PIVOT[0]) * near, centre_y - (p[1] - _PIVOT[1]) * near

    # Two buffers, merged by depth: fine detail with small points, hair and clothes with fewer and larger ones
    offset = fine.points.shape[1]
    index, depth = _draw(*project(fine.points), fine.points[2], samples, 2)
    other, other_depth = _draw(*project(coarse.points), coarse.points[2], samples, 3)
    nearer = other_depth > depth
    index, depth = np.where(nearer, other + offset, index).ravel(), np.where(nearer, other_depth, depth)
    n_points = offset + coarse.points.shape[1] + 1  # the last stands for nothing: index -1

    # Shade what is seen, each point once
    where = np.full(n_points, -1, np.int32)  # a sample that shows the point
    where[index] = np.arange(index.size, dtype=np.int32)
    where[-1] = -1
    seen = np.flatnonzero(where >= 0)
    row, column = np.divmod(where[seen], samples)
    cut = int(np.searchsorted(seen, offset))
    material = _materials([(fine, seen[:cut]), (coarse, seen[cut:] - offset)])
    points = np.concatenate([fine.points.take(seen[:cut], 1), coarse.points.take(seen[cut:] - offset, 1)], 1)
    azimuth, elevation = n.light_azimuth, n.light_elevation
    light = [np.sin(azimuth) * np.cos(elevation), np.sin(elevation), np.cos(azimuth) * np.cos(elevation)]
    light = np.array(light, F)
    shadow = _shadow([(face, head), *((s, head) for s in person.fine + person.coarse)], points, light, n)
    colours = _shade(material, points, n, light, shadow, _occlusion(depth, row, column, points[2]))

    # Samples => pixels, over the background
    lookup = np.full(n_points, seen.size, np.int32)
    lookup[seen] = np.arange(seen.size, dtype=np.int32)
    index = lookup.take(index, mode="wrap").reshape(samples, samples)
    layer = np.zeros((size, size, 3), F)
    cover = np.zeros((size, size), F)
    for i in range(_SUPERSAMPLING):
        for j in range(_SUPERSAMPLING):
            part = index[i::_SUPERSAMPLING, j::_SUPERSAMPLING]
            layer += colours.take(part, 0)
            cover += part < seen.size
    share = F(1 / _SUPERSAMPLING**2)
    image = layer.transpose(2, 0, 1) * share + (1 - cover * share) * _background(n, size)
    flat = [project((head @ (landmarks[name].astype(F) - _PIVOT) + _PIVOT)[:, None]) for name in LANDMARKS]
    flat = np.array(flat, F)[..., 0] / _SUPERSAMPLING - F(0.5)
    return _camera(image, n, size), flat


_GAMMA = (255 * np.linspace(0, 1, 4096) ** (1 / 2.2)).astype(F)


def _camera(image: np.ndarray, n: Nuisance, size: int) -> np.ndarray:
    """Linear light (3, H, W) => uint8 sRGB (H, W, 3): occluder, exposure with a soft shoulder, blur, noise."""
    if n.occluder is not None:
        x, y, w, h, angle = n.occluder
        axis = (np.arange(size, dtype=F) + F(0.5)) / size
        u, v = axis[None] - F(x), axis[:, None] - F(y)
        du, dv = (u * F(np.cos(angle)) + v * F(np.sin(angle))) / w, (v * F(np.cos(angle)) - u * F(np.sin(angle))) / h
        inside = np.clip((1 - (du**4 + dv**4)) * 3, 0, 1)
        image = image + inside * (linear(n.occluder_colour)[:, None, None] * (1 - F(0.3) * dv) - image)
    image = np.maximum(image * F(0.92 * n.exposure), 0)
    image = np.where(image > 0.6, 1 - F(0.4) * np.exp((F(0.6) - image) / F(0.4)), image)
    deviation = n.blur * size / 128
    if deviation > 0.05:  # as often as needed, a kernel (a, 1 - 2a, a) of variance 2a
        passes = int(np.ceil(deviation**2 / 0.6))
        a = F(deviation**2 / passes / 2)
        for _ in range(passes):
            image[:, 1:-1] += a * (image[:, 2:] + image[:, :-2] - 2 * image[:, 1:-1])
            image[:, :, 1:-1] += a * (image[:, :, 2:] + image[:, :, :-2] - 2 * image[:, :, 1:-1])
    image = _GAMMA.take((image * F(4095)).astype(np.int32), mode="clip").transpose(1, 2, 0)
    if n.noise:
        rng = np.random.default_rng([n.seed, 11])
        image = image + F(n.noise) * rng.standard_normal(image.shape, dtype=F)
    return np.clip(image + F(0.5), 0, 255).astype(np.uint8)


def render(identity: Identity, nuisance: Nuisance, size: int = 128) -> np.ndarray:
    """Photograph of a person => uint8 (size, size, 3) RGB."""
    return render_with_landmarks(identity, nuisance, size)[0]
