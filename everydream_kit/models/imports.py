"""Importing diffusers without the nine tenths of it that training does not use.

`from diffusers... import UNet2DConditionModel` runs four packages' `__init__`, which import every transformer, UNet
and autoencoder there is, peft, and bitsandbytes with the compiler behind it: 5 to 6 seconds of a run's start on two
cores. `make_lazy` puts a stand-in for each of these packages into `sys.modules`: their submodules import as ever, and
the first name that is asked of a package itself runs its real `__init__`. So nothing is missing for anybody, it only
comes when it is asked for.

Packages that are imported already are left alone, and where diffusers is laid out differently nothing happens but the
wait.
"""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType
from typing import Any

LAZY_PACKAGES = (
    "diffusers.hooks",
    "diffusers.models.transformers",
    "diffusers.models.unets",
    "diffusers.models.autoencoders",
)
"""Packages whose submodules work without the package's own `__init__`."""
LAZY_MODULES = ("bitsandbytes", "scipy.stats")
"""Packages whose `__init__` must run before any of their submodules: it registers kernels, or imports them in the order that
they need. diffusers imports scipy.stats for two samplers that training does not use; half a second."""


class _Lazy(ModuleType):
    """A package whose `__init__` runs when something is asked of it that is not there yet."""

    def __getattr__(self, name: str) -> Any:
        spec = self.__dict__["__spec__"]
        if name.startswith("__") and name != "__path__":
            raise AttributeError(f"module {spec.name!r} has no attribute {name!r}")
        self.__class__ = ModuleType  # from here on an ordinary module, for its own __init__ as well
        self.__path__ = list(spec.submodule_search_locations)
        spec.loader.exec_module(self)
        try:
            return self.__dict__[name]
        except KeyError:
            return getattr(self, name)


def make_lazy() -> None:
    """Defer these packages' `__init__` until somebody asks them for something. Idempotent."""
    for name in LAZY_PACKAGES:
        _defer(name, open_path=True)
    for name in LAZY_MODULES:
        _defer(name, open_path=False)


def _defer(name: str, *, open_path: bool) -> None:
    if name in sys.modules:
        return
    parent_name, _, own_name = name.rpartition(".")
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, AttributeError, ValueError):
        return
    if spec is None or spec.loader is None or spec.submodule_search_locations is None:
        return
    package = _Lazy(name)
    package.__spec__ = spec
    package.__loader__ = spec.loader
    package.__file__ = spec.origin
    package.__package__ = name
    if open_path:
        package.__path__ = list(spec.submodule_search_locations)
    sys.modules[name] = package
    if parent_name:
        setattr(sys.modules[parent_name], own_name, package)
