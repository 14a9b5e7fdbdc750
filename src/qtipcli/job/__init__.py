"""The run directory: what a job was asked to do, what of it is done, and the guarantee that neither is ever lost.

`directory.RunDirectory` is the way in; `interrupt` stops a job at a safe point; `fingerprint` says what a job's inputs were.
"""
