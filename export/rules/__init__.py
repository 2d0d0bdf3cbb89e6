"""Exact rewriting of the traced graphs: one rule per file, its algebra in the docstring; ``pipeline`` has the order."""
