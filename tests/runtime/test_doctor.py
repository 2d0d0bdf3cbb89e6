"""``dcformer doctor``: what it says is what is there."""

import json
from importlib import metadata
from pathlib import Path

import onnxruntime
import pytest

from dcformer_deploy.runtime.cli import doctor
from dcformer_deploy.runtime.cli.app import main


def test_what_is_installed(pristine_bundle: Path, capsys):
    assert main(["doctor", str(pristine_bundle), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["facts"]["dcformer-deploy"] == metadata.version("dcformer-deploy")
    assert found["backends"]["onnxruntime"].startswith(f"{onnxruntime.__version__}: ")
    extras = {extra["name"]: extra for extra in found["extras"]}
    assert extras["cpu"]["installed"] == {"onnxruntime": metadata.version("onnxruntime")}
    assert extras["cpu"]["command"] is None
    assert "dev" not in extras
    assert "on the CPU" in found["choices"]["fp32"] or "openvino" in found["choices"]["fp32"]
    assert main(["doctor"]) == 0
    assert "--backend auto" not in capsys.readouterr().out


def test_what_is_missing(capsys, monkeypatch: pytest.MonkeyPatch):
    real = metadata.version

    def version(name: str) -> str:
        if name == "pydicom":
            raise metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(doctor.metadata, "version", version)
    monkeypatch.setattr(doctor, "_found", lambda module: False)
    assert main(["doctor", "--json"]) == 3
    captured = capsys.readouterr()
    dicom = next(extra for extra in json.loads(captured.out)["extras"] if extra["name"] == "dicom")
    assert dicom["missing"] == ["pydicom"]
    assert dicom["command"] == "pip install -c constraints.txt '.[dicom]'"
    assert "no back end is installed; " in captured.err
