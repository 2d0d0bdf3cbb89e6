"""Timings of kernels between builds. What the library answers is faked; that it keeps any needs a GPU."""

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest

from dcformer_deploy.export.engine.build import BuildOptions, build_engine
from dcformer_deploy.export.engine.timing_cache import attach_timing_cache, store_timing_cache, timing_cache_file
from dcformer_deploy.runtime.cli.app import main
from dcformer_deploy.runtime.engine_library import Library
from dcformer_deploy.runtime.engines import Gpu
from dcformer_deploy.runtime.errors import DcformerWarning
from graphs import GraphBuilder

L4 = Gpu("NVIDIA L4", "8.9", 24 << 30)


class Config:
    """As ``IBuilderConfig``. ``answers``: to each stored cache; an error is raised."""

    def __init__(self, **answers: Any) -> None:
        self.answers, self.attached = {"": True, **answers}, []

    def create_timing_cache(self, stored: bytes) -> Any:
        answer = self.answers[stored.decode()]
        if isinstance(answer, Exception):
            raise answer
        return None if answer is None else SimpleNamespace(answer=answer, stored=stored)

    def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        if cache.answer:
            self.attached.append(cache.stored)
        return cache.answer


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "a.timings"
    path.write_bytes(b"stored")
    return path


def test_one_file_for_each_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    library = Library("tensorrt", None, "10.13.2.6")
    ada = timing_cache_file(library, Gpu("NVIDIA RTX 6000 Ada Generation (96%)", "8.9", 0))
    assert ada == tmp_path / "dcformer-deploy" / "tensorrt-10.13.2.6-nvidia-rtx-6000-ada-generation-96-sm89.timings"
    assert timing_cache_file(library, L4) != ada
    assert timing_cache_file(library, Gpu("NVIDIA L4", "9.0", 0)) != timing_cache_file(library, L4)
    assert timing_cache_file(library, None) is None


def test_what_was_stored_is_used(file: Path):
    config = Config(stored=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert attach_timing_cache(config, file).stored == b"stored"
        assert config.attached == [b"stored"]
        assert attach_timing_cache(Config(), file.with_name("none")).stored == b""
        assert attach_timing_cache(Config(), None).stored == b""


@pytest.mark.parametrize(("answer", "reason"), [
    (False, "the library refuses it: of another GPU, or of another release"),
    (None, "the library cannot read it"), (RuntimeError("bad\nheader"), "bad header")])
def test_what_is_refused_is_made_anew(file: Path, answer: object, reason: str):
    config = Config(stored=answer)
    with pytest.warns(DcformerWarning, match=rf"a.timings: not used \({reason}\); .*made anew"):
        cache = attach_timing_cache(config, file)
    assert cache.stored == b""
    assert config.attached == [b""]


def test_a_file_that_cannot_be_read(tmp_path: Path):
    with pytest.warns(DcformerWarning, match="not used .*directory"):
        assert attach_timing_cache(Config(), tmp_path).stored == b""


def test_a_library_that_takes_none(file: Path):
    config = Config(**{"stored": False, "": False})
    with pytest.warns(DcformerWarning):
        assert attach_timing_cache(config, file) is None


def test_storing(file: Path):
    cache = SimpleNamespace(serialize=lambda: memoryview(b"measured"))
    store_timing_cache(cache, file.parent / "new" / "b.timings")
    assert (file.parent / "new" / "b.timings").read_bytes() == b"measured"
    with pytest.warns(DcformerWarning, match="measured kernels are not kept"):
        store_timing_cache(cache, file / "c.timings")
    assert file.read_bytes() == b"stored"


def test_a_build_stores_what_the_library_gives(tmp_path: Path):
    """By TensorRT-RTX's own builder, as if it was TensorRT: it has the same calls, and gives an empty cache."""
    trt = pytest.importorskip("tensorrt_rtx")
    graph = GraphBuilder()
    onnx.save(graph.finish(graph.node("Relu", "x"), {"x": ["batch", 3]}), tmp_path / "g.onnx")
    options = BuildOptions(timing_cache=tmp_path / "b.timings")
    with pytest.warns(DeprecationWarning, match="no-ops in TensorRT-RTX"):
        build_engine(Library("tensorrt", trt, "10.13.2"), tmp_path / "g.onnx", options)
    assert (tmp_path / "b.timings").stat().st_size > 0
    build_engine(Library("tensorrt_rtx", trt, "1.7"), tmp_path / "g.onnx",
                 BuildOptions(timing_cache=tmp_path / "c.timings"))
    assert not (tmp_path / "c.timings").exists()


def test_the_command_names_the_file(calibrated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("tensorrt_rtx")
    from dcformer_deploy.export.engine import add_engines
    from dcformer_deploy.runtime.cli import build

    seen = []
    monkeypatch.setattr(build, "gpu_or_none", lambda: L4)
    monkeypatch.setattr(add_engines, "require_known", lambda library, options, has_gpu: seen.append(options) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["build", str(calibrated)])
    assert seen[0].timing_cache.name.endswith("-nvidia-l4-sm89.timings")
