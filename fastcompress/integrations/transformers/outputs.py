"""Outputs of compressed models: those of the stock model with an additional field, ``compressed``."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from fastcompress.ops.packed_inputs import PackedInputs

#: Fields that ``Trainer.predict`` excludes from predictions by default, if the configuration does not list any.
_CACHES = ["cache", "past_key_values"]


def with_compressed(out: Any, compressed: PackedInputs, **fields: Any) -> Any:
    """Return an output of the stock model with ``compressed`` and changed fields.

    ``compressed`` is a field of a subclass of the output's class, and not an attribute of the instance: accelerate
    (for mixed precision), FSDP and DDP build outputs again from their fields.
    """
    values = dict(out.items()) | fields
    cls: Any = type(out)
    return _class_with_compressed(cls)(**values, compressed=compressed)


@functools.cache
def _class_with_compressed(base: Any) -> Any:
    def __reduce__(self: Any) -> Any:  # the class below has no name that pickle finds
        return _restore, (base, dict(self.items()))

    namespace = {"__reduce__": __reduce__, "__module__": base.__module__, "__doc__": base.__doc__}
    field = ("compressed", PackedInputs | None, dataclasses.field(default=None))
    return dataclasses.make_dataclass(f"Compressed{base.__name__}", [field], bases=(base,), namespace=namespace)


def _restore(base: Any, values: dict[str, Any]) -> Any:
    return _class_with_compressed(base)(**values)


def ignore_in_predictions(config: Any) -> None:
    """Make ``Trainer.predict`` exclude ``compressed`` from the predictions, which it gathers as tensors.

    The list is an attribute of the configuration's class: one of the instance would be saved.
    """
    known = getattr(config, "keys_to_ignore_at_inference", _CACHES)
    if "compressed" not in known:
        type(config).keys_to_ignore_at_inference = [*known, "compressed"]
