"""The 18 findings of CT-RATE, drawn the way radiology describes them.

The words are those of the Fleischner Society's glossary (Bankier et al., Radiology 2024).

Each painter changes the scene and returns how a report would call what it drew.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from ...runtime.manifest import CT_RATE_CLASSES
from .anatomy import FLUID, Patient, Scene
from .canvas import smooth_noise
from .lung_findings import (
    atelectasis,
    bronchiectasis,
    consolidation,
    emphysema,
    fibrotic_sequela,
    lung_nodule,
    lung_opacity,
    mosaic_attenuation,
    peribronchial_thickening,
    septal_thickening,
)
from .words import Drawn, size_in_mm

Painter = Callable[[Scene, np.random.Generator], Drawn]


def enlarge_heart(patient: Patient, rng: np.random.Generator) -> Patient:
    """Cardiomegaly is decided before anything is painted: lungs and diaphragm make room for the heart."""
    return replace(patient, heart_radius=patient.heart_radius * rng.uniform(1.24, 1.42))


def cardiomegaly(scene: Scene, rng: np.random.Generator) -> Drawn:
    """Already painted; only the words are left."""
    return Drawn(f"transverse diameter {2 * scene.patient.heart_radii[0]:.0f} mm")


def medical_material(scene: Scene, rng: np.random.Generator) -> Drawn:
    """A pacemaker with its lead, a central venous port, or the wires of a sternotomy."""
    canvas, patient = scene.canvas, scene.patient
    kind = rng.choice(["pacemaker", "port", "wires"])
    front = -patient.cavity_depth - 12
    if kind == "wires":
        angles = np.linspace(0, 2 * np.pi, 14)
        for z in np.linspace(72, -30, rng.integers(6, 9)):
            ring = [(19 * np.cos(a), front + 2 + 11 * np.sin(a), z + 2 * np.sin(2 * a)) for a in angles]
            canvas.tube(ring, 2.2, 3000.0)
            x = rng.uniform(-5, 5)  # the ends, twisted together in front of the sternum
            canvas.tube([(x, front - 9, z), (x + rng.uniform(-4, 4), front - 16, z + rng.uniform(-3, 3))], 2.8, 3000.0)
        return Drawn("sternotomy wires")
    side = 1 if kind == "pacemaker" else -1
    place = (side * rng.uniform(70, 92), front + rng.uniform(4, 14), rng.uniform(66, 86))
    vein = [(place[0] - side * 8, place[1] + 12, place[2] + 14), (side * 34, -16, 112), (-26, -12, 92), (-26, -8, 34)]
    if kind == "pacemaker":
        canvas.ellipsoid(place, (23, 6, 21), 3000.0)
        cx, cy, cz = patient.heart_centre
        canvas.tube([*vein, (cx - 30, cy + 4, cz + 6), (cx + 26, cy - 16, cz - 26)], 2.2, 2600.0)
        return Drawn("pacemaker with its lead in the right ventricle")
    canvas.ellipsoid(place, (12, 7, 12), 2200.0)
    canvas.tube(vein, 2.4, 1400.0)
    return Drawn("central venous port with its tip in the superior vena cava")


def arterial_calcification(scene: Scene, rng: np.random.Generator) -> Drawn:
    """Plaques on the wall of the aortic arch and descending aorta."""
    points = np.asarray(scene.aorta, float)
    radius = scene.patient.aorta_radius
    count = int(rng.integers(10, 27))
    for _ in range(count):
        index = int(rng.integers(2, len(points) - 2))
        start, end = points[index], points[index + 1]
        axis = (end - start) / np.linalg.norm(end - start)
        across = np.cross(axis, rng.normal(0, 1, 3))
        across /= np.linalg.norm(across)
        centre = start + rng.uniform(0, 1) * (end - start) + across * radius * 1.06
        along = np.cross(axis, across)
        reach = rng.uniform(3, 9)
        shape = [centre - along * reach - across * 0.6, centre, centre + along * reach - across * 0.6]
        scene.canvas.tube(shape, rng.uniform(2.2, 3.8), rng.uniform(650, 1250))
    return Drawn("extensive" if count > 18 else "scattered")


def coronary_calcification(scene: Scene, rng: np.random.Generator) -> Drawn:
    """Beads and streaks along the course of the coronary arteries on the heart's surface."""
    arteries = {"left anterior descending": (-0.25, -1.0), "circumflex": (0.55, 0.75), "right coronary": (-2.1, -0.9)}
    chosen = list(rng.choice(list(arteries), int(rng.integers(2, 4)), replace=False))
    cx, cy, cz = scene.patient.heart_centre
    for name in chosen:
        azimuth, slope = arteries[name]
        for position in np.sort(rng.uniform(0.1, 0.85, rng.integers(5, 10))):
            streak = []
            for step in np.linspace(0, rng.uniform(0.06, 0.14), 4):
                t = position + step
                direction = np.array([np.cos(azimuth + 0.5 * t), np.sin(azimuth + slope * t * 0.6), 0.75 - 1.5 * t])
                direction /= np.linalg.norm(direction)
                streak.append(_on_heart(scene, (cx, cy, cz), direction))
            scene.canvas.tube(streak, rng.uniform(2.4, 3.8), rng.uniform(700, 1300))
    return Drawn(" and ".join(chosen))


