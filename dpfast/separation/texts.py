"""What messages about samples that meet have in common."""

from collections.abc import Iterable

from dpfast.capture.refusals import listed


class Left(str):
    """A reason to refuse a model: its forward leaves something of the samples behind in it."""


def left(names: Iterable[str], where: object = None) -> Left:
    """The reason, with the ``names`` of parameters and buffers and with what has reached them."""
    by = f" (by {where})" if where else ""
    return Left(
        f"the forward changes {listed(sorted(names))} by the samples{by}, which would be released without noise: leave "
        f"that out, or declare it public, if it is, with make_private(..., public_state=[...])"
    )


def left_for_next(names: Iterable[str], where: object = None) -> Left:
    """The reason where ``names`` are attributes that are numbers, by which the next forward computes something else."""
    by = f" (by {where})" if where else ""
    return Left(
        f"the forward keeps a number of the samples in {listed(sorted(names))}{by}, and the next forward computes with "
        f"it: samples of one batch would change what is done with those of another, at the noise of one step. Make it "
        f"a constant, or compute it from each sample alone"
    )
