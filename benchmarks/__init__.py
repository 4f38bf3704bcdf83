"""Measurements of this package against the alternatives, each pair in one run."""
