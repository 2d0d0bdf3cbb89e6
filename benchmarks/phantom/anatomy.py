"""A chest without findings: body wall, skeleton, lungs with airways and vessels, mediastinum, heart, upper abdomen.

Proportions follow adult CT anatomy in round numbers; every patient draws its own. Distances are in mm, the origin lies
in the middle of the chest. Attenuations are those of CT without contrast medium, as CT-RATE's scans are.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import numpy as np

from .canvas import Array, Canvas, Grid, Point, ellipsoid_distance, smooth_noise
from .trees import Branch, grow_tree

FAT, MUSCLE, FLUID, LUNG, AIR = -98.0, 52.0, 8.0, -855.0, -1000.0
CORTICAL_BONE, MARROW, LIVER, SPLEEN = 650.0, 190.0, 58.0, 48.0


@dataclass(frozen=True)
class Patient:
    """One patient's measures, before any finding."""

    half_width: float
    half_depth: float
    fat: float
    lung_top: float
    diaphragm: float
    heart_radius: float
    aorta_radius: float
    blood: float
    lung: float
    offset: tuple[float, float, float]

    @staticmethod
    def draw(rng: np.random.Generator) -> Patient:
        """A patient at random."""
        return Patient(
            half_width=rng.uniform(155, 195),
            half_depth=rng.uniform(105, 132),
            fat=rng.uniform(6, 24),
            lung_top=rng.uniform(118, 138),
            diaphragm=rng.uniform(-98, -78),
            heart_radius=rng.uniform(40, 46),
            aorta_radius=rng.uniform(11, 14),
            blood=rng.uniform(35, 48),
            lung=LUNG + rng.uniform(-25, 30),
            offset=(rng.uniform(-9, 9), rng.uniform(-9, 9), rng.uniform(-8, 8)),
        )

    @property
    def cavity_width(self) -> float:
        """Half the inner width of the rib cage."""
        return self.half_width - self.fat - 24

    @property
    def cavity_depth(self) -> float:
        """Half the inner depth of the rib cage."""
        return self.half_depth - self.fat - 20

    @property
    def heart_centre(self) -> tuple[float, float, float]:
        """A larger heart grows to the left and downward."""
        growth = self.heart_radius - 43
        return 20 + 0.7 * growth, -0.3 * self.cavity_depth, self.diaphragm + 38 + 0.3 * growth

    @property
    def heart_radii(self) -> tuple[float, float, float]:
        """Half axes along x, y, z."""
        return self.heart_radius * 1.32, self.heart_radius, self.heart_radius * 1.05

    @property
    def spine_y(self) -> float:
        """How far back the vertebral bodies' centres lie."""
        return self.cavity_depth - 10


@dataclass
class Scene:
    """A painted chest and what findings need to know of it.

    ``skin``, ``heart``: signed distances (mm) to their surfaces. ``lungs``: share of each voxel inside (right, left)
    lung. ``airways``: branches by side. ``aorta``: centreline from the valve to the diaphragm.
    """

    canvas: Canvas
    patient: Patient
    skin: Array
    lungs: tuple[Array, Array]
    heart: Array
    airways: tuple[list[Branch], list[Branch]]
    aorta: list[Point]

    def copy(self) -> Scene:
        """A scene to paint on without changing this one; what is never painted on is shared."""
        canvas = copy.copy(self.canvas)
        canvas.hu = self.canvas.hu.copy()
        return replace(self, canvas=canvas)

    @property
    def both_lungs(self) -> Array:
        """Share of each voxel inside either lung."""
        return self.lungs[0] + self.lungs[1]


def build_scene(patient: Patient, grid: Grid, rng: np.random.Generator) -> Scene:
    """Paint a chest."""
    canvas = Canvas(grid)
    wobble = smooth_noise(grid.shape, [30 / s for s in grid.spacing_mm], rng)
    cavity = _cavity_distance(canvas, patient) + 1.5 * wobble
    skin = body_distance(canvas, patient)
    _paint_body_wall(canvas, patient, skin, cavity, rng)
    heart = ellipsoid_distance(_tilted(canvas, patient), (0, 0, 0), patient.heart_radii) + 1.0 * wobble
    dome = _diaphragm(canvas, patient)
    lungs = _lung_shares(canvas, patient, cavity, heart, dome, wobble)
    _paint_abdomen(canvas, patient, cavity, dome, rng)
    _paint_parenchyma(canvas, patient, lungs, rng)
    _paint_skeleton(canvas, patient, skin)
    canvas.fill(canvas.coverage(heart), patient.blood * 0.9 + 4)
    aorta = _paint_great_vessels(canvas, patient)
    # Ribs and great vessels stand where the lung's outline was: findings in the lung must not eat them.
    air = (canvas.hu < -350).astype(np.float32)
    lungs = lungs[0] * air, lungs[1] * air
    airways = _paint_trees(canvas, patient, lungs, heart, rng)
    _paint_trachea_and_oesophagus(canvas, patient)
    return Scene(canvas, patient, skin, lungs, heart, airways, aorta)


