"""Radiology reports for phantoms, in CT-RATE's style: findings sentence by sentence, then an impression."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ...runtime.manifest import CT_RATE_CLASSES
from .words import Drawn

#: Per finding: ways to state it, "{}" standing for the painter's words; ways to deny it; how the impression names it.
_PHRASES: dict[str, tuple[tuple[str, ...], tuple[str, ...], str]] = {
    "Medical material": (
        ("There is a {}.", "A {} is observed.", "{} is present."),
        ("No catheter, wire or device is seen.", "There is no medical material."), "Medical material: {}"),
    "Arterial wall calcification": (
        ("There are {} calcified atheromatous plaques on the aortic wall.",
         "{} calcification of the wall of the thoracic aorta is observed."),
        ("The aortic wall is free of calcification.", "No arterial wall calcification is seen."),
        "Arterial wall calcification"),
    "Cardiomegaly": (
        ("The heart is enlarged, {}.", "Heart size is increased ({}).", "Cardiomegaly is observed, {}."),
        ("Heart size is normal.", "Heart contour and size are within normal limits."), "Cardiomegaly"),
    "Pericardial effusion": (
        ("Pericardial effusion {} is observed.", "There is an effusion in the pericardial space, {}."),
        ("Pericardial effusion was not detected.", "There is no pericardial fluid."), "Pericardial effusion"),
    "Coronary artery wall calcification": (
        ("Calcifications are seen on the walls of the coronary arteries ({}).",
         "There is coronary artery wall calcification ({})."),
        ("The coronary arteries show no calcification.", "No coronary calcification is seen."),
        "Coronary artery wall calcification"),
    "Hiatal hernia": (
        ("A hiatal hernia {} is observed.", "Part of the stomach has herniated through the hiatus, {}."),
        ("There is no hiatal hernia.", "The oesophageal hiatus is unremarkable."), "Hiatal hernia"),
    "Lymphadenopathy": (
        ("Enlarged lymph nodes are observed: {}.", "There is mediastinal lymphadenopathy ({})."),
        ("No lymph node in pathological size was detected.", "There is no mediastinal or hilar lymphadenopathy."),
        "Lymphadenopathy"),
    "Emphysema": (
        ("Emphysematous changes are seen, {}.", "There is {} emphysema."),
        ("No emphysema is seen.", "There is no emphysematous change."), "Emphysema"),
    "Atelectasis": (
        ("Atelectatic changes are observed in the {}.", "There is band atelectasis in the {}."),
        ("No atelectasis is seen.", "Both lungs are well expanded."), "Atelectasis, {}"),
    "Lung nodule": (
        ("There is evidence of {}.", "In the lung windows: {}."),
        ("No nodule was detected in either lung.", "There is no pulmonary nodule."), "Pulmonary nodule: {}"),
    "Lung opacity": (
        ("Ground-glass opacities are observed in the {}.", "There is hazy opacity in the {}."),
        ("There is no ground-glass opacity.", "No opacity is seen in the lung parenchyma."), "Lung opacity in the {}"),
    "Pulmonary fibrotic sequela": (
        ("Fibrotic sequela changes are seen in the {}.", "There are sequela fibrotic bands in the {}."),
        ("No fibrotic sequela is seen.", "There are no sequela changes."), "Pulmonary fibrotic sequelae, {}"),
    "Pleural effusion": (
        ("{} pleural effusion is observed.", "There is {} pleural effusion, layering dependently."),
        ("Pleural effusion was not detected.", "There is no pleural fluid on either side."), "{} pleural effusion"),
    "Mosaic attenuation pattern": (
        ("A mosaic attenuation pattern is seen in {}.", "Mosaic attenuation is observed in {}."),
        ("There is no mosaic attenuation.", "Parenchymal attenuation is homogeneous."), "Mosaic attenuation pattern"),
    "Peribronchial thickening": (
        ("{} peribronchial thickening is observed.", "The bronchial walls are thickened ({})."),
        ("Bronchial walls are of normal thickness.", "There is no peribronchial thickening."),
        "Peribronchial thickening"),
    "Consolidation": (
        ("There is consolidation in the {}.", "A consolidated area is observed in the {}."),
        ("No consolidation is seen.", "There is no consolidated area in either lung."), "Consolidation, {}"),
    "Bronchiectasis": (
        ("Bronchiectasis is observed in the {}.", "There are dilated bronchi in the {}."),
        ("The bronchi are of normal calibre; no bronchiectasis.", "No bronchiectasis is seen."), "Bronchiectasis, {}"),
    "Interlobular septal thickening": (
        ("Interlobular septal thickening is seen, {}.", "There is smooth thickening of the interlobular septa ({})."),
        ("The interlobular septa are not thickened.", "There is no interlobular septal thickening."),
        "Interlobular septal thickening"),
}
_OPENING = ("Trachea and both main bronchi are open.", "The trachea is in the midline and patent.",
            "No occlusive pathology is seen in the trachea and main bronchi.")
_CLOSING = ("Bone structures in the study area are natural.", "Vertebral body heights are preserved.",
            "Upper abdominal organs included in the sections are normal.", "No lytic or destructive lesion is seen.")
_NORMAL = ("Findings within normal limits.", "No acute pathology in the chest.", "Normal chest CT.")


@dataclass(frozen=True)
class Report:
    """``findings`` and ``impression`` as CT-RATE's columns ``Findings_EN`` and ``Impressions_EN``."""

    findings: str
    impression: str


def write_report(present: Mapping[str, Drawn], rng: np.random.Generator) -> Report:
    """A report that states every present finding and denies about half of the absent ones.

    Args:
        present: what was painted, by finding.
    """
    sentences = []
    for name in CT_RATE_CLASSES:
        stating, denying, _ = _PHRASES[name]
        if name in present:
            sentences.append(_filled(str(rng.choice(stating)), present[name].detail))
        elif rng.random() < 0.5:
            sentences.append(str(rng.choice(denying)))
    order = rng.permutation(len(sentences)) if rng.random() < 0.5 else np.arange(len(sentences))
    body = [sentences[i] for i in order]
    findings = " ".join([str(rng.choice(_OPENING)), *body, str(rng.choice(_CLOSING))])
    if not present:
        return Report(findings, str(rng.choice((*_NORMAL, "Not given."))))
    impression = (_filled(_PHRASES[name][2], present[name].detail) for name in CT_RATE_CLASSES if name in present)
    return Report(findings, " ".join(f"{sentence}." for sentence in impression))


def _filled(template: str, detail: str) -> str:
    text = template.replace("{}", detail)
    return text[0].upper() + text[1:]
