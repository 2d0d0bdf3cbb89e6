"""What runs on the GPU: each holds its inputs there and enqueues one inference at a time."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ...runtime.backends import Options
from ...runtime.backends.device import Device, Stream
from ...runtime.backends.onnxruntime import import_onnxruntime
from ...runtime.backends.tensorrt import Resident, TensorRtBackend
from ...runtime.bundle import Bundle
from ...runtime.engines import GPU_TARGET, LIBRARIES, engine_records
from ...runtime.errors import DeviceUnavailable, InputError
from ...runtime.volume import image_feeds
from ..contenders.pytorch_eager import build_clip
from .clock import Enqueues

#: PyTorch: dtype, memory format, and whether it is compiled. float32 is float32, not TF32.
TORCH = {"torch-fp32": ("float32", "contiguous_format", False), "torch-fp16": ("float16", "contiguous_format", False),
         "torch-fp16-channels-last": ("float16", "channels_last_3d", False),
         "torch-compile-fp16": ("float16", "contiguous_format", True)}
#: Those that are tuned and compiled for each batch anew.
COMPILED = tuple(name for name, (_, _, is_compiled) in TORCH.items() if is_compiled)
#: ONNX Runtime's CUDA, by precision of the graph.
ONNXRUNTIME = {"onnxruntime-cuda-fp32": "fp32", "onnxruntime-cuda-fp16": "fp16"}
_EMBEDDING = "image_embedding"


class Contender(Enqueues, Protocol):
    """``precision``: as of graphs. ``build_s``: of an engine."""

    precision: str
    build_s: float | None

    def embeddings(self) -> NDArray[np.float32]:
        """Of the last inference, ``[batch, 512]``; waits for it."""
        ...

    def own_bytes(self) -> int:
        """Device memory that the library says it holds."""
        ...

    def describe(self) -> str:
        """Library and version."""
        ...


@dataclass(frozen=True)
class Work:
    """``volumes``: ``[batch, D, H, W]``, preprocessed. ``checkpoint``: the bundle's, if weights have no seed."""

    bundle: Bundle
    checkpoint: Path | None
    volumes: NDArray[np.float32]
    threads: int


def choose_names(bundle: Bundle, against: str | None) -> list[str]:
    """What to run: all, or those of a list such as "torch-fp32,tensorrt-fp16".

    Raises:
        InputError: one that is not known.
    """
    known = names_of(bundle)
    if against is None:
        return known
    chosen = [name.strip() for name in against.split(",")]
    for index, name in enumerate(chosen):
        if name not in known or name in chosen[:index]:
            raise InputError(f"--against {name!r}: with --device cuda expected some of {', '.join(known)}, each once "
                             "(engines: those that the bundle has)")
    return chosen


def names_of(bundle: Bundle) -> list[str]:
    """Everything that could run: the baselines first, then a bundle's engines by library and precision."""
    engines = dict.fromkeys(f"{record.library}-{record.precision}" for record in engine_records(bundle)
                            if record.role == "image")
    return [*TORCH, *ONNXRUNTIME, *engines]