def _superellipse(x: Array, y: Array, width: Array | float, depth: Array | float, power: float = 2.5) -> Array:
    """Approximate signed distance in the plane."""
    norm = (np.abs(x / width) ** power + np.abs(y / depth) ** power) ** (1 / power)
    return (norm - 1) * np.minimum(width, depth)


def _cavity_distance(canvas: Canvas, patient: Patient) -> Array:
    """Signed distance to the inside of the rib cage: a barrel that closes like a dome at the apex."""
    rise = np.clip((canvas.z - 20) / (patient.lung_top - 20), 0, 1)
    taper = np.sqrt(np.maximum(1 - rise**2.6, 0.0009))
    inside = _superellipse(canvas.x, canvas.y, patient.cavity_width * taper, patient.cavity_depth * taper**0.7)
    return np.maximum(inside, canvas.z - patient.lung_top).astype(np.float32)


def body_distance(canvas: Canvas, patient: Patient) -> Array:
    """Signed distance to the skin; the back is deeper than the front, for the muscles along the spine."""
    shoulders = 1 + 0.12 * np.clip((canvas.z - 60) / 80, 0, 1)
    depth = patient.half_depth + 11 * (canvas.y > 0)
    return _superellipse(canvas.x, canvas.y, patient.half_width * shoulders, depth, 2.2)


def _paint_body_wall(canvas: Canvas, patient: Patient, outer: Array, cavity: Array, rng: np.random.Generator) -> None:
    """Skin and fat, muscle, and the cavity filled with fat, which organs then displace."""
    canvas.fill(canvas.coverage(outer), FAT)
    canvas.fill(canvas.coverage(np.maximum(outer, -(outer + 2.2))), 15.0)  # skin
    ripple = 3 * smooth_noise(canvas.grid.shape, [22 / s for s in canvas.grid.spacing_mm], rng)
    muscle = outer + np.maximum(patient.fat + ripple, 4)
    canvas.fill(canvas.coverage(np.maximum(muscle, -cavity - 1)), MUSCLE)
    planes = np.abs(muscle + 11) - 1.3  # fat planes between the muscle layers
    canvas.fill(canvas.coverage(np.maximum(planes, -cavity + 9)) * 0.8, FAT)
    canvas.fill(canvas.coverage(cavity + 1.5), FAT)


def _tilted(canvas: Canvas, patient: Patient) -> tuple[Array, Array, Array]:
    """Coordinates in the heart's frame: its long axis points to the left, forward and down."""
    cx, cy, cz = patient.heart_centre
    x, y, z = canvas.x - cx, canvas.y - cy, canvas.z - cz
    along = 0.84 * x - 0.38 * y - 0.38 * z
    across = 0.41 * x + 0.91 * y
    up = 0.35 * x - 0.16 * y + 0.92 * z
    return along.astype(np.float32), across.astype(np.float32), up.astype(np.float32)


def _diaphragm(canvas: Canvas, patient: Patient) -> Array:
    """Height (mm) of the diaphragm [X, Y, 1]: a dome on each side, the right one higher, deep sulci around."""
    height = np.full((*canvas.grid.shape[:2], 1), -1e3, np.float32)
    for side, rise in ((-1, 12.0), (1, 0.0)):
        x0 = side * 0.5 * patient.cavity_width
        bulge = ((canvas.x - x0) / (0.58 * patient.cavity_width)) ** 2 + ((canvas.y + 4) / patient.cavity_depth) ** 2
        height = np.maximum(height, patient.diaphragm + rise + 20 - 62 * np.minimum(bulge, 1.6))
    return height.astype(np.float32)


