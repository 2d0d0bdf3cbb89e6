"""Writes the repository: models, and beside them the bundle that those in Python load."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

from ..backends import Options
from ..bundle import Bundle, copy_files, open_bundle, write_manifest
from ..engines import LIBRARIES, EngineRecord, find_engine, read_engine
from ..errors import BundleError, InputError
from ..files import atomic_folder
from ..manifest import Graph
from .config import FILES, Serving, models
from .serving import BUNDLE

#: Of a folder that ``write_repository`` made.
INFO_NAME = "triton.json"
MODELS = "models"


def write_repository(bundle: Bundle, serving: Serving, out: Path, force: bool) -> tuple[list[str], EngineRecord | None]:
    """Write ``out``, whole or not at all.

    Returns:
        Names of the models, and the record of the image tower's engine if it is one.

    Raises:
        InputError: ``out`` is there already.
        BundleError, EngineRefused: the bundle lacks a tower, or an engine, in this precision.
    """
    towers = {role: _graph(bundle, role, serving) for role in ("image", "text")}
    image = towers["image"]
    assert image is not None  # a bundle without one is refused when it is opened
    engines = {role: find_engine(bundle, role, serving.precision, serving.backend, None)
               for role, graph in towers.items() if graph is not None} if serving.backend in LIBRARIES else {}
    for record in engines.values():
        largest = min(max(shapes.largest[0] for shapes in profile.values()) for profile in record.profiles)
        if largest < serving.max_batch:
            raise InputError(f"--max-batch {serving.max_batch}: {record.engine} was built for at most {largest}; pass "
                             "less, or build it with a larger --max-batch")
    made = models(bundle.manifest, serving, image, towers["text"])
    with atomic_folder(out, replace_if_it_holds=INFO_NAME if force else None) as new:
        for model in made:
            folder = new / MODELS / model.config.name
            (folder / "1").mkdir(parents=True)
            (folder / "config.pbtxt").write_text(model.text(), encoding="utf-8")
            for name, content in model.files.items():
                (folder / name).write_text(content, encoding="utf-8")
            if model.module is not None:
                (folder / "1" / FILES["python"]).write_text(
                    f"from dcformer_deploy.runtime.triton.serving import {model.module} as TritonPythonModel\n"
                    '\n__all__ = ["TritonPythonModel"]\n', encoding="utf-8")
            elif serving.tower == "tensorrt" and model.role in engines:
                (folder / "1" / FILES["tensorrt"]).write_bytes(read_engine(bundle, engines[model.role]))
            elif model.role is not None and (graph := towers[model.role]) is not None:
                shutil.copyfile(bundle.path(graph.file), folder / "1" / FILES["onnxruntime"])
                if graph.weights is not None:
                    shutil.copyfile(bundle.path(graph.weights), folder / "1" / graph.weights)
        (new / BUNDLE).mkdir()
        copy_files(bundle, new / BUNDLE, without=())
        write_manifest(new / BUNDLE, bundle.manifest)
        open_bundle(new / BUNDLE, engines=True)
        (new / INFO_NAME).write_text(json.dumps({"manifest_sha256": bundle.manifest.digest,
                                                 **dataclasses.asdict(serving)}, indent=2), encoding="utf-8")
    return [model.config.name for model in made], engines.get("image")


def _graph(bundle: Bundle, role: str, serving: Serving) -> Graph | None:
    """What the tower's back end runs, as the runtime would choose it; None for a tower that the bundle does not have.

    Raises:
        BundleError: not in this precision.
    """
    if bundle.manifest.graph(role) is None:
        return None
    options = Options(serving.device, None, serving.backend, serving.precision)
    graph = bundle.manifest.graph(role, options.graph_precision, options.target)
    if graph is None:
        raise BundleError(f"{bundle.folder}: no {role} tower in {serving.precision} for {serving.backend}; `dcformer "
                          "calibrate` adds precisions")
    return graph
