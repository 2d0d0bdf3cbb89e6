"""Image encoders, one family per file; each file registers its variants with `export.registry`."""
