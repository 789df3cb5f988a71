"""The commands of ``python -m dpfast``: each is loaded when it is asked for."""
