"""From an identity and a nuisance to pixels.

The surfaces of `face`, `hair` and `geometry` are turned, projected and drawn far to near into an index buffer of twice the resolution, so that the
nearest point wins at each sample; only the points that are seen are shaded: soft cast shadows from a depth map drawn from the light (Williams 1978),
wrapped diffuse light that reddens at the terminator as skin does, Blinn-Phong highlights (Kajiya and Kay 1989 for hair), light from the sky and ground,
screen-space ambient occlusion. Then the camera: exposure, blur and noise. Legend: N points, (H, W) pixels.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from utils.data.rendered.face import Face
from utils.data.rendered.geometry import (
    F,
    Surface,
    bump,
    glasses,
    grid_normals,
    linear,
    noise,
    smoothstep,
    torso,
)
from utils.data.rendered.hair import hair_surfaces
from utils.data.rendered.identity import Identity, Nuisance

LANDMARKS = ("eye_left", "eye_right", "nose", "mouth_left", "mouth_right")
_SUPERSAMPLING = 2
_CAMERA = 9.0  # distance of the camera, head units
_SCALE = 0.262  # head unit, image widths
_CENTRE = (0.5, 0.485)  # where the middle between nose and eyes lands, image widths
_PIVOT = np.array([0.0, -0.25, -0.1], F)  # the head turns about this point


@dataclass
class Person:
    """Everything that does not change between the photographs of one person."""

    face: Face
    hair: list[Surface]
    frames: Surface | None
    torso: np.ndarray  # (3, R, C)
    torso_follow: np.ndarray  # (R,)


@lru_cache(maxsize=4)
def _person(identity: Identity, size: int) -> Person:
    face = Face(identity, size)
    frames = None
    if identity.glasses != "none":
        g = face.grid
        eye = face._nearest(face.points, identity.eye_spacing, identity.eye_height)
        points, normals = glasses(identity, float(eye[2]) + 0.2, float(g.width[np.argmin(np.abs(g.y - 0.05)), 0]), size)
        colour = linear(identity.glasses_colour)
        n = points.shape[1]
        frames = Surface(points, normals, np.repeat(colour[:, None], n, 1), np.full(n, 0.7, F), np.full(n, 45.0, F))
    return Person(face, hair_surfaces(identity, face.grid, size), frames, *torso(identity, size))


def rotation(yaw: float, pitch: float, roll: float) -> np.ndarray:
    """(3, 3) rotation: yaw about the vertical, then pitch (positive looks up), then roll."""
    cy, sy, cp, sp, cr, sr = np.cos(yaw), np.sin(yaw), np.cos(pitch), np.sin(pitch), np.cos(roll), np.sin(roll)
    about_y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    about_x = np.array([[1, 0, 0], [0, cp, sp], [0, -sp, cp]])
    about_z = np.array([[cr, -sr, 0], [sr, cr, 0], [0, 0, 1]])
    return (about_z @ about_x @ about_y).astype(F)


def _torso_surface(person: Person, identity: Identity, n: Nuisance, head: np.ndarray) -> Surface:
    """Neck and clothes; the neck turns gradually from the shoulders' direction to the head's."""
    body = rotation(n.torso_yaw, 0.0, 0.15 * n.roll)
    rest, follow = person.torso, person.torso_follow[None, :, None]
    pivot = _PIVOT[:, None, None]
    x, y = rest[0], rest[1]
    aphi = np.arctan2(np.abs(x), np.maximum(rest[2] + 0.3, 0.02))
    neckline = {"crew": -1.62, "vneck": -1.6, "collar": -1.5, "stripes": -1.64}[n.clothes] + 0.1 * np.minimum(aphi, 1.2)
    if n.clothes == "vneck":
        neckline = neckline - 0.55 * np.clip(1 - np.abs(x) / 0.34, 0, 1)
    if n.clothes == "collar":
        neckline = neckline - 0.4 * np.clip(1 - np.abs(x) / 0.2, 0, 1)
    cloth = np.clip((neckline - y) * 40 + 0.5, 0, 1)
    seam = bump(y, neckline - 0.035, 0.03)
    rng = np.random.default_rng([n.seed, 5])
    folds = noise(rng, x.shape[0], x.shape[1], 9, 12)
    grown = rest.copy()
    out = cloth * (0.035 + 0.012 * folds) + (0.02 if n.clothes != "collar" else 0.05) * seam
    grown[0] += out * np.sin(aphi) * np.sign(x)
    grown[2] += out * np.cos(aphi)
    flat = (grown - pivot).reshape(3, -1)
    points = (follow * (head @ flat).reshape(rest.shape) + (1 - follow) * (body @ flat).reshape(rest.shape)) + pivot
    # y is the same for a whole row, so a blend of rotations keeps the rows apart
    albedo = np.broadcast_to(linear(identity.skin)[:, None, None] * 0.93, rest.shape).copy()
    colour = np.broadcast_to(linear(n.clothes_colour)[:, None, None], rest.shape) * (1 + 0.05 * folds)
    second = linear(n.clothes_colour_2)[:, None, None]
    if n.clothes == "stripes":
        colour = colour + (second - colour) * smoothstep(-0.25, 0.25, np.sin(y * 26))
    else:
        colour = colour * (1 - 0.25 * seam)
    albedo += cloth * (colour - albedo)
    count = x.size
    return Surface(
        points.reshape(3, -1).astype(F),
        grid_normals(points.astype(F)).reshape(3, -1),
        albedo.reshape(3, -1).astype(F),
        (0.12 * (1 - 0.7 * cloth)).astype(F).ravel(),
        np.full(count, 12.0, F),
        scatter=0.7,
    )


def _turn(s: Surface, head: np.ndarray) -> Surface:
    """A surface from head space to camera space."""
    return Surface(
        head @ (s.points - _PIVOT[:, None]) + _PIVOT[:, None],
        head @ s.normals,
        s.albedo,
        s.specular,
        s.gloss,
        s.scatter,
        s.two_sided,
        None if s.tangents is None else head @ s.tangents,
    )


def _draw(u: np.ndarray, v: np.ndarray, depth: np.ndarray, resolution: int) -> np.ndarray:
    """Index (resolution, resolution) int32 of the nearest point at each sample, -1 where there is none.

    u, v (N,) in samples; `depth` (N,) grows towards the viewer. Each point covers 2 x 2 samples.
    """
    column, row = np.floor(u - F(0.5)).astype(np.int32), np.floor(v - F(0.5)).astype(np.int32)
    seen = np.flatnonzero((column >= -1) & (row >= -1) & (column < resolution) & (row < resolution))
    near = depth[seen]
    low, high = near.min(), near.max()
    key = ((near - low) * F(65535 / max(high - low, 1e-6))).astype(np.uint16)
    seen = seen[np.argsort(key, kind="stable")]  # 16-bit keys: a radix sort
    stride = resolution + 2
    first = (row[seen] + 1) * stride + column[seen] + 1
    cells = first[:, None] + np.array([0, 1, stride, stride + 1], np.int32)
    buffer = np.full(stride * stride, -1, np.int32)
    buffer[cells.ravel()] = np.repeat(seen.astype(np.int32), 4)  # the last of equal cells stays: the nearest
    return buffer.reshape(stride, stride)[1:-1, 1:-1]


def _shadow(points: np.ndarray, seen: np.ndarray, light: np.ndarray, softness: float) -> np.ndarray:
    """Share of the light that reaches the points `seen`, (M,) in [0, 1]. `light` points from the head to the light."""
    up = np.array([0.0, 1.0, 0.0]) if abs(light[1]) < 0.9 else np.array([0.0, 0.0, 1.0])
    right = np.cross(up, light)
    right /= np.linalg.norm(right)
    frame = np.stack([right, np.cross(light, right), light]).astype(F)
    resolution = 112
    local = frame @ points
    u, v = (local[0] * F(resolution / 4.6) + resolution / 2), (local[1] * F(resolution / 4.6) + resolution / 2)
    depth = local[2]
    index = _draw(u[::3], v[::3], depth[::3], resolution)
    nearest = np.where(index >= 0, depth[::3][index], F(-9))
    u, v, depth = u[seen], v[seen], depth[seen] + F(0.045)
    total = np.zeros(seen.size, F)
    spread = 0.9 * softness
    taps = [(0, 0), (1, 0.35), (-0.35, 1), (-1, -0.35), (0.35, -1), (1.7, 1.7), (-1.7, 1.7), (1.7, -1.7), (-1.7, -1.7)]
    for du, dv in taps:
        column = np.clip(u + F(du * spread - 0.5), 0, resolution - 1).astype(np.int32)
        row = np.clip(v + F(dv * spread - 0.5), 0, resolution - 1).astype(np.int32)
        total += np.clip((nearest[row, column] - depth) * F(16), 0, 1)
    return 1 - total * F(1 / len(taps))


def _occlusion(z: np.ndarray, index: np.ndarray, row: np.ndarray, column: np.ndarray) -> np.ndarray:
    """Ambient light that crevices receive, (M,) for points at samples (row, column): depth against its blurred self, at two widths."""
    step = 4
    small = index[step // 2 :: step, step // 2 :: step]
    n = small.shape[0]
    floor = F(-0.9)
    depth = np.where(small >= 0, np.maximum(z[small], floor), floor)
    k = n / 64
    result = np.ones(row.size, F)
    sub_row, sub_column = np.minimum(row // step, n - 1), np.minimum(column // step, n - 1)
    own = np.maximum(z[index[row, column]], floor)
    for width, gain in ((1.3 * k, 1.9), (4.0 * k, 0.55)):
        blurred = _blur_matrix(n, width) @ depth @ _blur_matrix(n, width).T
        result *= 1 - np.clip((blurred[sub_row, sub_column] - own - F(0.012)) * F(gain), 0, 0.62)
    return result


@lru_cache(maxsize=32)
def _blur_matrix(n: int, deviation: float) -> np.ndarray:
    """(n, n) Gaussian blur; rows sum to one, so the border does not darken."""
    d = np.arange(n)[:, None] - np.arange(n)[None]
    weights = np.exp(-0.5 * (d / max(deviation, 1e-3)) ** 2)
    return (weights / weights.sum(1, keepdims=True)).astype(F)


def _shade(
    s: dict[str, np.ndarray], n: Nuisance, light: np.ndarray, shadow: np.ndarray, occlusion: np.ndarray
) -> np.ndarray:
    """Linear colours (3, M) of the seen points."""
    normal, albedo = s["normal"], s["albedo"]
    view = s["view"]
    lambert = light[0] * normal[0] + light[1] * normal[1] + light[2] * normal[2]
    colour = np.empty_like(albedo)
    light_colour = linear(n.light_colour) * F(1.25 * n.light_strength)
    ambient = linear(n.ambient_colour) * F(n.ambient)
    # Fill light from the other side of the camera
    fill = np.array([-np.sign(light[0]) * 0.6, 0.1, 0.8], F)
    fill /= np.linalg.norm(fill)
    filled = np.clip(fill[0] * normal[0] + fill[1] * normal[1] + fill[2] * normal[2], 0, 1) * F(0.75 * n.fill_strength)
    sky = (F(0.62) + F(0.38) * normal[1]) * occlusion
    bounce = np.array([1.02, 0.97, 0.92], F)
    for c, wrap in enumerate((0.32, 0.16, 0.10)):  # red light travels farthest under the skin
        w = F(wrap) * s["scatter"]
        diffuse = np.clip((lambert + w) / (1 + w), 0, 1)
        lit = shadow + (1 - shadow) * w * F(0.35)
        colour[c] = albedo[c] * (
            light_colour[c] * diffuse * lit + (filled * F(bounce[c])) * occlusion + ambient[c] * sky
        )
    half = light[:, None] + view
    half *= 1 / np.sqrt((half * half).sum(0) + F(1e-9))
    facing = np.clip((normal * half).sum(0), 0, 1)
    strands = s["is_hair"]
    if strands.any():  # the highlight of a strand depends on the angle to its tangent
        tangent = (s["tangent"] * half[:, strands]).sum(0)
        facing[strands] = np.sqrt(np.clip(1 - tangent * tangent, 0, 1)) * np.clip(
            F(0.35) + lambert[strands], 0, 1
        ) ** F(0.25)
    gloss = s["gloss"]
    highlight = s["specular"] * np.exp((facing - 1) * gloss * F(1.05)) * np.sqrt(gloss) * F(0.17)
    grazing = (1 - np.clip((normal * view).sum(0), 0, 1)) ** 4
    highlight = highlight * np.clip(lambert * 3 + F(0.15), 0, 1) * shadow
    for c in range(3):
        colour[c] += light_colour[c] * highlight + ambient[c] * grazing * s["specular"] * occlusion * F(0.5)
    return colour


def _background(n: Nuisance, size: int) -> np.ndarray:
    """Out-of-focus surroundings, linear (size, size, 3)."""
    rng = np.random.default_rng([n.seed, 7])
    small = 40
    a, b, c = (linear(colour) for colour in n.background)
    v, u = np.meshgrid(np.linspace(0, 1, small, dtype=F), np.linspace(0, 1, small, dtype=F), indexing="ij")
    angle = rng.uniform(0, 2 * np.pi)
    t = np.clip(0.5 + (u - 0.5) * np.cos(angle) + (v - 0.5) * np.sin(angle), 0, 1)[..., None]
    image = a + (b - a) * t
    image = image + (c - image) * np.clip(((u - 0.5) ** 2 + (v - 0.45) ** 2) * 1.6, 0, 1)[..., None]
    for _ in range(n.background_shapes):
        x, y, w, h = rng.uniform(0, 1), rng.uniform(0, 1), rng.uniform(0.05, 0.35), rng.uniform(0.08, 0.6)
        p, tilt, alpha = rng.choice([2.0, 8.0]), rng.normal(0, 0.2), rng.uniform(0.25, 0.8)
        du, dv = (u - x) * np.cos(tilt) + (v - y) * np.sin(tilt), (v - y) * np.cos(tilt) - (u - x) * np.sin(tilt)
        inside = np.clip((1 - (np.abs(du / w) ** p + np.abs(dv / h) ** p)) * 4, 0, 1)[..., None] * alpha
        shade = linear(np.clip(np.array(n.background[rng.integers(3)]) + rng.normal(0, 0.15, 3), 0.02, 1))
        image = image + inside * (shade - image)
    image *= 1 + 0.05 * noise(rng, small, small, 9, 9)[..., None]
    blur = _blur_matrix(small, 1.0)
    up = _resize_matrix(size, small)
    return np.einsum("ai,ijc,bj->abc", up @ blur, image.astype(F), up @ blur, optimize=True)


@lru_cache(maxsize=8)
def _resize_matrix(n: int, small: int) -> np.ndarray:
    """(n, small) linear interpolation."""
    position = (np.arange(n) + 0.5) / n * small - 0.5
    weights = np.clip(1 - np.abs(np.clip(position, 0, small - 1)[:, None] - np.arange(small)), 0, 1)
    return weights.astype(F)


def render_with_landmarks(identity: Identity, nuisance: Nuisance, size: int = 128) -> tuple[np.ndarray, np.ndarray]:
    """Photograph of a person => uint8 (size, size, 3) RGB and landmarks float32 (5, 2), x and y in pixels, in the order of `LANDMARKS`
    (left and right as seen in the image)."""
    n = nuisance
    person = _person(identity, size)
    head = rotation(n.yaw, n.pitch, n.roll)
    face, landmarks = person.face.express(n)
    surfaces = [_turn(face, head), *(_turn(s, head) for s in person.face.ears), *(_turn(s, head) for s in person.hair)]
    if person.frames is not None:
        surfaces.append(_turn(person.frames, head))
    surfaces.append(_torso_surface(person, identity, n, head))

    # Camera: perspective, y down
    samples = size * _SUPERSAMPLING
    unit = _SCALE * n.scale * samples
    centre_x, centre_y = (_CENTRE[0] + n.shift_x) * samples, (_CENTRE[1] + n.shift_y) * samples

    def project(p: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        near = F(_CAMERA) / (F(_CAMERA) - p[2])
        return centre_x + F(unit) * (p[0] - _PIVOT[0]) * near, centre_y - F(unit) * (p[1] - _PIVOT[1]) * near

    points = np.concatenate([s.points for s in surfaces], 1)
    normals = np.concatenate([s.normals for s in surfaces], 1)
    view = np.array([0, 0, _CAMERA], F)[:, None] - points
    view *= 1 / np.sqrt((view * view).sum(0))
    facing = (view * normals).sum(0)
    counts = [s.points.shape[1] for s in surfaces]
    two_sided = np.repeat([s.two_sided for s in surfaces], counts)
    drawn = np.flatnonzero((facing > F(-0.05)) | two_sided)
    u, v = project(points)
    index = _draw(u[drawn], v[drawn], points[2][drawn], samples)
    covered = index >= 0
    index[covered] = drawn[index[covered]]

    # Shade what is seen, each point once
    where = np.full(points.shape[1], -1, np.int32)
    where[index[covered]] = np.flatnonzero(covered)
    seen = np.flatnonzero(where >= 0)
    row, column = np.divmod(where[seen], samples)
    light = np.array(
        [
            np.sin(n.light_azimuth) * np.cos(n.light_elevation),
            np.sin(n.light_elevation),
            np.cos(n.light_azimuth) * np.cos(n.light_elevation),
        ],
        F,
    )
    hair_count = sum(s.tangents is not None for s in surfaces)
    is_hair = np.repeat([s.tangents is not None for s in surfaces], counts)[seen]
    normal = normals[:, seen]
    normal = np.where(facing[seen] < 0, -normal, normal)  # the inside of hair
    attributes = {
        "normal": normal,
        "view": view[:, seen],
        "albedo": np.concatenate([s.albedo for s in surfaces], 1)[:, seen],
        "specular": np.concatenate([s.specular for s in surfaces])[seen],
        "gloss": np.concatenate([s.gloss for s in surfaces])[seen],
        "scatter": np.repeat(np.array([s.scatter for s in surfaces], F), counts)[seen],
        "is_hair": is_hair,
    }
    if hair_count:
        tangents = [s.tangents if s.tangents is not None else np.zeros_like(s.points) for s in surfaces]
        attributes["tangent"] = np.concatenate(tangents, 1)[:, seen[is_hair]]
    shadow = _shadow(points, seen, light, n.shadow_softness)
    occlusion = _occlusion(points[2], index, row, column)
    colours = _shade(attributes, n, light, shadow, occlusion)

    # Samples => pixels, over the background
    lookup = np.zeros(points.shape[1] + 1, np.int32)
    lookup[seen] = np.arange(seen.size)
    colours = np.concatenate([colours, np.zeros((3, 1), F)], 1).T.copy()
    lookup[-1] = seen.size
    layer = colours[lookup[index]]  # (2H, 2W, 3); index -1 is the empty last entry
    layer = layer.reshape(size, 2, size, 2, 3).mean((1, 3))
    alpha = covered.reshape(size, 2, size, 2).mean((1, 3), dtype=F)[..., None]
    image = layer + (1 - alpha) * _background(n, size)
    image = _camera(image, n, size)
    flat = [
        np.array(project((head @ (landmarks[name].astype(F) - _PIVOT) + _PIVOT)[:, None]))[:, 0] for name in LANDMARKS
    ]
    return image, (np.array(flat, F) / _SUPERSAMPLING - 0.5).astype(F)


def _camera(image: np.ndarray, n: Nuisance, size: int) -> np.ndarray:
    """Linear light (H, W, 3) => uint8 sRGB: occluder, exposure with a soft shoulder, blur, noise."""
    if n.occluder is not None:
        x, y, w, h, angle = n.occluder
        v, u = np.meshgrid(
            (np.arange(size, dtype=F) + 0.5) / size, (np.arange(size, dtype=F) + 0.5) / size, indexing="ij"
        )
        du, dv = (u - x) * np.cos(angle) + (v - y) * np.sin(angle), (v - y) * np.cos(angle) - (u - x) * np.sin(angle)
        inside = np.clip((1 - ((du / w) ** 4 + (dv / h) ** 4)) * 3, 0, 1)[..., None]
        image = image + inside * (linear(n.occluder_colour) * (1 - 0.3 * dv[..., None] / h) - image)
    image = image * F(0.92 * n.exposure)
    image = np.where(image > 0.6, 0.6 + 0.4 * (1 - np.exp(-(image - 0.6) / 0.4)), image)
    if n.blur > 0.05:
        blur = _blur_matrix(size, round(n.blur * size / 128, 1))
        image = np.einsum("ai,ijc,bj->abc", blur, image, blur, optimize=True)
    image = np.power(np.clip(image, 0, 1), F(1 / 2.2)) * 255
    if n.noise:
        rng = np.random.default_rng([n.seed, 11])
        image = image + F(n.noise) * rng.standard_normal(image.shape, dtype=F)
    return np.clip(image + F(0.5), 0, 255).astype(np.uint8)


def render(identity: Identity, nuisance: Nuisance, size: int = 128) -> np.ndarray:
    """Photograph of a person => uint8 (size, size, 3) RGB."""
    return render_with_landmarks(identity, nuisance, size)[0]
