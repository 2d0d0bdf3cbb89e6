"""Requests at the same time on one engine: as many as there are slots, or as there is memory for."""

import contextlib
import threading
from pathlib import Path

import numpy as np
import pytest
from fake_gpu import FakeTensorRt, Status, install

from dcformer_deploy.runtime.backends import Options, tensorrt
from dcformer_deploy.runtime.bundle import open_bundle
from dcformer_deploy.runtime.errors import DcformerWarning, InferenceError

pytest.importorskip("tensorrt_rtx")


@pytest.fixture
def library(built: Path, monkeypatch: pytest.MonkeyPatch) -> FakeTensorRt:
    return install(built, monkeypatch)


def test_waiting_for_a_slot(built: Path, library: FakeTensorRt):
    """A third request waits until one of two ends."""
    options = Options("cuda", backend="tensorrt", precision="fp16")
    backend = tensorrt.TensorRtBackend(open_bundle(built), "text", options, slots=2)
    feeds = {name: np.ones((1, 4), np.int64) for name in ("input_ids", "attention_mask")}
    with backend._slot(), backend._slot():
        waiting = threading.Thread(target=lambda: backend.run(feeds, ["text_embedding"]), daemon=True)
        waiting.start()
        waiting.join(0.2)
        assert waiting.is_alive()
    waiting.join(20)
    assert not waiting.is_alive()
    assert library.contexts == 2


def test_memory_for_one_request_only(built: Path, library: FakeTensorRt):
    """The second waits for the first, and from then on they take turns; nobody fails."""
    backend = tensorrt.TensorRtBackend(open_bundle(built), "text", Options("cuda", None, "tensorrt", "fp16"), slots=2)
    feeds = {name: np.ones((1, 4), np.int64) for name in ("input_ids", "attention_mask")}
    found: list[np.ndarray] = []

    def request() -> threading.Thread:
        thread = threading.Thread(target=lambda: found.extend(backend.run(feeds, ["text_embedding"])), daemon=True)
        thread.start()
        thread.join(0.2)
        return thread

    for turn in range(2):
        with pytest.warns(DcformerWarning, match="no GPU memory for 2 requests at the same time .out of GPU memory") \
                if not turn else contextlib.nullcontext():
            with backend._slot():
                if not turn:
                    library.driver.fail["cuMemAlloc"] = Status.CUDA_ERROR_OUT_OF_MEMORY
                waiting = request()
                assert waiting.is_alive()
            waiting.join(20)
        assert len(found) == turn + 1
    np.testing.assert_array_equal(found[0], found[1])
    assert not request().is_alive()
    assert len(library.driver.blocks) == 2
    library.driver.fail["cuStreamSynchronize"] = Status.CUDA_ERROR_OUT_OF_MEMORY
    with pytest.raises(InferenceError):
        backend.run(feeds, ["text_embedding"])
    assert not request().is_alive()
