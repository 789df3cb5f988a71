"""Calibration, convergence and the reproductions."""
