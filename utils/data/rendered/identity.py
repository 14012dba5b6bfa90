"""Who is in the picture and how it was taken: the parameters of a rendered face, and their distributions.

An `Identity` is everything that stays with a person; a `Nuisance` everything that changes from photograph to
photograph. Both are plain frozen records: `dataclasses.asdict` gives the ground truth that is written beside the
images. Lengths are in head units: eyes at y = 0, chin near y = -1.3, crown near y = 1.3, x to the right of the image,
y up, z towards the camera. Colours are sRGB in [0, 1].
"""

from dataclasses import dataclass

import numpy as np

Colour = tuple[float, float, float]

HAIR_STYLES = (
    "bald",
    "horseshoe",
    "buzz",
    "receding",
    "short",
    "side_part",
    "quiff",
    "fringe",
    "curly",
    "afro",
    "bob",
    "long",
    "wavy",
    "top_bun",
)
FACIAL_HAIR = ("none", "stubble", "moustache", "goatee", "beard")
GLASSES = ("none", "round", "square")
CLOTHES = ("crew", "vneck", "collar", "stripes")

# Skin from very fair to very dark, sRGB; melanin in [0, 1] runs along the list
_SKIN = np.array(
    [
        (247, 212, 192),
        (240, 194, 166),
        (226, 172, 138),
        (206, 148, 110),
        (178, 120, 82),
        (142, 91, 60),
        (106, 67, 46),
        (76, 48, 36),
    ]
)
_HAIR = {
    "black": (28, 24, 24),
    "dark_brown": (58, 38, 28),
    "brown": (98, 64, 40),
    "light_brown": (138, 98, 62),
    "blond": (206, 166, 104),
    "red": (156, 72, 34),
    "grey": (150, 147, 144),
    "white": (222, 218, 212),
}
_IRIS = {
    "dark": (46, 30, 22),
    "brown": (92, 56, 30),
    "hazel": (128, 98, 50),
    "green": (94, 122, 76),
    "blue": (88, 132, 170),
    "grey": (128, 142, 150),
}


@dataclass(frozen=True)
class Identity:
    """One person. Ratios are relative to the average face (1.0); amounts are 0 (none) to 1 (strong) unless said."""

    index: int
    texture_seed: int  # seeds freckles, moles, strands and hairline jitter
    masculinity: float
    age: float
    # Head and jaw
    head_width: float
    head_height: float
    head_depth: float
    forehead_height: float
    temple_width: float
    cheek_width: float
    cheekbone: float
    cheek_fullness: float  # -1 hollow to 1 full
    jaw_width: float
    chin_width: float
    chin_length: float
    chin_protrusion: float
    chin_cleft: float
    face_squareness: float  # exponent of the horizontal section, 2 is an ellipse
    neck_width: float
    # Skin
    melanin: float
    skin: Colour
    redness: float
    freckles: float
    eye_shadow: float
    wrinkles: float
    moles: tuple[tuple[float, float, float], ...]  # x, y, radius
    shine: float
    # Eyes
    eye_spacing: float  # half the distance between the eyes
    eye_height: float
    eye_width: float  # half the width of one eye
    eye_opening: float
    eye_tilt: float  # radians, outer corner up
    eye_depth: float
    eye_fold: float  # 0 single fold to 1 deep crease
    eye_bags: float
    lashes: float
    iris_radius: float
    iris: Colour
    # Brows
    brow_height: float
    brow_arch: float
    brow_tilt: float
    brow_thickness: float
    brow_length: float
    brow_density: float
    brow_gap: float
    brow_ridge: float
    brow_colour: Colour
    # Nose
    nose_length: float
    nose_width: float
    nose_bridge: float
    nose_height: float
    nose_hump: float
    nose_tip: float
    nose_turn: float  # tip up (+) or down (-)
    nostril: float
    # Mouth
    mouth_width: float
    mouth_height: float
    upper_lip: float
    lower_lip: float
    cupid: float
    mouth_curve: float
    lip_colour: Colour
    # Ears
    ear_size: float
    ear_angle: float
    # Hair
    hair_style: str
    hair_colour: Colour
    hair_volume: float
    hair_length: float
    hair_curl: float
    hairline: float
    widows_peak: float
    hair_part: float  # radians around the head, 0 is the middle
    hair_grey: float
    # Facial hair and glasses
    facial_hair: str
    facial_hair_density: float
    facial_hair_length: float
    glasses: str
    glasses_size: float
    glasses_colour: Colour


