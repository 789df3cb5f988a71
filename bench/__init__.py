"""Measurements: speed, memory and the demo. Nothing in here is a pass or fail test."""
