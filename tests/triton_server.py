"""A real Triton server, out of the wheel of nvidia-pytriton: the core, ensembles and the Python back end.

``python tests/triton_server.py DIR`` prepares it in DIR, which `make test` does in the virtual environment. Its Python
back end needs numpy 1, so it gets an environment of its own that has the rest from the one that the tests run in.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import tritonclient.grpc as client

PACKAGES = ("nvidia-pytriton==0.7.0", "numpy==1.26.4")
HERE = Path(sys.prefix) / "triton-server"
_READY_S = 90


def prepare(folder: Path) -> None:
    """Install the server. Raises where no wheel fits this system."""
    if (folder / "ready").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    packages = _site_packages(folder)
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps",
                    "--only-binary", ":all:", "--target", packages, *PACKAGES], check=True)
    ours = _site_packages(Path(sys.prefix))
    (packages / "ours.pth").write_text(f"import site; site.addsitedir({str(ours)!r})\n")
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    server = packages / "pytriton" / "tritonserver"
    stub = "triton_python_backend_stub"
    shutil.copy(server / "python_backend_stubs" / version / stub, server / "backends" / "python" / stub)
    for program in (server / "bin" / "tritonserver", server / "backends" / "python" / stub):
        program.chmod(0o755)
    (folder / "ready").touch()


@contextlib.contextmanager
def serve(models: Path, log: Path) -> Iterator[client.InferenceServerClient]:
    """A client of a server with these models.

    Raises:
        RuntimeError: it ends instead of becoming ready; the text is its log.
    """
    packages = _site_packages(HERE)
    server = packages / "pytriton" / "tritonserver"
    libraries = [packages / "nvidia_pytriton.libs", Path(sys.base_prefix) / "lib"]
    environment = {**os.environ, "PATH": f"{HERE / 'bin'}:{os.environ['PATH']}", "VIRTUAL_ENV": str(HERE),
                   "LD_LIBRARY_PATH": ":".join(map(str, libraries))}
    ports = [_free_port() for _ in range(2)]
    with log.open("wb") as file, subprocess.Popen(
            [server / "bin" / "tritonserver", "--model-repository", models, "--backend-directory", server / "backends",
             "--http-port", str(ports[0]), "--grpc-port", str(ports[1]), "--allow-metrics", "false",
             "--http-address", "127.0.0.1", "--grpc-address", "127.0.0.1"], env=environment, stdout=file,
            stderr=subprocess.STDOUT) as process:
        try:
            found = client.InferenceServerClient(f"127.0.0.1:{ports[1]}")
            _wait(found, process, log)
            yield found
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


def _wait(found: client.InferenceServerClient, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + _READY_S
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(client.InferenceServerException):
            if found.is_server_ready():
                return
        time.sleep(0.2)
    raise RuntimeError(log.read_text(errors="replace"))


def _site_packages(prefix: Path) -> Path:
    return prefix / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


if __name__ == "__main__":
    prepare(Path(sys.argv[1]))
