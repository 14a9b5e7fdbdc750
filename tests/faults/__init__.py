"""The fault harness: what can go wrong with a job, done to it on purpose; each time it must end in the same bytes or in words.

`python -m faults` runs it (tests and src in PYTHONPATH); `test_faults.py` is its short run.
"""
