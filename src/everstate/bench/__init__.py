"""Measurements: correctness first, then speed, ours and the peers' in turn in one process."""
