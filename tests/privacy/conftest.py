"""What several tests of the guarantee run under."""

import pytest

from dpfast import native


@pytest.fixture(scope="module", params=["1", "0"], ids=["compiled", "plain"])
def library(request):
    """With the compiled library, and with plain PyTorch alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DPFAST_NATIVE", request.param)
        native.reset()
        yield
    native.reset()
