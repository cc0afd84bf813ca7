"""Reference networks, their data and their training: used by tests and benchmarks, never imported by the product."""
