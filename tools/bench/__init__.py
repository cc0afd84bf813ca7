"""Benchmarks: each prints a table, beside a reference implementation where it is given a checkout of one."""
