"""What is imported for a run, in less time: no garbage is looked for on the way, and nothing is read twice."""

from __future__ import annotations

import atexit
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

_alone = ["torch" not in sys.modules]  # whether the process holds nothing of anybody else, as that of a command


def import_heavy() -> None:
    """Import what every plan and every run needs: torch, transformers and this project's own modules."""
    with uncollected():
        with _models_read_once():
            import transformers.models  # noqa: F401
        with _matching_later():
            import transformers.loss.loss_utils  # noqa: F401
        import transformers.modeling_utils  # noqa: F401

        import trainer.stages.run_stages  # noqa: F401
    _alone[0] = False


@contextmanager
def uncollected() -> Iterator[None]:
    """Within the context no garbage is collected, and afterwards what was imported is never looked through for any.

    Collections are due after so many new objects, and modules are hundreds of thousands that stay: looking them through
    again and again takes a fifth of the time of the imports; once more, as the interpreter does when it ends, takes
    more than a second. Where torch was there before, somebody else's objects are as well, and all is left as it is.
    """
    if not _alone[0] or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
        atexit.unregister(gc.freeze)
        atexit.register(gc.freeze)


@contextmanager
def _models_read_once() -> Iterator[None]:
    """Within the context `transformers.models` is told what it defines, instead of reading all of its files.

    When it is imported, transformers has just read them itself, and keeps what it found with other names.
    """
    import transformers
    from transformers.utils import import_utils

    own, models = import_utils.define_import_structure, Path(transformers.__path__[0]) / "models"

    def known(module_path: Path | str, prefix: str | None = None) -> dict[Any, Any]:
        if prefix is not None or Path(module_path).parent != models:
            return own(module_path, prefix)
        found = own(models, prefix="models")  # what it added to this since has no such prefix
        told = {needed: {name.removeprefix("models."): objects for name, objects in modules.items()
                         if name.startswith("models.")} for needed, modules in found.items()}
        return told if any(told.values()) else own(module_path, prefix)  # another version may keep it otherwise

    import_utils.define_import_structure = known
    try:
        yield
    finally:
        import_utils.define_import_structure = own


@contextmanager
def _matching_later() -> Iterator[None]:
    """Within the context `scipy.optimize` is imported when something of it is used.

    transformers' losses, which every model imports, take one function from it, to match boxes of detected objects.
    """
    name = "scipy.optimize"
    if name in sys.modules or find_spec("scipy") is None:
        yield
        return

    def linear_sum_assignment(*arguments: Any, **keywords: Any) -> Any:
        return import_module(name).linear_sum_assignment(*arguments, **keywords)

    def of_the_module(attribute: str) -> Any:
        if attribute.startswith("__"):  # `inspect` looks through all modules
            raise AttributeError(attribute)
        if sys.modules.get(name) is stand_in:
            del sys.modules[name]
        return getattr(import_module(name), attribute)

    stand_in = ModuleType(name)
    stand_in.__dict__.update(linear_sum_assignment=linear_sum_assignment, __getattr__=of_the_module)
    sys.modules[name] = stand_in
    try:
        yield
    finally:
        if sys.modules.get(name) is stand_in:
            del sys.modules[name]