@dataclass(frozen=True)
class Nuisance:
    """One photograph: pose, light, expression, surroundings and camera. Angles in radians, lengths in image widths."""

    seed: int  # background shapes and noise
    yaw: float
    pitch: float
    roll: float
    torso_yaw: float
    # Expression
    smile: float  # -1 frown to 1 broad smile
    mouth_open: float
    brow_raise: float  # -1 frown to 1
    eye_closure: float  # 0 open, 1 closed
    gaze_x: float
    gaze_y: float
    # Light
    light_azimuth: float
    light_elevation: float
    light_colour: Colour
    light_strength: float
    fill_strength: float
    ambient: float
    ambient_colour: Colour
    shadow_softness: float
    # Surroundings
    background: tuple[Colour, Colour, Colour]
    background_shapes: int
    clothes: str
    clothes_colour: Colour
    clothes_colour_2: Colour
    # Camera
    scale: float
    shift_x: float
    shift_y: float
    exposure: float
    blur: float  # standard deviation, pixels of a 128-pixel image
    noise: float  # standard deviation, of 255
    occluder: tuple[float, float, float, float, float] | None  # centre x, y, half-width, half-height, angle
    occluder_colour: Colour


def _rng(*key: int) -> np.random.Generator:
    """Generator that depends on the key alone, so an image depends on no other image."""
    return np.random.default_rng([int(k) & 0xFFFFFFFFFFFFFFFF for k in key])


def _colour(rgb) -> Colour:
    r, g, b = np.clip(rgb, 0.0, 1.0)
    return float(r), float(g), float(b)


def _choose(rng: np.random.Generator, weights: dict[str, float]) -> str:
    names = list(weights)
    p = np.array([max(weights[n], 0.0) for n in names])
    return names[int(rng.choice(len(names), p=p / p.sum()))]


def skin_colour(melanin: float, warmth: float = 0.0, redness: float = 0.0) -> Colour:
    """sRGB skin colour: `melanin` 0 (very fair) to 1 (very dark); `warmth` and `redness` shift it by about +-1."""
    position = np.clip(melanin, 0, 1) * (len(_SKIN) - 1)
    rgb = np.array([np.interp(position, np.arange(len(_SKIN)), _SKIN[:, c]) for c in range(3)]) / 255
    return _colour(rgb * (1 + 0.02 * warmth + 0.01 * redness, 1 - 0.025 * redness, 1 - 0.07 * warmth - 0.01 * redness))