def _lung_shares(canvas: Canvas, patient: Patient, cavity: Array, heart: Array, dome: Array,
                 wobble: Array) -> tuple[Array, Array]:
    """Share of each voxel in the right and the left lung: the cavity less mediastinum, heart, spine and abdomen."""
    forward = (canvas.y + 0.12 * patient.cavity_depth) / (0.55 * patient.cavity_depth)
    waist = 5 + 24 * np.exp(-(forward**2)) + 8 * np.clip((canvas.z - 30) / 80, 0, 1)
    behind = 18 * np.clip((canvas.y - 0.5 * patient.cavity_depth) / (0.5 * patient.cavity_depth), 0, 1)
    mediastinum = np.abs(canvas.x - 2) - waist - behind
    spine = np.hypot(canvas.x, canvas.y - patient.spine_y - 4) - 25
    inside = np.maximum(cavity + 4, -mediastinum + 1.2 * wobble)
    inside = np.maximum(inside, -(heart - 5))
    inside = np.maximum(inside, -spine)
    inside = np.maximum(inside, dome - canvas.z)
    share = canvas.coverage(inside)
    right = (canvas.x < 2).astype(np.float32)
    return share * right, share * (1 - right)


def _paint_abdomen(canvas: Canvas, patient: Patient, cavity: Array, dome: Array, rng: np.random.Generator) -> None:
    """Below the domes: liver on the right and across, stomach and spleen on the left, fat between."""
    below = canvas.z - dome + 3
    region = np.maximum(cavity + 5, below)
    liver = np.maximum(region, canvas.x - 30 - 0.25 * (canvas.z - patient.diaphragm))
    canvas.fill(canvas.coverage(liver), LIVER + rng.uniform(-8, 8))
    spleen = np.maximum(region, ellipsoid_distance((canvas.x, canvas.y, canvas.z), (
        0.72 * patient.cavity_width, 0.5 * patient.cavity_depth, patient.diaphragm - 18), (34, 36, 46)))
    canvas.fill(canvas.coverage(spleen), SPLEEN)
    centre = (0.5 * patient.cavity_width, -0.15 * patient.cavity_depth, patient.diaphragm - 14)
    stomach = np.maximum(region + 2, ellipsoid_distance((canvas.x, canvas.y, canvas.z), centre, (38, 40, 30)))
    canvas.fill(canvas.coverage(stomach), 35.0)
    content = np.where(canvas.y < centre[1] - rng.uniform(-5, 15), -960.0, 22.0)  # gas rises to the front
    canvas.fill(canvas.coverage(stomach + 4), np.broadcast_to(content, canvas.hu.shape))


def _paint_parenchyma(canvas: Canvas, patient: Patient, lungs: tuple[Array, Array], rng: np.random.Generator) -> None:
    """Lung tissue: denser where gravity lets blood pool (the back), with a fine texture."""
    gradient = 35 * canvas.y / patient.cavity_depth
    fine = smooth_noise(canvas.grid.shape, [4 / s for s in canvas.grid.spacing_mm], rng)
    coarse = smooth_noise(canvas.grid.shape, [25 / s for s in canvas.grid.spacing_mm], rng)
    canvas.fill(lungs[0] + lungs[1], patient.lung + gradient + 9 * fine + 9 * coarse)


