"""Every error this project raises on purpose, and the exit code the command line turns it into.

A message has four parts: what, where (file, field), got versus expected, what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DcformerError(Exception):
    """Base class. ``exit_code``: 1 a check failed, 2 bad input or usage, 3 the environment lacks something."""

    exit_code = 2


class InputError(DcformerError):
    """A file, an array or an option that cannot be used."""


class BundleError(InputError):
    """A bundle that is damaged, edited, incomplete or written for another version."""


class EngineRefused(BundleError):
    """An engine that is missing or was built for something else; the message holds the command that builds it."""


class BuildFailed(DcformerError):
    """The engine library could not build; the message holds its own reason."""


class CheckFailed(DcformerError):
    """Two results that must agree do not, for example PyTorch and the ONNX made from it."""

    exit_code = 1


class DeviceUnavailable(DcformerError):
    """The requested device or back end does not work here."""

    exit_code = 3


class InferenceError(DcformerError):
    """The inference library failed on input that looked right, most often for want of memory."""

    exit_code = 3


class DeviceLost(InferenceError):
    """The GPU failed in a way that ends all work on it in this process."""


class DiskFull(DcformerError):
    """What was being written does not fit on the disk."""

    exit_code = 3


class MissingDependency(DcformerError):
    """An optional package is needed and absent; the message holds the command that installs it."""

    exit_code = 3


class DcformerWarning(UserWarning):
    """Base class of every warning that is meant for users; the command line prints these as one line each."""


def install(extra: str) -> str:
    """How to install an extra: from a clone, as this project's name is not registered on any package index."""
    return f"in your clone of dcformer-deploy, run: pip install -c constraints.txt '.[{extra}]'"


def one_line(text: str) -> str:
    """White space collapsed, and characters that would steer a terminal shown as what they are."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in " ".join(text.split()))


def suggestion(name: str, known: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for the nearest known name, or an empty string."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
