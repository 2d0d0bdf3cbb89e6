"""From files to what the image tower reads."""

from .lines import image_feeds, scan_feeds
from .nifti import read_nifti
from .options import ReadOptions
from .preprocess import preprocess
from .scan import prepare_scan, read_scan
from .types import Volume

__all__ = ["ReadOptions", "Volume", "image_feeds", "prepare_scan", "preprocess", "read_nifti", "read_scan",
           "scan_feeds"]