def sample_identity(seed: int, index: int) -> Identity:
    """Person number `index` of the population `seed`. Depends on these two numbers alone."""
    rng = _rng(seed, 1, index)

    def normal(mean: float, deviation: float, low: float = -np.inf, high: float = np.inf) -> float:
        limit = 2.2 * deviation
        return float(np.clip(mean + np.clip(rng.normal(0, deviation), -limit, limit), low, high))

    def uniform(low: float, high: float) -> float:
        return float(rng.uniform(low, high))

    # Bimodal on purpose: most faces read as one or the other
    masculinity = float(np.clip(rng.choice([0.14, 0.86]) + rng.normal(0, 0.14), 0, 1))
    m = 2 * masculinity - 1
    age = float(rng.beta(1.3, 1.7))
    melanin = uniform(0, 1)
    redness = normal(0, 0.5)
    skin = skin_colour(melanin, normal(0, 0.6), redness)

    # Hair: light colours are rare on dark skin, grey comes with age
    light = (1 - melanin) ** 1.5
    tone = _choose(
        rng,
        {
            "black": 0.25 + 2.0 * melanin,
            "dark_brown": 0.7,
            "brown": 0.8 * light,
            "light_brown": 0.7 * light,
            "blond": 0.8 * light,
            "red": 0.4 * light,
        },
    )
    hair = np.array(_HAIR[tone]) / 255 * (1 + 0.12 * rng.normal(size=3) * (0.4, 0.5, 0.6)) * uniform(0.85, 1.15)
    brow = hair * (0.75 if tone in ("blond", "light_brown", "red") else 0.9)
    hair_grey = float(np.clip((age - 0.62) * 3.2 + normal(0, 0.25), 0, 1)) if age > 0.5 else 0.0
    grey = np.array(_HAIR["white" if rng.random() < 0.4 else "grey"]) / 255
    hair = hair * (1 - hair_grey) + grey * hair_grey
    brow = brow * (1 - 0.6 * hair_grey) + 0.7 * grey * 0.6 * hair_grey

    male, female = masculinity, 1 - masculinity
    old = max(age - 0.4, 0)
    style = _choose(
        rng,
        {
            "bald": male * (0.25 + 1.2 * old),
            "horseshoe": male * 2.2 * old,
            "buzz": male * 0.7,
            "receding": male * (0.25 + 1.5 * old),
            "short": male * 1.0 + 0.15,
            "side_part": male * 1.0 + 0.15,
            "quiff": male * 0.8,
            "fringe": 0.35 + 0.5 * female,
            "curly": 0.5,
            "afro": 0.05 + 0.9 * max(melanin - 0.5, 0),
            "bob": 1.1 * female,
            "long": 1.5 * female + 0.12,
            "wavy": 1.3 * female + 0.08,
            "top_bun": 0.7 * female,
        },
    )
    beards = {"none": 1.0, "stubble": 0.5, "moustache": 0.22, "goatee": 0.3, "beard": 0.5}
    facial_hair = _choose(rng, beards) if masculinity > 0.6 else "none"
    eyes = _choose(
        rng,
        {
            "dark": 0.2 + 1.5 * melanin,
            "brown": 0.8,
            "hazel": light,
            "green": 0.6 * light,
            "blue": 1.1 * light,
            "grey": 0.5 * light,
        },
    )
    iris = np.array(_IRIS[eyes]) / 255 * uniform(0.85, 1.2)
    lips = np.array(skin) * (0.94, 0.66, 0.68) * (1 - 0.1 * melanin)
    lipstick = female * float(rng.random() < 0.45) * uniform(0.2, 0.8)
    paint = np.array([(0.72, 0.12, 0.18), (0.75, 0.28, 0.32), (0.55, 0.12, 0.22), (0.78, 0.36, 0.28)])[rng.integers(4)]
    lips = lips * (1 - lipstick) + paint * lipstick
    n_moles = int(rng.choice([0, 0, 1, 1, 2, 3]))
    moles = tuple((uniform(-0.6, 0.6), uniform(-1.0, 0.7), uniform(0.014, 0.026)) for _ in range(n_moles))
    glasses = _choose(rng, {"none": 0.8, "round": 0.1, "square": 0.1 + 0.1 * age})
    frames = np.array([(0.07, 0.07, 0.08), (0.25, 0.14, 0.08), (0.45, 0.1, 0.12), (0.62, 0.52, 0.3), (0.12, 0.2, 0.4)])[
        rng.integers(5)
    ]

    return Identity(
        index=int(index),
        texture_seed=int(rng.integers(2**31)),
        masculinity=masculinity,
        age=age,
        head_width=normal(1 + 0.015 * m, 0.05),
        head_height=normal(1, 0.03),
        head_depth=normal(1, 0.03),
        forehead_height=normal(1, 0.06),
        temple_width=normal(1, 0.035),
        cheek_width=normal(1 - 0.01 * m, 0.045),
        cheekbone=normal(0.5, 0.28, 0, 1),
        cheek_fullness=normal(0.1 - 0.25 * age, 0.5, -1, 1),
        jaw_width=normal(1 + 0.055 * m, 0.06),
        chin_width=normal(1 + 0.09 * m, 0.14),
        chin_length=normal(1 + 0.02 * m, 0.055),
        chin_protrusion=normal(0.1 * m, 0.5, -1, 1),
        chin_cleft=max(normal(-0.3 + 0.3 * m, 0.5), 0),
        face_squareness=normal(2.35 + 0.1 * m, 0.2, 2.0, 2.9),
        neck_width=normal(1 + 0.12 * m, 0.06),
        melanin=melanin,
        skin=skin,
        redness=redness,
        freckles=float(max(rng.normal(-0.4, 0.7), 0)) * light,
        eye_shadow=normal(0.3 + 0.3 * age, 0.22, 0, 1),
        wrinkles=float(np.clip((age - 0.35) * 1.6 + normal(0, 0.12), 0, 1)),
        moles=moles,
        shine=normal(0.5, 0.22, 0.1, 1),
        eye_spacing=normal(0.365, 0.022),
        eye_height=normal(0, 0.025),
        eye_width=normal(0.188, 0.014),
        eye_opening=normal(1 - 0.07 * m - 0.1 * age, 0.12, 0.74, 1.3),
        eye_tilt=normal(0.03 - 0.06 * age, 0.075),
        eye_depth=normal(0.5 + 0.12 * m, 0.25, 0, 1),
        eye_fold=normal(0.55, 0.3, 0, 1),
        eye_bags=normal(0.1 + 0.6 * age, 0.2, 0, 1),
        lashes=normal(0.5 - 0.32 * m, 0.18, 0.1, 1),
        iris_radius=normal(0.075, 0.004),
        iris=_colour(iris),
        brow_height=normal(0.255 - 0.02 * m, 0.026),
        brow_arch=normal(0.5 - 0.25 * m, 0.25, 0, 1),
        brow_tilt=normal(0.02, 0.07),
        brow_thickness=normal(0.052 + 0.014 * m, 0.011, 0.022),
        brow_length=normal(0.29, 0.025),
        brow_density=normal(0.72 + 0.08 * m, 0.17, 0.3, 1),
        brow_gap=normal(0.135, 0.022, 0.06),
        brow_ridge=normal(0.45 + 0.35 * m, 0.22, 0, 1.2),
        brow_colour=_colour(brow),
        nose_length=normal(1 + 0.02 * m + 0.03 * age, 0.08),
        nose_width=normal(1 + 0.04 * m + 0.22 * (melanin - 0.4), 0.11),
        nose_bridge=normal(1, 0.2, 0.5),
        nose_height=normal(0.93 + 0.05 * m - 0.15 * (melanin - 0.4), 0.12),
        nose_hump=normal(0.15 * m, 0.5, -1, 1.2),
        nose_tip=normal(1, 0.16),
        nose_turn=normal(-0.1 * m - 0.2 * age, 0.5, -1, 1),
        nostril=normal(0.5, 0.2, 0.1, 1),
        mouth_width=normal(0.295 + 0.008 * m, 0.026),
        mouth_height=normal(-0.795, 0.025),
        upper_lip=normal(0.058 - 0.006 * m - 0.014 * age + 0.018 * melanin, 0.013, 0.022),
        lower_lip=normal(0.082 - 0.006 * m - 0.014 * age + 0.016 * melanin, 0.016, 0.035),
        cupid=normal(0.5, 0.25, 0, 1),
        mouth_curve=normal(0, 0.3),
        lip_colour=_colour(lips),
        ear_size=normal(1 + 0.04 * m + 0.06 * age, 0.09),
        ear_angle=normal(0.42, 0.16, 0.15, 0.9),
        hair_style=style,
        hair_colour=_colour(hair),
        hair_volume=normal(1, 0.22, 0.5, 1.6),
        hair_length=normal(1, 0.25, 0.4, 1.6),
        hair_curl=uniform(0, 1),
        hairline=normal(0.73 + 0.03 * m, 0.05),
        widows_peak=normal(0, 0.4),
        hair_part=float(rng.choice([-1, 1])) * uniform(0.1, 0.7),
        hair_grey=hair_grey,
        facial_hair=facial_hair,
        facial_hair_density=uniform(0.55, 1),
        facial_hair_length=uniform(0.2, 1),
        glasses=glasses,
        glasses_size=normal(1, 0.08),
        glasses_colour=_colour(frames),
    )


