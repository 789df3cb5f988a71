"""Norms → factors → clipped sum.

``clipped_sum`` does it at the end of each backward pass, with the ``norms`` of all parameters at once. ``thresholds``
and ``functions`` decide the factors, ``adaptive`` moves the threshold, and ``samples_once`` sees that no sample counts
twice in a step. ``units`` makes one sample of all rows of a user.
"""
