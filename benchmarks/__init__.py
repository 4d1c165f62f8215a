"""Benchmarks: one file an operation, peers side by side, every speed behind a check and beside the machine's ceiling.

`make bench` runs them on the CPU, `make gpu` on an NVIDIA GPU; docs/performance.md says how to read the tables.
"""