def neutral_nuisance() -> Nuisance:
    """A frontal, neutral passport photograph in soft light; the same for everybody."""
    grey = (0.72, 0.74, 0.78)
    return Nuisance(
        seed=0,
        yaw=0.0,
        pitch=0.0,
        roll=0.0,
        torso_yaw=0.0,
        smile=0.0,
        mouth_open=0.0,
        brow_raise=0.0,
        eye_closure=0.0,
        gaze_x=0.0,
        gaze_y=0.0,
        light_azimuth=-0.5,
        light_elevation=0.6,
        light_colour=(1.0, 0.98, 0.95),
        light_strength=1.0,
        fill_strength=0.3,
        ambient=0.42,
        ambient_colour=(0.95, 0.98, 1.0),
        shadow_softness=1.0,
        background=(grey, grey, (0.6, 0.63, 0.68)),
        background_shapes=0,
        clothes="crew",
        clothes_colour=(0.3, 0.33, 0.4),
        clothes_colour_2=(0.8, 0.8, 0.8),
        scale=1.0,
        shift_x=0.0,
        shift_y=0.0,
        exposure=1.0,
        blur=0.0,
        noise=0.0,
        occluder=None,
        occluder_colour=(0.2, 0.2, 0.2),
    )


def sample_nuisance(seed: int, identity_index: int, image_index: int, strength: float = 1.0) -> Nuisance:
    """Conditions of photograph `image_index` of person `identity_index`; depends on the arguments alone.

    `strength` in [0, 1] scales pose, expression, light and camera; 1 is the full nuisance (yaw up to +-35 degrees,
    pitch +-20, roll +-15), 0 leaves a frontal neutral photograph before another background.
    """
    rng = _rng(seed, 2, identity_index, image_index)
    s = float(np.clip(strength, 0, 1))
    degrees = np.pi / 180

    def spread(deviation: float, limit: float) -> float:
        return float(np.clip(rng.normal(0, deviation), -limit, limit)) * s

    def between(low: float, high: float, rest: float) -> float:
        return float(rest + s * (rng.uniform(low, high) - rest))

    yaw = spread(17 * degrees, 35 * degrees)
    warm = rng.normal(0, 1) * s
    light_colour = np.array((1 + 0.05 * warm, 1.0, 1 - 0.09 * warm)) / (1 + 0.05 * abs(warm))
    cool = rng.normal(0, 1) * s
    hue = rng.uniform(0.15, 0.9) * (1 + rng.normal(0, 0.13, 3))
    tint = 1 + rng.normal(0, 0.1, 3)
    smiling = rng.random()
    occluder = None
    if rng.random() < 0.04 * s:  # something out of focus in a corner, below the mouth
        side = rng.choice([-1, 1])
        x, y = 0.5 + side * rng.uniform(0.3, 0.45), rng.uniform(0.86, 1.0)
        width, height, angle = rng.uniform(0.08, 0.16), rng.uniform(0.12, 0.2), rng.uniform(-0.6, 0.6)
        occluder = (float(x), float(y), float(width), float(height), float(angle))
    return Nuisance(
        seed=int(rng.integers(2**31)),
        yaw=yaw,
        pitch=spread(9 * degrees, 20 * degrees),
        roll=spread(7 * degrees, 15 * degrees),
        torso_yaw=0.35 * yaw + spread(0.15, 0.3),
        smile=between(0.25, 1.0, 0) if smiling < 0.5 else between(-0.35, 0.25, 0),
        mouth_open=between(0.1, 1.0, 0) if rng.random() < 0.3 else 0.0,
        brow_raise=spread(0.4, 1.0),
        eye_closure=between(0.0, 0.3, 0) if rng.random() < 0.95 else between(0.3, 0.75, 0),
        gaze_x=spread(0.35, 0.9),
        gaze_y=spread(0.22, 0.6),
        light_azimuth=float(-0.5 * (1 - s) + s * np.clip(rng.normal(0, 0.65), -1.3, 1.3)),
        light_elevation=between(0.05, 1.0, 0.6),
        light_colour=_colour(light_colour),
        light_strength=between(0.75, 1.15, 1.0),
        fill_strength=between(0.12, 0.45, 0.3),
        ambient=between(0.3, 0.55, 0.42),
        ambient_colour=_colour((0.92 - 0.06 * cool, 0.94, 0.96 + 0.05 * cool)),
        shadow_softness=between(0.5, 2.0, 1.0),
        background=(_colour(hue), _colour(hue * rng.uniform(0.6, 1.3) * tint), _colour(hue * rng.uniform(0.4, 1.1))),
        background_shapes=int(rng.integers(0, 7)),
        clothes=CLOTHES[int(rng.integers(len(CLOTHES)))],
        clothes_colour=_colour(rng.uniform(0.05, 0.85) + rng.normal(0, 0.12, 3)),
        clothes_colour_2=_colour(rng.uniform(0.1, 0.95) + rng.normal(0, 0.12, 3)),
        scale=between(0.86, 1.13, 1.0),
        shift_x=spread(0.03, 0.06),
        shift_y=spread(0.025, 0.05),
        exposure=float(np.exp(spread(0.14, 0.3))),
        blur=between(0.0, 0.75, 0.0),
        noise=between(0.5, 5.0, 0.0),
        occluder=occluder,
        occluder_colour=_colour(rng.uniform(0.1, 0.7) + rng.normal(0, 0.1, 3)),
    )
