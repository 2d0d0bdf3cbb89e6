"""Findings in the lungs and airways. See ``findings``."""

from __future__ import annotations

import numpy as np

from .anatomy import AIR, Scene, paint_airway
from .canvas import Array, blur, smooth_noise
from .cells import lobules
from .words import Drawn, size_in_mm

SIDES = ("right", "left")


def _patches(scene: Scene, within: Array, share: float, size_mm: float, rng: np.random.Generator) -> Array:
    """Irregular patches that cover about ``share`` of ``within``, with soft borders."""
    field = smooth_noise(within.shape, [size_mm / s for s in scene.canvas.grid.spacing_mm], rng)
    field = field + 0.35 * smooth_noise(within.shape, [size_mm / 3 / s for s in scene.canvas.grid.spacing_mm], rng)
    inside = field[within > 0.5]
    if not inside.size:
        return np.zeros_like(within)
    threshold = float(np.quantile(inside, 1 - share))
    return np.clip((field - threshold) / 0.35, 0, 1) * within


def _lobe(scene: Scene, rng: np.random.Generator) -> tuple[int, str, Array]:
    """A lobe at random: side, name, and its share of each voxel (cut by height; fissures are not drawn)."""
    side = int(rng.integers(2))
    upper = bool(rng.integers(2))
    # The oblique fissure falls from the back, where it is high, to the front.
    fissure = scene.patient.diaphragm + 66 + 0.55 * scene.canvas.y
    cut = np.clip((scene.canvas.z - fissure) / 6, 0, 1)
    share = scene.lungs[side] * (cut if upper else 1 - cut)
    return side, f"{SIDES[side]} {'upper' if upper else 'lower'} lobe", share.astype(np.float32)


def _point_in(scene: Scene, share: Array, rng: np.random.Generator, depth: float = 0.0) -> np.ndarray:
    """A random point (mm) inside; ``depth`` mm away from the border."""
    inner = share if not depth else (blur(share, depth, scene.canvas.grid) > 0.93).astype(np.float32)
    candidates = np.flatnonzero(inner > 0.9)
    if not candidates.size:
        candidates = np.flatnonzero(share > share.max() * 0.9)
    index = np.unravel_index(rng.choice(candidates), share.shape)
    axes = (scene.canvas.x, scene.canvas.y, scene.canvas.z)
    return np.array([axis.ravel()[i] for axis, i in zip(axes, index, strict=True)])


def emphysema(scene: Scene, rng: np.random.Generator) -> Drawn:
    """Centrilobular: patches of destroyed lung as dark as air, mostly in the upper lobes; sometimes bullae."""
    canvas = scene.canvas
    upper = np.clip((canvas.z - scene.patient.diaphragm - 40) / 90, 0.15, 1)
    holes = _patches(scene, scene.both_lungs, rng.uniform(0.25, 0.5), 11, rng) * upper
    canvas.fill(0.9 * holes, -992.0)
    bullae = int(rng.integers(0, 5))
    for _ in range(bullae):
        side = int(rng.integers(2))
        top = scene.lungs[side] * (canvas.z > 40)
        radius = rng.uniform(8, 18)
        centre = _point_in(scene, top, rng)
        canvas.ellipsoid(centre, [radius + 1] * 3, -500.0, within=scene.lungs[side])
        canvas.ellipsoid(centre, [radius] * 3, AIR, within=scene.lungs[side])
    return Drawn("centrilobular, upper-lobe predominant" + (", with bullae" if bullae else ""))


