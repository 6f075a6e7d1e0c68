"""Refuses a `registry` package that is not the one beside this package: the name is a common one.

The error cannot come from the common tree, which stands in the very package that is in doubt.
"""

import os
from time import perf_counter

import registry

STARTED = perf_counter()  # of `import runtime`: this module is its first


class MisplacedError(ImportError):
    """`registry` comes from elsewhere; the message names both paths."""

    reason = "install"


_expected = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "registry")
# A module in one file has no __path__, a namespace package no __file__.
_found = os.path.abspath(next(iter(getattr(registry, "__path__", ())), None) or registry.__file__ or "")
if os.path.realpath(_found) != os.path.realpath(_expected):
    raise MisplacedError(
        f"cubinery's `registry` should come from {_expected}, but Python found {_found}: remove that package, or put "
        "cubinery's folder before it on sys.path"
    )
