"""Importing diffusers and transformers without the nine tenths of them that training does not use.

`from diffusers... import UNet2DConditionModel` runs four packages' `__init__`, which import every transformer, UNet
and autoencoder there is, peft, and bitsandbytes with the compiler behind it: 5 to 6 seconds of a run's start on two
cores. transformers reads the source of all its models to list their names, and scipy's optimizers come with a loss that
only object detectors have: one second more. `make_lazy` puts a stand-in for each of these packages into `sys.modules`:
their submodules import as ever, and the first other name that is asked of a package itself runs its real `__init__`. So
nothing is missing for anybody, it only comes on demand.

Packages that are imported already are left alone, and where diffusers is laid out differently nothing happens but the
wait.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from everydream_kit.optional_packages import hide_broken

LAZY_PACKAGES = (
    "diffusers.hooks",
    "diffusers.models.transformers",
    "diffusers.models.unets",
    "diffusers.models.autoencoders",
    "transformers.models",
    "scipy.optimize",
)
"""Packages whose submodules work without the package's own `__init__`."""
LAZY_MODULES = ("bitsandbytes", "scipy.stats", "scipy.integrate")
"""Packages whose `__init__` must run before any of their submodules: it registers kernels, or imports them in the order that
they need. diffusers imports scipy's for samplers that training does not use; half a second."""
LATE_FUNCTIONS = {"scipy.optimize": "linear_sum_assignment"}
"""Functions that others take out of a lazy package while they are imported, to call them later or never."""


class _Lazy(ModuleType):
    """A package whose `__init__` runs when something is asked of it that is not there yet, and is not a file of its
    own."""

    def __getattr__(self, name: str) -> Any:
        spec = self.__dict__["__spec__"]
        if name.startswith("__") and name != "__path__":
            raise AttributeError(f"module {spec.name!r} has no attribute {name!r}")
        if "__path__" in self.__dict__ and importlib.util.find_spec(f"{spec.name}.{name}") is not None:
            return importlib.import_module(f"{spec.name}.{name}")
        return getattr(_run_init(self), name)


class _Replaced(ModuleType):
    """A package that put another module into its own place; whoever still holds this one is sent on."""

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.modules[self.__dict__["__spec__"].name], name)


def _run_init(package: ModuleType) -> ModuleType:
    """Turn a stand-in into the real module. Returns what is in its place then."""
    spec: Any = package.__spec__
    package.__dict__.pop(LATE_FUNCTIONS.get(spec.name, ""), None)
    package.__class__ = ModuleType  # from here on an ordinary module, for its own __init__ as well
    package.__path__ = list(spec.submodule_search_locations)
    spec.loader.exec_module(package)
    real = sys.modules[spec.name]
    if real is not package:
        package.__class__ = _Replaced
        parent_name, _, own_name = spec.name.rpartition(".")
        if parent_name:
            setattr(sys.modules[parent_name], own_name, real)
    return real


def make_lazy() -> None:
    """Defer these packages' `__init__` until somebody asks them for something, and hide broken ones. Idempotent."""
    hide_broken()
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
    if name in LATE_FUNCTIONS:
        setattr(package, LATE_FUNCTIONS[name], _call_late(package, LATE_FUNCTIONS[name]))
    sys.modules[name] = package
    if parent_name:
        setattr(sys.modules[parent_name], own_name, package)


def _call_late(package: ModuleType, name: str) -> Callable[..., Any]:
    """A function that loads its module at its first call."""

    def function(*arguments: Any, **options: Any) -> Any:
        if isinstance(package, _Lazy):
            _run_init(package)
        return getattr(package, name)(*arguments, **options)

    return function
