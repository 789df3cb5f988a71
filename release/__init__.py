"""What makes and checks the packages of a release: ``make wheels``, ``make check-wheel``. No part of dpfast."""
