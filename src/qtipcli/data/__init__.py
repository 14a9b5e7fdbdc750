"""Calibration and evaluation text: where it comes from (`text`), and the windows of tokens that it becomes (`windows`)."""
