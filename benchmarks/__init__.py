"""Measuring, side by side in one run, and the demonstration."""
