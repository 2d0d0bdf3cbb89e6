"""A model in a process that lives long: bundles written over, forks, pickles, other folders, many lists of classes."""

import os
import pickle
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from dcformer_deploy.runtime import BundleError, load, prompts
from dcformer_deploy.runtime.backends.base import CPU_BACKENDS
from dcformer_deploy.runtime.forks import ForkableLock


def _write_over(path: Path) -> None:
    """Other bytes into the same file, as ``cp`` does."""
    inode = path.stat().st_ino
    content = np.frombuffer(path.read_bytes(), np.uint8)
    path.write_bytes(content[::-1].tobytes())
    assert path.stat().st_ino == inode


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_weights_that_are_written_over(bundle_copy: Path, ct: Path, backend: str):
    model = load(bundle_copy, backend=backend)
    volume = model.preprocess(ct)
    model.embed_image(volume)
    _write_over(bundle_copy / "image.fp32.weights")
    for _ in range(2):
        with pytest.raises(BundleError, match=r"image\.fp32\.weights: changed since the bundle was opened"):
            model.embed_image(volume)
    with pytest.raises(BundleError, match=r"image\.fp32\.weights: sha256"):
        load(bundle_copy, backend=backend)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_a_bundle_that_another_takes_the_place_of(bundle_copy: Path, ct: Path, backend: str, tmp_path: Path):
    model = load(bundle_copy, backend=backend)
    volume = model.preprocess(ct)
    expected, of_two = model.embed_image(volume), np.stack([volume, volume])
    other = Path(shutil.copytree(bundle_copy, tmp_path / "other"))
    _write_over(other / "image.fp32.weights")
    bundle_copy.rename(tmp_path / "old")
    other.rename(bundle_copy)
    shutil.rmtree(tmp_path / "old")
    np.testing.assert_array_equal(model.embed_image(volume), expected)
    np.testing.assert_allclose(model.image_outputs(of_two, ["image_embedding"])["image_embedding"][1], expected,
                               atol=1e-5)
    with pytest.raises(BundleError, match="changed since the bundle was opened; load it again"):
        model.embed_text("not opened before")


def test_another_current_folder(bundle_copy: Path, ct: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(bundle_copy.parent)
    model = load(bundle_copy.name)
    monkeypatch.chdir(tmp_path)
    assert model.embed_image(ct.absolute()).shape == (512,)
    (bundle_copy / "text.fp32.weights").unlink()
    with pytest.raises(BundleError, match=rf"^{bundle_copy.name}/text\.fp32\.weights: no longer there; load"):
        model.embed_text("a text")


def test_pickled_models_are_loaded_again(pristine_bundle: Path, ct: Path):
    model = load(pristine_bundle, threads=1, backend="openvino")
    again = pickle.loads(pickle.dumps(model))
    assert again.describe() == model.describe()
    np.testing.assert_array_equal(again.embed_image(ct), model.embed_image(ct))


def test_a_lock_that_was_held_at_a_fork_is_free():
    lock, held, end = ForkableLock(), threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            held.set()
            end.wait(60)

    (thread := threading.Thread(target=hold)).start()
    held.wait(60)
    if (child := os.fork()) == 0:
        with lock:
            os._exit(7)
    status = _wait(child)
    end.set()
    thread.join()
    assert os.waitstatus_to_exitcode(status) == 7


def _wait(child: int) -> int:
    end = threading.Timer(60, os.kill, (child, 9))
    end.start()
    _, status = os.waitpid(child, 0)
    end.cancel()
    return status


_FORKS = """
import os, sys, threading
import numpy as np
from dcformer_deploy.runtime import InferenceError, load
from dcformer_deploy.runtime.backends import openvino

model = load(sys.argv[1], backend="openvino", threads=2)
volume = model.preprocess(sys.argv[2])
expected = model.embed_image(volume)
for busy in (False, True):
    stop = threading.Event()
    def work():
        while not stop.is_set():
            model.embed_image(volume)
    thread = threading.Thread(target=work)
    if busy:
        thread.start()
    for _ in range(1000):
        while busy and not openvino._BUSY:
            pass
        child = os.fork()
        if child == 0:
            try:
                same = np.array_equal(model.embed_image(volume), expected)
                os._exit(10 + same if not openvino._FORKED else 1)
            except InferenceError as error:
                os._exit(20 if "was forked while openvino computed" in str(error) else 2)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if not busy or code == 20:
            break
        assert code == 11, code
    print(code, flush=True)
    stop.set()
    if busy:
        thread.join()
"""


def test_forks_while_openvino_computes(pristine_bundle: Path, ct: Path):
    done = subprocess.run([sys.executable, "-c", _FORKS, pristine_bundle, ct], capture_output=True, text=True,
                          timeout=120)
    assert done.stdout.split() == ["11", "20"], done.stderr


def test_embeddings_of_prompts_do_not_pile_up(pristine_bundle: Path, ct: Path):
    model = load(pristine_bundle)
    embedding = model.embed_image(ct)[None]
    first = model.score_embeddings(embedding, ["class 0"])
    for number in range(70):
        model.score_embeddings(embedding, [f"class {number}"])
    assert len(model._prompts._known) == 64
    np.testing.assert_array_equal(model.score_embeddings(embedding, ["class 0"]), first)


def test_own_prompts_are_kept_whatever_else_is_asked(bundle_copy: Path, ct: Path, monkeypatch: pytest.MonkeyPatch):
    model = load(bundle_copy)
    embedding = model.embed_image(ct)[None]
    own = model.score_embeddings(embedding)
    model.score_embeddings(embedding, ["to open the text tower"])
    (bundle_copy / "prompt_embeddings.fp32.npy").unlink()
    monkeypatch.setattr(prompts, "_MOST_KEPT", 2)
    for number in range(3):
        model.score_embeddings(embedding, [f"class {number}"])
    np.testing.assert_array_equal(model.score_embeddings(embedding), own)
