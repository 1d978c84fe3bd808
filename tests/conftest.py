"""Tests run in one process per core; each computes with one thread, so that they do not wait for one another."""
import os

if 'PYTEST_XDIST_WORKER' in os.environ: os.environ.setdefault('OMP_NUM_THREADS', '1')
