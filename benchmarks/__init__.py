"""Measurements: the plain PyTorch baseline, the benchmarks, the comparison that fills the ledger in `results/`."""
