"""Calibration: from text to what a calibrated method writes, one decoder block at a time."""