def atelectasis(scene: Scene, rng: np.random.Generator) -> Drawn:
    """Plate-like bands near the bases, or a collapsed wedge against the pleura."""
    canvas, patient = scene.canvas, scene.patient
    sides = [0, 1] if rng.random() < 0.4 else [int(rng.integers(2))]
    for side in sides:
        base = scene.lungs[side]
        for _ in range(int(rng.integers(2, 5))):
            z = patient.diaphragm + rng.uniform(18, 62)
            tilt = rng.normal(0, 0.18, 2)
            plane = canvas.z - z - tilt[0] * canvas.x - tilt[1] * canvas.y
            x0 = (-1, 1)[side] * rng.uniform(0.35, 0.7) * patient.cavity_width
            y0 = rng.uniform(0.0, 0.7) * patient.cavity_depth
            extent = np.hypot((canvas.x - x0) / rng.uniform(24, 46), (canvas.y - y0) / rng.uniform(24, 42)) - 1
            band = np.maximum(np.abs(plane) - rng.uniform(1.8, 3.6), extent * 20)
            canvas.fill(canvas.coverage(band) * base, rng.uniform(-60, 35))
        bottom = np.maximum(0.62 * patient.cavity_depth - canvas.y + 0.4 * (canvas.z - patient.diaphragm), 0)
        wedge = np.clip(1 - bottom / 14, 0, 1) * (canvas.z < patient.diaphragm + 45) * base
        canvas.fill(0.85 * wedge, 20.0)
    return Drawn("lower lobes of both lungs" if len(sides) == 2 else f"{SIDES[sides[0]]} lower lobe")


def lung_nodule(scene: Scene, rng: np.random.Generator) -> Drawn:
    """Five to fourteen rounded nodules of 14 to 30 mm: solid, calcified, or ground glass with a solid core."""
    count = int(rng.integers(5, 15))
    largest, place = 0.0, ""
    kind = str(rng.choice(["solid", "solid", "calcified", "part-solid"]))
    value = {"solid": 35.0, "calcified": 420.0, "part-solid": -300.0}[kind]
    for _ in range(count):
        _, name, share = _lobe(scene, rng)
        radius = rng.uniform(7, 15)
        centre, radii = _point_in(scene, share, rng, depth=6), radius * rng.uniform(0.85, 1.15, 3)
        scene.canvas.ellipsoid(centre, radii, value, rough=0.5, rng=rng)
        if kind == "part-solid":
            scene.canvas.ellipsoid(centre, 0.65 * radii, 30.0, rough=0.5, rng=rng)
        if 2 * radius > largest:
            largest, place = 2 * radius, name
    return Drawn(f"{kind} nodules, the largest {size_in_mm(largest)} in the {place}")


def lung_opacity(scene: Scene, rng: np.random.Generator) -> Drawn:
    """Ground glass: hazy patches through which vessels can still be seen."""
    _, first, share = _lobe(scene, rng)
    _, second, other = _lobe(scene, rng)
    region = np.maximum(share, other)
    patches = _patches(scene, region, rng.uniform(0.35, 0.65), rng.uniform(22, 40), rng)
    # Adding, not replacing: what was brighter stays brighter.
    scene.canvas.hu += patches * rng.uniform(240, 400) * (scene.canvas.hu < -200)
    return Drawn(first if first == second else f"{first} and {second}")


def fibrotic_sequela(scene: Scene, rng: np.random.Generator) -> Drawn:
    """Scars: irregular bands that run to a thickened, drawn-in pleura, most often at the apices."""
    canvas = scene.canvas
    sides = [0, 1] if rng.random() < 0.5 else [int(rng.integers(2))]
    for side in sides:
        apex = scene.lungs[side] * (canvas.z > rng.uniform(50, 75))
        # Where the blurred lung has fallen under one half lies within a few mm of the pleura.
        depth = blur(scene.lungs[side], 5.0, canvas.grid)
        patchy = np.clip(1.5 * smooth_noise(apex.shape, [14 / s for s in canvas.grid.spacing_mm], rng) + 0.3, 0, 1)
        canvas.fill(np.clip((0.8 - depth) / 0.15, 0, 1) * patchy * apex, 10.0)
        for _ in range(int(rng.integers(6, 13))):
            start = _point_in(scene, apex, rng)
            hilum = np.array([(-36.0, 38.0)[side], 10.0, 22.0])
            steps = np.linspace(0, rng.uniform(0.3, 0.6), 5)
            path = [start + (hilum - start) * step + rng.normal(0, 3.5, 3) for step in steps]
            canvas.tube(path, [rng.uniform(2.0, 4.5) for _ in path], rng.uniform(-40, 60), scene.lungs[side])
    return Drawn("apices of both lungs" if len(sides) == 2 else f"{SIDES[sides[0]]} apex")