def _paint_skeleton(canvas: Canvas, patient: Patient, skin: Array) -> None:
    """Vertebrae with discs, canal and arches; ribs that descend forward; sternum, clavicles."""
    body = canvas.coverage(skin + 6)  # nothing of bone reaches the skin
    low, high = float(canvas.z.min()), float(canvas.z.max())
    y = patient.spine_y + 6
    for centre in np.arange(low - 12, high + 24, 24.0):
        where = canvas.around((-45, y - 30, centre - 14), (45, y + 75, centre + 14))
        x_, y_, z_ = canvas.local(where)
        vertebra = np.maximum(_superellipse(x_, y_ - y, 17.0, 14.5, 2.4), np.abs(z_ - centre) - 10.2)
        canvas.blend(where, canvas.coverage(vertebra), CORTICAL_BONE * 0.7)
        canvas.blend(where, canvas.coverage(vertebra + 2.2), MARROW)
        disc = np.maximum(_superellipse(x_, y_ - y, 16.0, 13.5, 2.4), np.abs(z_ - centre - 12) - 1.9)
        canvas.blend(where, canvas.coverage(disc), 85.0)
        canal = np.hypot(x_, y_ - y - 23)
        canvas.blend(where, canvas.coverage(np.maximum(np.abs(canal - 10.5) - 2.2, np.abs(z_ - centre) - 9)), 420.0)
        canvas.blend(where, canvas.coverage(canal - 8.3 + 0 * z_), 30.0)
        canvas.tube([(0, y + 33, centre - 2), (0, y + 50, centre - 12)], [4, 3], 380.0, body)
        for side in (-1, 1):
            canvas.tube([(side * 11, y + 22, centre), (side * 38, y + 27, centre + 2)], [5, 4], 330.0)
    for index in range(11):
        _paint_rib_pair(canvas, patient, patient.lung_top - 8 - 23 * index, y, body)
    front = -patient.cavity_depth - 9
    for start, end in (((0, front + 14, 92), (0, front, 60)), ((0, front, 58), (0, front - 2, -38))):
        for x in np.linspace(-12, 12, 5):
            points = [np.add(start, (x, 0, 0)), np.add(end, (x, 0, 0))]
            canvas.tube(points, 5.5, 300.0, body)
            canvas.tube(points, 3.4, 150.0, body)
    for side in (-1, 1):
        clavicle = [(side * 14, front + 8, 96), (side * 70, front + 26, 112), (side * 130, 5, 122)]
        canvas.tube(clavicle, 6.5, 480.0, body)
        canvas.tube(clavicle, 3.6, 160.0, body)
        shoulder_blade = [(side * 98, 0.82 * patient.half_depth - 12, 20), (side * 112, 0.62 * patient.half_depth, 70),
                          (side * 132, 0.3 * patient.half_depth, 108)]
        canvas.tube(shoulder_blade, [2.5, 4.5, 6.5], 420.0, body)


def _paint_rib_pair(canvas: Canvas, patient: Patient, top: float, spine_y: float, body: Array) -> None:
    """One pair of ribs: from the vertebra around the cavity, falling 60 mm on the way to the front."""
    rise = np.clip((top - 20) / (patient.lung_top - 20), 0, 0.985)
    taper = max((1 - rise**2.6) ** 0.5, 0.35)
    angles = np.linspace(0.12, 2.55, 22)  # from the back, over the side, to the front
    for side in (-1, 1):
        points = []
        for angle in angles:
            reach = 1 / (abs(np.sin(angle)) ** 2.5 + abs(np.cos(angle)) ** 2.5) ** 0.4
            x = side * (patient.cavity_width * taper + 5) * np.sin(angle) * reach
            y = (patient.cavity_depth * taper**0.7 + 5) * np.cos(angle) * reach
            points.append((x, y, top - 60 * (angle / np.pi) ** 1.2))
        points[0] = (side * 22, spine_y + 10, top)
        canvas.tube(points, 5.0, CORTICAL_BONE, body)
        canvas.tube(points, 2.9, MARROW, body)
        # cartilage, to the sternum
        canvas.tube([points[-1], (side * 14, -patient.cavity_depth - 6, points[-1][2] + 8)], 5.0, 95.0, body)


def _paint_great_vessels(canvas: Canvas, patient: Patient) -> list[Point]:
    """Aorta, pulmonary trunk and arteries, superior vena cava. Returns the aorta's centreline."""
    cx, cy, cz = patient.heart_centre
    arch = 62.0
    r = patient.aorta_radius
    aorta: list[Point] = [(cx - 22, cy + 4, cz + 32), (cx - 34, cy - 2, cz + 62), (-14, -20, arch - 14),
                          (-8, -16, arch), (2, -4, arch + 9), (14, 12, arch + 6), (21, 27, arch - 6),
                          (23, patient.spine_y - 26, arch - 30), (20, patient.spine_y - 25, -10),
                          (14, patient.spine_y - 24, patient.diaphragm - 10), (6, patient.spine_y - 24, -170)]
    radii = [r * 1.3, r * 1.28, r * 1.22, r * 1.12, r * 1.1, r * 1.05, r * 1.0, r, r * 0.95, r * 0.9, r * 0.85]
    canvas.tube(aorta, [radius + 1.3 for radius in radii], 44.0)
    canvas.tube(aorta, radii, patient.blood)
    trunk = [(cx - 4, cy - 12, cz + 34), (cx - 2, cy - 2, 22), (10, -8, 30)]
    canvas.tube(trunk, [14, 13.5, 13], patient.blood)
    canvas.tube([(10, -8, 30), (-20, 2, 26), (-46, 8, 18)], [12, 10.5, 8], patient.blood)
    canvas.tube([(10, -8, 30), (30, 8, 32), (48, 14, 24)], [12, 10.5, 8], patient.blood)
    canvas.tube([(-30, -14, 110), (-27, -12, 70), (-26, -6, 20), (cx - 42, cy + 10, cz + 20)], [6, 8.5, 9, 11],
                patient.blood)
    for x, y, tilt in ((-16, -6, -12), (-4, -8, -4), (12, 2, 12)):  # branches of the arch, towards the neck
        canvas.tube([(x * 0.5, y, arch + 6), (x + tilt * 0.6, y - 4, 125), (x + tilt, y - 6, 170)], 4.6, patient.blood)
    return aorta


