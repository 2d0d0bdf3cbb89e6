"""What runs inside Triton's Python back end; its processes import this package, which must be installed there.

``triton_python_backend_utils`` exists only there, and brings requests and responses.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import BundleError, DcformerError, InputError
from ..model import load
from ..results import Prepared

#: Of the repository's folder, beside the one with the models.
BUNDLE = "bundle"


class _Model:
    """One request at a time: what one client asks cannot spoil what others do."""

    def initialize(self, args: dict[str, str]) -> None:
        """Called once by Triton."""
        self._pb: Any = importlib.import_module("triton_python_backend_utils")
        config = json.loads(args["model_config"])
        self._parameters = {name: value["string_value"] for name, value in config["parameters"].items()}
        self._outputs = {output["name"]: self._pb.triton_string_to_numpy(output["data_type"])
                         for output in config["output"]}
        folder = Path(args["model_repository"]).parent.parent / BUNDLE
        self._model = load(folder, self._parameters["device"], backend=self._parameters["backend"],
                           precision=self._parameters["precision"])
        if self._model.manifest.digest != self._parameters["manifest_sha256"]:
            raise BundleError(f"{folder}: not the bundle that the repository was made of; run `dcformer triton` again")

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Called by Triton: a response, or an error, for each request."""
        return [self._respond(request) for request in requests]

    def _respond(self, request: Any) -> Any:
        try:
            feeds = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
            outputs = self.answer(feeds)
        except DcformerError as error:
            code = self._pb.TritonError.INVALID_ARG if isinstance(error, InputError) else self._pb.TritonError.INTERNAL
            return self._pb.InferenceResponse(error=self._pb.TritonError(str(error), code))
        return self._pb.InferenceResponse([self._pb.Tensor(name, np.ascontiguousarray(outputs[name], dtype))
                                     for name, dtype in self._outputs.items()])

    def answer(self, feeds: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Outputs by name, of inputs ``[batch, …]``."""
        raise NotImplementedError


class Preprocess(_Model):
    """SCAN ``[batch, 1]``, paths below the folder of scans -> what the image tower reads."""

    def answer(self, feeds: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """See _Model."""
        scans = [self._model.prepare(self._inside(path)).feeds for path in _texts(feeds["SCAN"])]
        return {name: np.concatenate([scan[name] for scan in scans]) for name in scans[0]}

    def _inside(self, given: str) -> Path:
        """A client may not have the server read whatever it can."""
        root = Path(self._parameters["scans"]).resolve()
        try:
            path = (root / given).resolve()
        except (OSError, ValueError) as error:  # a null character, a loop of links
            raise InputError("a path that cannot be one") from error
        if root not in path.parents:
            raise InputError(f"{given}: not below the folder of scans that this server was set up with")
        return path


class Image(_Model):
    """The image tower, by the back end that the repository was made for."""

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """All requests that Triton has gathered in one inference."""
        feeds = [{tensor.name(): tensor.as_numpy() for tensor in request.inputs()} for request in requests]
        scans = [Prepared("request", {name: array[index : index + 1] for name, array in one.items()})
                 for one in feeds for index in range(len(next(iter(one.values()))))]
        try:
            embeddings = self._model.embed_batch(scans)
        except DcformerError as error:
            failure = self._pb.TritonError(str(error), self._pb.TritonError.INTERNAL)
            return [self._pb.InferenceResponse(error=failure)] * len(requests)
        ends = np.cumsum([len(next(iter(one.values()))) for one in feeds])
        return [self._pb.InferenceResponse([self._pb.Tensor("image_embedding", np.ascontiguousarray(rows, np.float32))])
                for rows in np.split(embeddings, ends[:-1])]


class Text(_Model):
    """The text tower."""

    def answer(self, feeds: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """See _Model."""
        return {"text_embedding": self._model.embed_tokens(feeds["input_ids"], feeds["attention_mask"])}


class Tokenize(_Model):
    """TEXT ``[batch, 1]`` -> token ids and mask, padded to the longest of the request."""

    def answer(self, feeds: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """See _Model."""
        ids, mask = self._model.tokenize(_texts(feeds["TEXT"]))
        return {"input_ids": ids, "attention_mask": mask}


class Scores(_Model):
    """image_embedding ``[batch, d]`` -> the same, and zero-shot scores ``[batch, classes]``."""

    def answer(self, feeds: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """See _Model."""
        return {**feeds, "scores": self._model.score_embeddings(feeds["image_embedding"])}


def _texts(values: NDArray[np.object_]) -> list[str]:
    try:
        return [value.decode("utf-8") for value in values[:, 0]]
    except UnicodeDecodeError as error:
        raise InputError("a text that is not UTF-8") from error
