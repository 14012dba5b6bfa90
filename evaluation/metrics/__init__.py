"""The metrics of an evaluation: pure functions from arrays to numbers, exact and a chunk at a time.

Each result has `metrics()`: its figures by their keys in `evaluation.definitions`, None where one could not be had.
"""
