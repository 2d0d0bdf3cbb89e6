"""``config.pbtxt`` of every model, by Triton's own protobuf definitions. Needs ``pip install '.[triton]'``.

A scan comes as the path of a file that the server can read, so that no request carries it:

``NAME``, an ensemble: SCAN -> preprocess -> lines or volume -> image -> embedding -> scores -> image_embedding, scores;
``NAME_embed_text``, another: TEXT -> tokenize -> ids and mask -> text -> text_embedding.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2
from tritonclient.utils import np_to_triton_dtype

from ..manifest import Graph, Manifest, TensorInfo

_pb: Any = model_config_pb2  # its messages are made at run time; a type checker knows none of them
FILES = {"onnxruntime": "model.onnx", "tensorrt": "model.plan", "python": "model.py"}
_LABELS = "labels.txt"
#: Outputs of towers that clients of the ensembles do not get; they can ask the tower itself.
_ONLY_OF_TOWERS = ("feature_map", "codes", "class_scores")
_SCAN = TensorInfo("SCAN", "object", (1,))
_TEXT = TensorInfo("TEXT", "object", (1,))


@dataclass(frozen=True)
class Serving:
    """How a bundle is served.

    ``tower``: Triton's back end for image and text tower; "python" runs this project's runtime, with whatever back end
    it has. ``instances``: copies of each tower. ``readers``: processes that read and preprocess scans. ``delay_us``:
    how long a request may wait for others to be computed with. ``scans``: the folder that paths of scans must lie in.
    """

    name: str
    tower: str
    device: str
    backend: str
    precision: str
    instances: int
    readers: int
    max_batch: int
    delay_us: int
    scans: str


@dataclass(frozen=True)
class Model:
    """A model of the repository.

    ``config``: a ModelConfig. ``module``: name of what its ``model.py`` runs. ``role``: of the tower whose graph or
    engine it runs. ``files``: others, by name.
    """

    config: Any
    module: str | None = None
    role: str | None = None
    files: Mapping[str, str] = field(default_factory=dict)

    def text(self) -> str:
        """``config.pbtxt``."""
        text = text_format.MessageToString(self.config)
        assert text_format.Parse(text, _pb.ModelConfig()) == self.config
        return text


def models(manifest: Manifest, serving: Serving, image: Graph, text: Graph | None) -> list[Model]:
    """All models of a bundle.

    Args:
        image, text: graphs of the towers; without a text tower no texts are embedded, and without prompts there are no
            scores.
    """
    name, inputs = serving.name, [_single(info) for info in image.inputs]
    embedding = TensorInfo("image_embedding", "float32", (manifest.embedding_dim,))
    made = [Model(_python(f"{name}_preprocess", manifest, serving, [_SCAN], inputs, serving.readers), "Preprocess"),
            _tower(f"{name}_image", manifest, serving, image)]
    steps, outputs = [_step(made[0].config), _step(made[1].config)], [embedding]
    if (task := manifest.zero_shot) is not None:
        scores = TensorInfo("scores", "float32", (len(task.classes),))
        labels = {_LABELS: "".join(f"{name}\n" for name in task.classes)}
        made.append(Model(_labelled(_python(f"{name}_scores", manifest, serving, [embedding], [embedding, scores], 1)),
                          "Scores", files=labels))
        # What one step hands to the next must not be an output, too: a client that did not ask for it would stop both.
        steps[-1].output_map[embedding.name] = "tower_embedding"
        steps.append(_step(made[-1].config))
        steps[-1].input_map[embedding.name] = "tower_embedding"
        outputs.append(scores)
        made.append(Model(_labelled(_ensemble(name, manifest, serving, [_SCAN], outputs, steps)), files=labels))
    else:
        made.append(Model(_ensemble(name, manifest, serving, [_SCAN], outputs, steps)))
    if text is not None and manifest.text is not None:
        tokens = [_single(info) for info in text.inputs]
        made += [Model(_python(f"{name}_tokenize", manifest, serving, [_TEXT], tokens, 1), "Tokenize"),
                 _tower(f"{name}_text", manifest, serving, text)]
        outputs = [TensorInfo("text_embedding", "float32", (manifest.embedding_dim,))]
        made.append(Model(_ensemble(f"{name}_embed_text", manifest, serving, [_TEXT], outputs,
                                    [_step(model.config) for model in made[-2:]])))
    return made


def _tower(name: str, manifest: Manifest, serving: Serving, graph: Graph) -> Model:
    inputs, outputs = ([_single(info) for info in infos] for infos in (graph.inputs, graph.outputs))
    if serving.tower == "python":
        outputs = [info for info in outputs if info.name.endswith("_embedding")]
        config = _python(name, manifest, serving, inputs, outputs, serving.instances)
    else:
        config = _config(name, manifest, serving, inputs, outputs, backend=serving.tower)
        config.default_model_filename = FILES[serving.tower]
        kind = "KIND_GPU" if serving.device == "cuda" else "KIND_CPU"
        config.instance_group.add(count=serving.instances, kind=kind)
    config.dynamic_batching.max_queue_delay_microseconds = serving.delay_us
    warmup = config.model_warmup.add(name="zeros", batch_size=1, count=1)
    for info in inputs:
        # An axis that varies is a text's length.
        dims = [side if isinstance(side, int) else 8 for side in info.axes]
        warmup.inputs[info.name].data_type = _dtype(info)
        warmup.inputs[info.name].dims.extend(dims)
        warmup.inputs[info.name].zero_data = True
    if serving.tower == "python":
        return Model(config, module=graph.role.capitalize())
    return Model(config, role=graph.role)


def _python(name: str, manifest: Manifest, serving: Serving, inputs: Iterable[TensorInfo],
            outputs: Iterable[TensorInfo], count: int) -> Any:
    """A model in Python is told by parameters which bundle to load, and how."""
    config = _config(name, manifest, serving, inputs, outputs, backend="python")
    config.instance_group.add(count=count, kind="KIND_CPU")
    for key in ("device", "backend", "precision", "scans"):
        config.parameters[key].string_value = str(getattr(serving, key))
    return config


def _ensemble(name: str, manifest: Manifest, serving: Serving, inputs: Iterable[TensorInfo],
              outputs: Iterable[TensorInfo], steps: Sequence[Any]) -> Any:
    config = _config(name, manifest, serving, inputs, outputs, platform="ensemble")
    config.ensemble_scheduling.step.extend(steps)
    return config


def _step(config: Any) -> Any:
    """Tensors have the same names in all models; a tower's other outputs, such as codes, lead nowhere."""
    step = _pb.ModelEnsembling.Step(model_name=config.name, model_version=-1)
    for tensors, mapped in ((config.input, step.input_map), (config.output, step.output_map)):
        for tensor in tensors:
            if tensor.name not in _ONLY_OF_TOWERS:
                mapped[tensor.name] = tensor.name
    return step


def _config(name: str, manifest: Manifest, serving: Serving, inputs: Iterable[TensorInfo],
            outputs: Iterable[TensorInfo], **kind: str) -> Any:
    config = _pb.ModelConfig(name=name, max_batch_size=serving.max_batch, **kind)
    config.version_policy.latest.num_versions = 1
    for infos, tensors in ((inputs, config.input), (outputs, config.output)):
        for info in infos:
            tensors.add(name=info.name, data_type=_dtype(info),
                        dims=[side if isinstance(side, int) else -1 for side in info.axes])
    config.parameters["manifest_sha256"].string_value = manifest.digest
    return config


def _labelled(config: Any) -> Any:
    """With names of the classes, for clients that ask for the highest scores."""
    for output in config.output:
        if output.name == "scores":
            output.label_filename = _LABELS
    return config


def _single(info: TensorInfo) -> TensorInfo:
    """Without the batch, which Triton adds."""
    return TensorInfo(info.name, info.dtype, info.axes[1:])


def _dtype(info: TensorInfo) -> int:
    name = np_to_triton_dtype(np.object_ if info.dtype == "object" else np.dtype(info.dtype))
    return _pb.DataType.Value("TYPE_STRING" if name == "BYTES" else f"TYPE_{name}")
