"""The ONNX Runtime back end's checks of what is installed."""

from importlib import metadata

import pytest

from dcformer_deploy.runtime.backends import onnxruntime as backend
from dcformer_deploy.runtime.errors import DcformerWarning


def test_both_distributions_at_once_are_announced(monkeypatch: pytest.MonkeyPatch):
    """They overwrite each other's files, and pip does not know."""
    monkeypatch.setattr(metadata, "distribution", lambda name: object())
    assert backend.installed_distributions() == ["onnxruntime", "onnxruntime-gpu"]
    with pytest.warns(DcformerWarning, match="overwrite each other's files; uninstall both"):
        backend.import_onnxruntime()


def test_one_distribution_is_fine(recwarn: pytest.WarningsRecorder):
    assert len(backend.installed_distributions()) == 1
    backend.import_onnxruntime()
    assert not recwarn.list
