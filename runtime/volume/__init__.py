"""From files to what the image tower reads."""

from .lines import image_feeds, scan_feeds
from .nifti import read_nifti
from .options import ReadOptions
from .prepared import is_prepared
from .preprocess import preprocess
from .scan import open_prepared, prepare_scan, read_feeds, read_scan
from .types import Volume

__all__ = ["ReadOptions", "Volume", "image_feeds", "is_prepared", "open_prepared", "prepare_scan", "preprocess",
           "read_feeds", "read_nifti", "read_scan", "scan_feeds"]
