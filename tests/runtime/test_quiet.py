"""What nibabel logs of headers: nothing of those that are read here, everything of those that others read."""

import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from dcformer_deploy.runtime.volume import read_nifti
from scans import write


def _log_of(path: Path, caplog: pytest.LogCaptureFixture) -> list[str]:
    caplog.clear()
    nib.Nifti1Image.from_filename(path)
    return [record.getMessage() for record in caplog.records if record.name == "nibabel.global"]


@pytest.fixture
def odd(hounsfield: np.ndarray, tmp_path: Path) -> Path:
    """nibabel repairs its header, and says so."""
    return write(tmp_path / "a.nii", hounsfield, pixdim=[7, 0.9, 0.8, 1.7, 0, 0, 0, 0])


def test_nibabel_is_silent_here_and_speaks_elsewhere(odd: Path, caplog: pytest.LogCaptureFixture,
                                                     monkeypatch: pytest.MonkeyPatch):
    """Threads that overlap, so that each begins before another ends: formerly the logger then stayed silent."""
    caplog.set_level(logging.INFO, "nibabel.global")
    logger = logging.getLogger("nibabel.global")
    level, load = logger.level, nib.load
    assert _log_of(odd, caplog)
    inside, seen = threading.Barrier(2), threading.Event()

    def slow(path: Path) -> object:
        inside.wait(10)  # both are reading
        found = load(path)
        if threading.current_thread().name.endswith("_1"):
            assert seen.wait(10)  # the other one has ended
        return found

    monkeypatch.setattr(nib, "load", slow)
    caplog.clear()
    with ThreadPoolExecutor(2) as pool:
        one, other = pool.submit(read_nifti, odd), pool.submit(read_nifti, odd)
        while not (one.done() or other.done()):
            pass
        assert not caplog.records
        assert logger.level == level
        assert _log_of(odd, caplog)  # of this thread, while another reads
        seen.set()
        for reading in (one, other):
            reading.result()
    assert logger.level == level
    assert _log_of(odd, caplog)
