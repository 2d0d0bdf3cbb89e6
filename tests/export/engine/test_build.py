"""Engines from NVIDIA's own parser and builder, and bundles that hold them."""

import json
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace

import onnx
import pytest

from dcformer_deploy.export.engine.build import BuildOptions, build_engine, parser_refusal
from dcformer_deploy.export.engine.watch import Watch
from dcformer_deploy.runtime import engine_library
from dcformer_deploy.runtime.bundle import open_bundle
from dcformer_deploy.runtime.cli.app import main
from dcformer_deploy.runtime.engine_library import load_library
from dcformer_deploy.runtime.engines import engine_records
from dcformer_deploy.runtime.errors import BuildFailed, DcformerWarning, InputError, MissingDependency
from dcformer_deploy.runtime.files import sha256_file
from dcformer_deploy.runtime.gpu import gpu_or_none
from graphs import GraphBuilder

trt = pytest.importorskip("tensorrt_rtx")


@pytest.fixture(scope="module")
def built(calibrated: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The calibrated bundle with portable engines in every precision."""
    out = Path(shutil.copytree(calibrated, tmp_path_factory.mktemp("built") / "bundle"))
    assert main(["build", str(out), "--precision", "fp32,fp16,bf16,int8", "--max-batch", "4"]) == 0
    return out


@pytest.fixture
def copy(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "bundle"))


def refuse(capsys: pytest.CaptureFixture[str], code: int, message: str, *arguments: object) -> None:
    assert main([str(argument) for argument in arguments]) == code
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_engines_are_in_the_bundle_with_records(built: Path, capsys):
    bundle = open_bundle(built)
    records = {(record.role, record.precision): record for record in engine_records(bundle)}
    assert set(records) == {(role, name) for role in ("image", "text") for name in ("fp32", "fp16", "bf16", "int8")}
    record = records["image", "int8"]
    assert record.engine == "image.int8.tensorrt_rtx.portable.engine"
    assert (record.onnx, record.weights) == ("image.int8.tensorrt.onnx", "image.int8.weights")
    assert record.onnx_sha256 == sha256_file(built / record.onnx)
    assert record.weights_sha256 == sha256_file(built / "image.int8.weights")
    assert record.sha256 == sha256_file(built / record.engine)
    assert (record.library, record.version, record.compute_capability) == ("tensorrt_rtx", trt.__version__, ("8.0+",))
    assert record.gpu is None
    shapes = record.profiles[0]["lines_d"]
    assert shapes.smallest == shapes.usual == (1, 1, 64, 32, 32)
    assert shapes.largest == (4, 1, 64, 32, 32)
    inputs = {tensor.name: tensor.dtype for tensor in record.tensors if tensor.is_input}
    assert inputs == dict.fromkeys(("lines_d", "lines_h", "lines_w"), "float16")
    outputs = {tensor.name: tensor.dtype for tensor in record.tensors if not tensor.is_input}
    assert outputs == {"image_embedding": "float32", "feature_map": "float32", "codes": "int64"}
    kinds = {layer.kind: layer.count for layer in record.layers}
    assert kinds["convolution"] == 36
    assert kinds["quantize"] > 10
    assert record.flags == {}
    text = records["text", "fp16"].profiles[0]["input_ids"]
    assert (text.smallest, text.largest) == ((1, 1), (4, 512))
    assert records["image", "fp16"].bytes < records["image", "fp32"].bytes
    assert main(["inspect", str(built)]) == 0


def test_building_again_replaces(copy: Path):
    before = {record.engine: record for record in engine_records(open_bundle(copy))}
    assert main(["build", str(copy), "--precision", "fp16", "--tf32", "--max-batch", "2"]) == 0
    after = {record.engine: record for record in engine_records(open_bundle(copy))}
    assert set(before) == set(after)
    name = "image.fp16.tensorrt_rtx.portable.engine"
    assert after[name].flags == {"tf32": True}
    assert after[name].profiles[0]["lines_d"].largest[0] == 2
    assert after["image.fp32.tensorrt_rtx.portable.engine"] == before["image.fp32.tensorrt_rtx.portable.engine"]


def test_engines_for_named_gpus_lie_beside(copy: Path, capsys):
    assert main(["build", str(copy), "--precision", "fp16", "--gpu", "8.9,12.0", "--json"]) == 0
    records = json.loads(capsys.readouterr().out)
    assert [record["compute_capability"] for record in records] == [["8.9", "12.0"]] * 2
    assert records[0]["engine"] == "image.fp16.tensorrt_rtx.sm89-120.engine"
    assert len(engine_records(open_bundle(copy))) == 10


def test_damaged_engines_harm_only_themselves(copy: Path, scans: Path, capsys):
    """An engine cut short, one that is gone, a record that was edited, one that is gone; and the way back."""
    names = {name: copy / f"{name}.tensorrt_rtx.portable.engine" for name in (
        "image.fp16", "text.fp16", "image.bf16", "text.bf16")}
    names["image.fp16"].write_bytes(names["image.fp16"].read_bytes()[:-1])
    names["text.fp16"].unlink()
    edited, gone = (Path(f"{names[name]}.json") for name in ("image.bf16", "text.bf16"))
    edited.write_text(edited.read_text().replace("8.0+", "9.9+"))
    gone.unlink()
    assert main(["zeroshot", str(copy), str(scans / "a.nii.gz")]) == 0
    refuse(capsys, 2, "Copy it again or build it again", "inspect", copy)
    with pytest.warns(DcformerWarning, match="an engine is left out: .*bf16.*json") as warned:
        left = {record.engine for record in engine_records(open_bundle(copy))}
    assert len(warned) == 2
    assert len(left) == 6  # a record without its engine is still one: the engine is missed when it is read
    assert main(["build", str(copy), "--precision", "fp16", "--max-batch", "4"]) == 0
    error = capsys.readouterr().err
    assert "text.bf16.tensorrt_rtx.portable.engine is left out" in error
    assert "fp16" not in error
    assert main(["inspect", str(copy)]) == 0
    assert {record.engine for record in engine_records(open_bundle(copy))} == left
    assert not edited.exists()
    assert not names["text.bf16"].exists()


def test_calibrating_again_removes_engines_of_what_it_replaces(copy: Path):
    assert main(["calibrate", str(copy), "--method", "mse", "--precision", "int8", "--depthwise", "never"]) == 0
    left = {(record.role, record.precision) for record in engine_records(open_bundle(copy))}
    assert left == {(role, name) for role in ("image", "text") for name in ("fp32", "fp16", "bf16")}
    assert not list(copy.glob("*int8*engine*"))


def test_the_parser_names_node_and_operator(tmp_path: Path):
    graph = GraphBuilder()
    proto = graph.finish(graph.node("Det", graph.node("Relu", "x")), {"x": ["batch", 3, 3]})
    proto.graph.node[1].name = "the_determinant"
    onnx.save(proto, tmp_path / "g.onnx")
    with pytest.raises(BuildFailed, match=r"g.onnx: the ONNX parser refuses it: .*'the_determinant' \(Det\)"):
        build_engine(load_library("auto"), tmp_path / "g.onnx", BuildOptions())


def test_refused_nodes_that_are_alike_are_counted(tmp_path: Path):
    """All kinds are told, and no kind hundreds of times."""
    graph, x = GraphBuilder(), "x"
    for _ in range(40):
        x = graph.node("Add", x, graph.node("Det", x))
    x = graph.node("Add", x, graph.node("ReduceMean", graph.node("Bernoulli", x)))
    onnx.save(graph.finish(x, {"x": ["batch", 3, 3]}), tmp_path / "g.onnx")
    refusal = parser_refusal(load_library("auto"), tmp_path / "g.onnx")
    assert "node 0 '' (Det)" in refusal
    assert refusal.count("(Det)") == 1
    assert "(and 39 more nodes)" in refusal
    assert "(Bernoulli)" in refusal


def test_the_builders_own_words(built: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    """What needs a GPU fails here, and leaves nothing behind."""
    before = sorted(path.name for path in built.iterdir())
    digest = sha256_file(built / "manifest.json")
    with monkeypatch.context() as patch:
        patch.setattr("dcformer_deploy.export.engine.add_engines.require_known", lambda *_: None)
        refuse(capsys, 2, "could not build it: ", "build", built, "--precision", "fp16", "--strip-weights")
    if gpu_or_none() is None:
        refuse(capsys, 3, "--strip-weights: needs a GPU while", "build", built, "--strip-weights")
    assert sorted(path.name for path in built.iterdir()) == before
    assert sha256_file(built / "manifest.json") == digest
    assert not [path for path in built.parent.iterdir() if path != built]


def test_stopping_a_build(built: Path):
    """As Ctrl-C does: the library stops at its next step."""
    seen = []
    watch = Watch(lambda phases: (seen.append(phases[-1].name), setattr(watch, "stopped", True)))
    with pytest.raises(KeyboardInterrupt):
        build_engine(load_library("tensorrt_rtx"), built / "image.fp16.onnx", BuildOptions(), watch)
    assert "Building engine" in seen
    assert len(seen) < 5
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("engine build")]


def test_two_at_once(copy: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    """Someone else builds other engines meanwhile: his are not lost."""
    from dcformer_deploy.export.engine import add_engines

    real, paths = add_engines.build_engine, []

    def meanwhile(library, path, *arguments):
        built = real(library, path, *arguments)
        paths.append(path)
        if len(paths) == 2:  # all of the first one's reading is done
            assert main(["build", str(copy), "--precision", "fp16", "--gpu", "8.9"]) == 0
        return built

    monkeypatch.setattr(add_engines, "build_engine", meanwhile)
    refuse(capsys, 2, "changed while this was running; nothing was written, run it again", "build", copy, "--gpu",
           "12.0")
    names = {record.engine for record in engine_records(open_bundle(copy))}
    assert "image.fp16.tensorrt_rtx.sm89.engine" in names
    assert "image.fp16.tensorrt_rtx.sm120.engine" not in names
    assert [path.name for path in copy.parent.iterdir()] == [copy.name]


def test_refusals(calibrated: Path, pristine_bundle: Path, capsys):
    refuse(capsys, 2, "--precision 'fp8': expected some of fp32, fp16, bf16, int8", "build", calibrated, "--precision",
           "fp8")
    refuse(capsys, 2, "no image tower in fp16; `dcformer calibrate", "build", pristine_bundle)
    refuse(capsys, 2, "--engine-library 'trt': expected one of auto, tensorrt, tensorrt_rtx", "build", calibrated,
           "--engine-library", "trt")
    refuse(capsys, 2, "--gpu 9.0: tensorrt_rtx builds for 8.0, 8.6, 8.9, 12.0, 12.1", "build", calibrated, "--gpu",
           "9.0")
    refuse(capsys, 2, "--gpu 8.9: tensorrt_rtx builds for 8.0, 8.6", "build", calibrated, "--gpu", "8.9,8.9")
    refuse(capsys, 2, "for all from 8.0 on. For Turing its builder has no float32 convolutions and products", "build",
           calibrated, "--gpu", "7.5")
    for options in (["--version-compatible"], ["--tiling", "fast"]):
        refuse(capsys, 2, "not for tensorrt_rtx engines; --gpu names their GPUs", "build", calibrated, *options)
    refuse(capsys, 2, "--hardware 'all': expected one of none, ampere-plus", "build", calibrated, "--hardware", "all")
    refuse(capsys, 2, "--batch 9: more than --max-batch 8", "build", calibrated, "--batch", "9")
    refuse(capsys, 2, "elements; TensorRT holds 2,147,483,647; the largest batch that fits is ", "build", calibrated,
           "--max-batch", "65536")


def test_which_library(monkeypatch: pytest.MonkeyPatch, calibrated: Path, capsys):
    def find(found: dict[str, str]):
        def load(name: str):
            if name not in found:
                raise ImportError(f"no {name}")
            return SimpleNamespace(__version__=found[name])
        monkeypatch.setattr(engine_library.importlib, "import_module", load)

    find({"tensorrt": "10.13.2", "tensorrt_rtx": "1.7"})
    assert load_library("auto").name == "tensorrt"
    assert load_library("tensorrt_rtx").is_rtx
    find({"tensorrt": "8.6.1"})
    with pytest.raises(InputError, match="tensorrt 8.6.1: too old for strongly typed networks; 10.0 or newer"):
        load_library("auto")
    find({})
    both = r"tensorrt is not installed .*\.\[tensorrt\].*; tensorrt_rtx is not installed .*: pip"
    with pytest.raises(MissingDependency, match=both):
        load_library("auto")
