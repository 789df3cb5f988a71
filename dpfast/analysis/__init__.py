"""Audits of the guarantee on a user's own model; calibration, convergence, and what papers say of them, tried."""
