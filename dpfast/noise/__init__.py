"""The noise: a pure function of key, step, parameter and element."""