def let_go() -> None:
    """Give back what PyTorch keeps of contenders that are gone."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextlib.contextmanager
def open_contender(name: str, work: Work) -> Iterator[Contender]:
    """Load one, with its inputs on the device and one inference done.

    Raises:
        Exception: it cannot run here; PyTorch's and ONNX Runtime's own have no common base.
    """
    if name in TORCH:
        yield _Torch(name, work)
    elif name in ONNXRUNTIME:
        with contextlib.closing(_OnnxRuntime(name, work)) as contender:
            yield contender
    else:
        library, precision = name.rsplit("-", 1)
        if library not in LIBRARIES:
            raise InputError(f"contender {name!r}: unknown; expected some of {', '.join(names_of(work.bundle))}")
        options = Options("cuda", work.threads, library, precision)
        backend = TensorRtBackend(work.bundle, "image", options, slots=1)
        graph = work.bundle.manifest.graph("image", precision, GPU_TARGET)
        assert graph is not None  # the engine was made from it
        with contextlib.closing(backend), backend.hold(image_feeds(graph.inputs, work.volumes)) as resident:
            yield _Engine(backend, resident, precision)


class _Engine:
    def __init__(self, backend: TensorRtBackend, resident: Resident, precision: str) -> None:
        self._backend, self._resident, self.precision = backend, resident, precision
        self.build_s: float | None = backend.record.build_seconds

    @property
    def stream(self) -> int:
        return self._resident.stream

    def enqueue(self) -> None:
        self._resident.enqueue()

    def embeddings(self) -> NDArray[np.float32]:
        return self._resident.fetch([_EMBEDDING])[0]

    def own_bytes(self) -> int:
        """Weights as large as the engine, activations, and inputs and outputs at the largest batch."""
        return self._backend.record.bytes + self._backend.activation_bytes + self._resident.bytes

    def describe(self) -> str:
        return self._backend.describe()


class _Torch:
    build_s: float | None = None

    def __init__(self, name: str, work: Work, device: str = "cuda") -> None:
        import torch

        if device == "cuda" and not torch.cuda.is_available():
            raise DeviceUnavailable(f"PyTorch {torch.__version__} has no CUDA here")
        kind, layout, compiled = TORCH[name]
        self._torch = torch
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        torch.backends.cudnn.benchmark = True  # engines search for the best kernels, too
        self._before = torch.cuda.memory_allocated() if device == "cuda" else 0
        clip, weights = build_clip(work.bundle.manifest, work.checkpoint)
        form = {"device": device, "dtype": getattr(torch, kind), "memory_format": getattr(torch, layout)}
        self._clip = clip.to(device, form["dtype"]).to(memory_format=form["memory_format"])
        self._input = torch.from_numpy(work.volumes[:, None]).to(**form)
        self._encode = self._clip.encode_image
        if compiled:
            torch._dynamo.reset()
            torch._dynamo.mark_static_address(self._input)  # else every run begins with a copy of it
            self._encode = torch.compile(self._encode, mode="max-autotune", dynamic=False)
        self.precision = {"float32": "fp32", "float16": "fp16"}[kind]
        self._description = f"PyTorch {torch.__version__}, {weights}"
        self._outputs: Any = None
        for _ in range(3 if compiled else 1):  # recorded, and tuned, at first
            self.enqueue()
        self.embeddings()
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.enqueue()
            self.embeddings()

    @property
    def stream(self) -> int:
        return int(self._torch.cuda.current_stream().cuda_stream)

    def enqueue(self) -> None:
        with self._torch.inference_mode():
            self._outputs = self._encode(self._input)

    def embeddings(self) -> NDArray[np.float32]:
        return self._outputs.embedding.float().cpu().numpy()

    def own_bytes(self) -> int:
        """Beyond what others had; memory of the compiled one's recorded graphs is not in it."""
        return int(self._torch.cuda.max_memory_allocated()) - self._before

    def describe(self) -> str:
        return self._description


class _OnnxRuntime:
    build_s: float | None = None

    def __init__(self, name: str, work: Work) -> None:
        library = import_onnxruntime()
        if "CUDAExecutionProvider" not in library.get_available_providers():
            raise DeviceUnavailable("this onnxruntime has no CUDAExecutionProvider")
        self.precision = ONNXRUNTIME[name]
        graph = work.bundle.manifest.graph("image", self.precision, GPU_TARGET)
        if graph is None:
            raise InputError(f"the bundle has no {self.precision} graph; `dcformer calibrate` adds it")
        self._stream = Stream(Device())
        self.stream = self._stream.handle
        settings = library.SessionOptions()
        settings.log_severity_level = 4
        provider = ("CUDAExecutionProvider", {"use_tf32": "0", "user_compute_stream": str(self.stream)})
        self._session = library.InferenceSession(str(work.bundle.path(graph.file)), settings, providers=[provider])
        if self._session.get_providers()[0] != provider[0]:
            raise DeviceUnavailable("onnxruntime's CUDAExecutionProvider did not start")
        self._binding = self._session.io_binding()
        for name_, array in image_feeds(graph.inputs, work.volumes).items():
            self._binding.bind_ortvalue_input(name_, library.OrtValue.ortvalue_from_numpy(array, "cuda", 0))
        self._binding.bind_output(_EMBEDDING, "cuda")
        self._run = library.RunOptions()
        self._run.add_run_config_entry("disable_synchronize_execution_providers", "1")
        self._description = f"onnxruntime {library.__version__}, CUDA"
        self.enqueue()
        self.embeddings()

    def enqueue(self) -> None:
        self._session.run_with_iobinding(self._binding, self._run)

    def embeddings(self) -> NDArray[np.float32]:
        self._binding.synchronize_outputs()
        return self._binding.copy_outputs_to_cpu()[0]

    def own_bytes(self) -> int:
        """Its arena does not tell."""
        return 0

    def close(self) -> None:
        del self._binding, self._session
        self._stream.close()

    def describe(self) -> str:
        return self._description
