"""From files to what the image tower reads."""

from .nifti import read_nifti
from .options import ReadOptions
from .preprocess import preprocess
from .types import Volume

__all__ = ["ReadOptions", "Volume", "preprocess", "read_nifti"]
