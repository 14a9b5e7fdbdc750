"""Tests of the demo model, its texts and its training."""
