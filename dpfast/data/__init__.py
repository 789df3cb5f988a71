"""From a data set to physical batches of known samples, and from outputs to losses per sample."""