def _paint_trachea_and_oesophagus(canvas: Canvas, patient: Patient) -> None:
    """Midline air with its wall, and the gullet behind it."""
    back = patient.spine_y - 20
    gullet = [(2, 16, 170), (3, 19, 60), (2, back - 12, 10), (8, back - 14, patient.diaphragm + 20), (16, back - 20,
              patient.diaphragm - 8)]
    canvas.tube(gullet, 7.5, 38.0)
    canvas.tube(gullet[:3], 1.6, -500.0)
    trachea = [(0, 0, 170), (0, 4, 90), (-2, 7, 44)]
    canvas.tube(trachea, 10.2, 35.0)
    for end, radius in (((-32, 10, 16), 7.2), ((36, 13, 12), 6.5)):
        canvas.tube([(-2, 7, 44), end], [8.4, radius + 1.6], 35.0)
    canvas.tube(trachea, 8.6, AIR)
    for end, radius in (((-32, 10, 16), 7.2), ((36, 13, 12), 6.5)):
        canvas.tube([(-2, 7, 44), end], [7, radius], AIR)


def _paint_trees(
    canvas: Canvas, patient: Patient, lungs: tuple[Array, Array], heart: Array, rng: np.random.Generator
) -> tuple[list[Branch], list[Branch]]:
    """Bronchi with the arteries at their side, and veins between them, grown to fill each lung."""
    airways: list[list[Branch]] = []
    for lung, hilum, left_atrium in ((lungs[0], (-32.0, 10.0, 16.0), (-14.0, 20.0, 0.0)),
                                     (lungs[1], (36.0, 13.0, 12.0), (26.0, 22.0, -2.0))):
        targets = _points_within(canvas, lung, 300, rng)
        bronchi = grow_tree(np.array(hilum), targets, root_radius=5.4, leaf_radius=0.62, rng=rng)
        # Branches are straight, the lung is not convex: those that would cut through the heart are left out.
        bronchi = [b for b in bronchi if min(canvas.value_at(heart, p) for p in (b.start, b.end)) > b.start_radius + 3]
        shift = rng.normal(0, 1, 3)
        shift /= np.linalg.norm(shift)
        companions = [branch.beside(shift) for branch in bronchi]
        veins = grow_tree(np.array(left_atrium), _points_within(canvas, lung, 240, rng), root_radius=6.0,
                          leaf_radius=0.9, rng=rng)
        inside = np.minimum(lung * 1.5, 1)
        for branch in (*companions, *veins):
            canvas.tube([branch.start, branch.end], [branch.start_radius, branch.end_radius], patient.blood, inside)
        for branch in bronchi:
            if branch.end_radius > 0.95:  # smaller airways are below the resolution of CT
                paint_airway(canvas, branch, wall=0.9)
        airways.append(bronchi)
    return airways[0], airways[1]


def paint_airway(canvas: Canvas, branch: Branch, wall: float, dilation: float = 1.0) -> None:
    """An airway: soft-tissue wall (mm thick) around air; ``dilation`` widens the lumen."""
    radii = [branch.start_radius * dilation, branch.end_radius * dilation]
    canvas.tube([branch.start, branch.end], [radius + wall for radius in radii], 15.0)
    canvas.tube([branch.start, branch.end], radii, -980.0)


def _points_within(canvas: Canvas, share: Array, count: int, rng: np.random.Generator) -> np.ndarray:
    """Random points (mm) well inside a structure."""
    chosen = rng.choice(np.flatnonzero(share > 0.99), count)
    index = np.unravel_index(chosen, share.shape)
    return np.stack([axis.ravel()[i] for axis, i in zip((canvas.x, canvas.y, canvas.z), index, strict=True)], axis=1)
