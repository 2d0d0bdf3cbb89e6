"""The runtime must run where torch, onnx and transformers are not installed."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dcformer_deploy.runtime.cli.app import COMMANDS
from golden import REPOSITORY

FORBIDDEN = ("torch", "onnx", "onnxscript", "transformers", "safetensors")
#: Makes an import of the training side fail, as on a server where it is not installed.
BLOCKER = f"""
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {FORBIDDEN!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Block())
"""
PROGRAM = "from dcformer_deploy.runtime.cli.app import main\nsys.exit(main(sys.argv[1:]))"


def run(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", BLOCKER + code, *map(str, arguments)], capture_output=True, text=True,
                          env={**os.environ, "PYTHONWARNINGS": "error::ImportWarning"}, check=False)


def test_every_runtime_module_imports_without_torch():
    paths = [path.relative_to(REPOSITORY).with_suffix("") for path in (REPOSITORY / "runtime").rglob("*.py")]
    modules = [".".join(("dcformer_deploy", *path.parts)).removesuffix(".__init__") for path in sorted(paths)]
    assert "dcformer_deploy.runtime.volume.nifti" in modules
    done = run("import importlib\nfor name in sys.argv[1:]: importlib.import_module(name)", *modules)
    assert done.returncode == 0, done.stderr


def test_runtime_loads_nothing_it_does_not_need():
    show = "\nprint(*sorted({m.split('.')[0] for m in sys.modules}))"
    loaded = set(run("from dcformer_deploy.runtime import load" + show).stdout.split())
    assert "nibabel" in loaded
    assert not loaded & {*FORBIDDEN, "onnxruntime", "rich", "click"}
    loaded = set(run("import dcformer_deploy.runtime.cli.app" + show).stdout.split())
    assert "click" in loaded
    assert not loaded & {*FORBIDDEN, "onnxruntime", "numpy", "nibabel", "rich"}


def test_no_forbidden_import_anywhere_in_the_source():
    """Also inside functions: the runtime reaches the training side through the command line's lazy imports alone."""
    for path in (REPOSITORY / "runtime").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
                outside = (node.module or "").split(".")[0] in ("export", "benchmarks", "calibration")
                assert not (node.level and outside) or "cli" in path.parts, f"{path}:{node.lineno}"
            assert not {name.split(".")[0] for name in names} & set(FORBIDDEN), f"{path}:{node.lineno}"


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_without_torch(command: str):
    done = run(PROGRAM, *command.split(), "--help")
    assert done.returncode == 0 and "Usage: dcformer" in done.stdout, done.stderr


def test_scores_without_torch(pristine_bundle: Path, ct: Path):
    done = run("from dcformer_deploy.runtime import load\nprint(len(load(sys.argv[1]).zero_shot(sys.argv[2]).scores))",
               pristine_bundle, ct)
    assert done.stdout.strip() == "18", done.stderr


def test_export_without_torch_says_what_to_install(tmp_path: Path):
    done = run(PROGRAM, "export", tmp_path / "c.pth", "--no-tokenizer", "--out", tmp_path / "b")
    assert done.returncode == 3
    assert "is not installed; in your clone of dcformer-deploy, run: pip install" in done.stderr
    assert "'.[export]'" in done.stderr
    assert len(done.stderr.splitlines()) == 1
