"""Benchmarks and kill tests that run the real commands against a counting sink on loopback."""
