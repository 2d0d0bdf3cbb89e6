"""The wheel in an environment of its own: no torch, no source tree, and the program works."""

import configparser
import json
import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from golden import REPOSITORY

TOP_LEVEL = ("runtime", "export", "calibration", "benchmarks")
#: pip must not find this repository or the developer's environment.
CLEAN = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}


def setup_cfg() -> configparser.RawConfigParser:
    parser = configparser.RawConfigParser()
    parser.read(REPOSITORY / "setup.cfg")
    return parser


def test_every_package_is_listed():
    """package_dir maps folders one by one, so setuptools cannot find packages by itself."""
    listed = setup_cfg()["options"]["packages"].split()
    found = {".".join(("dcformer_deploy", *path.parent.relative_to(REPOSITORY).parts))
             for folder in TOP_LEVEL for path in (REPOSITORY / folder).rglob("__init__.py")}
    assert set(listed) == found


def test_only_export_and_dev_bring_torch():
    parser = setup_cfg()
    extras = dict(parser["options.extras_require"])
    for name in set(extras) - {"calibration", "dev", "export"}:
        assert not any(word in extras[name].split() for word in ("torch", "transformers", "onnx"))
    assert "torch" in extras["export"]
    gpu = {"cuda", "tensorrt", "tensorrt-rtx"}  # not on every machine
    assert f"dcformer-deploy[{','.join(sorted(set(extras) - gpu - {'dev'}))}]" in extras["dev"]
    base = {line.split()[0] for line in parser["options"]["install_requires"].strip().splitlines()}
    assert base == {"numpy", "nibabel", "isal", "tokenizers", "dacite", "click", "rich"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    subprocess.run([sys.executable, "-m", "build", "--wheel", "--outdir", out, REPOSITORY], check=True,
                   capture_output=True, env=CLEAN)
    (path,) = out.glob("*.whl")
    return path


def test_wheel_holds_one_namespace(wheel: Path):
    names = zipfile.ZipFile(wheel).namelist()
    information = "-".join(wheel.name.split("-")[:2]) + ".dist-info"
    assert {name.split("/")[0] for name in names} == {"dcformer_deploy", information}
    for needed in ("runtime/cli/app.py", "export/data/example_ct.nii.gz", "export/encoders/dcformer.py",
                   "benchmarks/contenders/pytorch_eager.py", "runtime/py.typed"):
        assert f"dcformer_deploy/{needed}" in names
    assert "dcformer_deploy/__init__.py" not in names


@pytest.mark.slow
def test_wheel_scores_a_scan_where_torch_is_not_installed(wheel: Path, pristine_bundle: Path, ct: Path, tmp_path: Path):
    environment = tmp_path / "env"
    venv.create(environment, with_pip=True)
    python = environment / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "-c", REPOSITORY / "constraints.txt", f"{wheel}[cpu]"],
                   check=True, env=CLEAN, cwd=tmp_path)
    for name in ("torch", "onnx", "transformers"):
        assert subprocess.run([python, "-c", f"import {name}"], capture_output=True, check=False).returncode != 0
    done = subprocess.run([environment / "bin" / "dcformer", "zeroshot", pristine_bundle, ct, "--json"],
                          capture_output=True, text=True, check=True, env=CLEAN, cwd=tmp_path)
    assert len(json.loads(done.stdout)[0]["scores"]) == 18
    bench = subprocess.run([environment / "bin" / "dcformer", "bench", pristine_bundle, "--runs", "3", "--json"],
                           capture_output=True, text=True, check=True, env=CLEAN, cwd=tmp_path)
    assert [c["name"] for c in json.loads(bench.stdout)["contenders"]] == ["onnxruntime"]
    subprocess.run([python, "-m", "pip", "uninstall", "--quiet", "--yes", "onnxruntime"], check=True, env=CLEAN)
    done = subprocess.run([environment / "bin" / "dcformer", "zeroshot", pristine_bundle, ct], capture_output=True,
                          text=True, check=False, env=CLEAN, cwd=tmp_path)
    assert done.returncode == 3 and "'.[cpu]'" in done.stderr