def mosaic_attenuation(scene: Scene, rng: np.random.Generator) -> Drawn:
    """Patchwork of darker and brighter lobules with sharp straight borders."""
    canvas = scene.canvas
    _, number = lobules(canvas, scene.both_lungs, rng.uniform(20, 30), rng)
    values = rng.choice([-75.0, 85.0], int(number.max()) + 1) + rng.normal(0, 12, int(number.max()) + 1)
    change = np.where(number >= 0, values[number], 0).astype(np.float32)
    canvas.hu += change * scene.both_lungs * (canvas.hu < -300)
    return Drawn("both lungs")


def peribronchial_thickening(scene: Scene, rng: np.random.Generator) -> Drawn:
    """Cuffs of soft tissue around bronchi of normal width."""
    wall = rng.uniform(2.6, 3.8)
    for side in (0, 1):
        for branch in scene.airways[side]:
            if branch.end_radius > 1.0 and branch.order <= 6:
                paint_airway(scene.canvas, branch, wall)
    return Drawn("central")


def consolidation(scene: Scene, rng: np.random.Generator) -> Drawn:
    """Airless lung of soft-tissue density that hides its vessels; the bronchi in it stay dark."""
    side, name, lobe = _lobe(scene, rng)
    centre = _point_in(scene, lobe, rng)
    canvas = scene.canvas
    radii = rng.uniform(28, 52, 3)
    distance = np.sqrt(sum(((axis - c) / r) ** 2 for axis, c, r in zip((canvas.x, canvas.y, canvas.z), centre, radii,
                                                                       strict=True)))
    ragged = distance + 0.13 * smooth_noise(lobe.shape, [16 / s for s in canvas.grid.spacing_mm], rng)
    core = np.clip((1 - ragged) / 0.12, 0, 1) * scene.lungs[side]
    halo = np.clip((1.35 - ragged) / 0.4, 0, 1) * scene.lungs[side]
    canvas.fill(0.3 * halo, -300.0)
    canvas.fill(core.astype(np.float32), 38.0 + 6 * smooth_noise(lobe.shape, 4, rng))
    for branch in scene.airways[side]:
        if branch.end_radius > 0.8 and np.linalg.norm((branch.end - centre) / radii) < 1.1:
            canvas.tube([branch.start, branch.end], [branch.start_radius * 1.1, branch.end_radius * 1.2], -950.0)
    return Drawn(f"{name} with air bronchograms")


def bronchiectasis(scene: Scene, rng: np.random.Generator) -> Drawn:
    """Bronchi wider than the artery at their side that do not taper: tram tracks and signet rings, sometimes cysts."""
    canvas = scene.canvas
    side = int(rng.integers(2))
    sides = [0, 1] if rng.random() < 0.4 else [side]
    for one in sides:
        wide = [branch for branch in scene.airways[one] if branch.end_radius > 0.75 and 2 <= branch.order <= 8]
        lumina = [max(2.9, branch.end_radius * 1.9) * rng.uniform(0.9, 1.25) for branch in wide]
        for branch, lumen in zip(wide, lumina, strict=True):
            canvas.tube([branch.start, branch.end], lumen + 1.6, 10.0)
        for branch, lumen in zip(wide, lumina, strict=True):  # last, so that no wall closes a neighbour's lumen
            canvas.tube([branch.start, branch.end], lumen, AIR)
    return Drawn("both lungs" if len(sides) == 2 else f"{SIDES[sides[0]]} lung")


def septal_thickening(scene: Scene, rng: np.random.Generator) -> Drawn:
    """A net of polygons, the walls of the secondary lobules, most of it near the pleura and the bases."""
    canvas = scene.canvas
    lungs = scene.both_lungs
    distance, _ = lobules(canvas, lungs, rng.uniform(13, 18), rng)
    depth = blur(lungs, 9.0, canvas.grid)  # 0.5 at the pleura, 1 in the middle
    near_pleura = np.clip((1.05 - depth) / 0.3, 0.25, 1)
    wall = canvas.coverage(distance - rng.uniform(0.5, 0.9))
    canvas.fill(wall * lungs * near_pleura * 0.9, -180.0)
    return Drawn("subpleural and basal")
