"""Detectors, their data, and average precision."""
