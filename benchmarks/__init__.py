"""Benchmarks: each prints ratios within one run against a baseline that it states."""