def _on_heart(scene: Scene, centre: tuple[float, float, float], direction: np.ndarray) -> np.ndarray:
    """The point of the heart's surface in a direction from its centre, by walking the distance field outward."""
    for reach in np.arange(20.0, 90.0, 1.0):
        point = np.asarray(centre) + reach * direction
        if scene.canvas.value_at(scene.heart, point) > 0.5:
            return point
    return np.asarray(centre) + 50 * direction


def pericardial_effusion(scene: Scene, rng: np.random.Generator) -> Drawn:
    """Fluid between heart and pericardium, thicker behind and below, the pericardium a thin line around it."""
    canvas = scene.canvas
    _, cy, cz = scene.patient.heart_centre
    thickness = rng.uniform(7, 20)
    dependent = 1 + 0.35 * np.clip((canvas.y - cy) / 45, -1, 1) - 0.25 * np.clip((canvas.z - cz) / 45, -1, 1)
    outer = scene.heart - thickness * dependent
    above_diaphragm = canvas.coverage(-(canvas.z - (scene.patient.diaphragm - 16)))
    canvas.fill(canvas.coverage(np.maximum(outer - 1.8, -scene.heart)) * above_diaphragm, 45.0)
    canvas.fill(canvas.coverage(np.maximum(outer, -scene.heart)) * above_diaphragm, FLUID + rng.uniform(-4, 10))
    return Drawn(f"measuring {size_in_mm(thickness)} in thickness")


def hiatal_hernia(scene: Scene, rng: np.random.Generator) -> Drawn:
    """Stomach that slid up behind the heart: a rounded mass with a wall, fat or an air-fluid level inside."""
    canvas, patient = scene.canvas, scene.patient
    radius = rng.uniform(21, 36)
    centre = (rng.uniform(4, 18), patient.spine_y - 24 - 0.6 * radius, patient.diaphragm + 12 + 0.5 * radius)
    radii = (radius * 1.15, radius * 0.85, radius)
    canvas.ellipsoid(centre, radii, 42.0, rough=2.0, rng=rng)
    where = canvas.around(np.subtract(centre, radii), np.add(centre, radii))
    x, y, z = canvas.local(where)
    inner = np.sqrt(sum(((a - c) / (r - 4)) ** 2 for a, c, r in zip((x, y, z), centre, radii, strict=True)))
    level = centre[1] + rng.uniform(-0.4, 0.25) * radius
    content = np.where(y < level, -950.0, rng.uniform(10, 35))
    share = canvas.coverage((inner - 1) * radius)
    canvas.blend(where, share, np.broadcast_to(content, share.shape).astype(np.float32))
    return Drawn("with an air-fluid level behind the heart")


def lymphadenopathy(scene: Scene, rng: np.random.Generator) -> Drawn:
    """Bulky nodes at both hila, as in sarcoidosis, and in the mediastinal fat: they bulge into the lungs."""
    hila = {"right hilar": (-54, 2, 2), "left hilar": (57, 6, 2)}
    mediastinum = {"right paratracheal": (-24, 0, 66), "prevascular": (4, -34, 52), "subcarinal": (2, 20, 12),
                   "aortopulmonary": (36, -10, 46)}
    chosen = hila | {str(name): mediastinum[name]
                     for name in rng.choice(list(mediastinum), int(rng.integers(1, 5)), replace=False)}
    largest = 0.0
    for place in chosen.values():
        for _ in range(int(rng.integers(1, 4))):
            radius = rng.uniform(11, 19)
            largest = max(largest, 2 * radius)
            centre = np.add(place, rng.normal(0, 6, 3))
            scene.canvas.ellipsoid(centre, radius * rng.uniform(0.8, 1.25, 3), 46.0, rough=1.0, rng=rng)
    return Drawn(f"{', '.join(chosen)}, the largest {size_in_mm(largest)}")


def pleural_effusion(scene: Scene, rng: np.random.Generator) -> Drawn:
    """Free fluid: it layers at the back of a patient who lies, rises towards the base, and ends in a meniscus."""
    canvas, patient = scene.canvas, scene.patient
    sides = ((0,), (1,), (0, 1))[int(rng.integers(3))]
    for side in sides:
        depth = rng.uniform(16, 58)
        level = patient.cavity_depth - depth + 0.20 * (canvas.z - patient.diaphragm) + rng.uniform(-3, 3)
        lateral = 10 * (np.abs(canvas.x) / patient.cavity_width) ** 2  # the meniscus creeps up the side
        fluid = np.maximum(level - lateral - canvas.y, canvas.z - (patient.diaphragm + 165))
        share = canvas.coverage(fluid + 1.5 * smooth_noise(canvas.grid.shape, 12, rng)) * scene.lungs[side]
        canvas.fill(share, FLUID + rng.uniform(-6, 12))
        collapsed = np.clip(canvas.coverage(fluid - rng.uniform(4, 11)) - share, 0, 1) * scene.lungs[side]
        canvas.fill(collapsed * 0.85, 10.0)  # the lung beside it loses its air
    return Drawn({(0,): "right", (1,): "left", (0, 1): "bilateral"}[sides])


#: In label order.
PAINTERS: dict[str, Painter] = dict(zip(CT_RATE_CLASSES, (
    medical_material, arterial_calcification, cardiomegaly, pericardial_effusion, coronary_calcification, hiatal_hernia,
    lymphadenopathy, emphysema, atelectasis, lung_nodule, lung_opacity, fibrotic_sequela, pleural_effusion,
    mosaic_attenuation, peribronchial_thickening, consolidation, bronchiectasis, septal_thickening,
), strict=True))
