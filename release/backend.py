"""What builds dpfast: setuptools' own backend, or one line that says that it is missing.

A build without isolation uses the setuptools that is installed, and environments of Python 3.12 and later have none:
pip would show a stack trace of its own. setup.py says where one is too old.
"""

try:
    from setuptools.build_meta import *  # noqa: F403 (the hooks, as setuptools has them)
except ImportError as error:
    raise SystemExit(f"{error}: pip install 'setuptools>=77', or leave --no-build-isolation out") from error
