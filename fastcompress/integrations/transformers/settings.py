"""Settings of a compressed model, which are its attribute ``fastcompress_settings``."""

from __future__ import annotations

import dataclasses
import pickle
from dataclasses import dataclass
from typing import Any

from fastcompress.decoder.saved_rule import SavedRule
from fastcompress.integrations.transformers.families import Family
from fastcompress.nn import SegmentPool


class NotPickled:
    """Base of settings. A model that has them raises an error if it is pickled."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return dataclasses.replace(self)  # type: ignore[type-var]

    def __reduce__(self) -> Any:
        # Bound methods are pickled by name, so a loaded model would silently have the stock methods.
        raise pickle.PicklingError("a compressed model cannot be pickled; call revert first, or use save_pretrained")


@dataclass
class Settings(NotPickled):
    """Compression settings of an audio LLM.

    Attributes:
        family: Family of the model.
        mode: ``"dynamic"`` or ``"budget"``.
        pack: Whether ``forward`` runs the decoder on packed rows.
        before_projector: Whether frames are pooled before the projector.
        proportional_attention: Whether a token weighs as much as its frames in the decoder's attention.
        positions: ``"time"`` or ``"compact"``; see ``fastcompress.pack``.
        attention: Name of the decoder's attention before ``apply_to`` changed it; ``None``: not changed.
    """

    family: Family
    mode: str
    pack: bool
    before_projector: bool
    proportional_attention: bool
    positions: str
    attention: str | None = None

    def saved_rule(self, model: Any) -> SavedRule:
        """Return what is saved with the weights of ``model``, whose compressor may have been replaced."""
        module = model.audio_compressor
        module = getattr(module, "original_module", module)  # peft may wrap it
        if type(module) is SegmentPool:
            pooling: dict[str, Any] = {"rule": str(module.rule), "reduce": module.reduce}
        else:
            pooling = {"compressor": type(module).__name__}
        return SavedRule(
            self.mode,
            self.before_projector,
            proportional_attention=self.proportional_attention,
            positions=self.positions,
            **pooling,
        )
