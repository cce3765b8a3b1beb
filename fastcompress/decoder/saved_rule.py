"""The compression that weights were trained with, which is saved with them.

The ``config.json`` of a model has it under the key ``fastcompress``. The folder of a peft adapter has it in
``fastcompress.json``, next to ``adapter_config.json``. Weights that were trained with compression and run without it
cause one warning, at their first use: the user may call ``apply_to`` between loading and use.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.integrations.peft import PeftAdapterMixin
from transformers.utils.hub import cached_file

from fastcompress.decoder.generation import unwrap
from fastcompress.ops.pack import POSITIONS
from fastcompress.rules import Rule

#: Key of ``config.json``, and attribute of a configuration.
KEY = "fastcompress"
#: File next to ``adapter_config.json``.
FILE = "fastcompress.json"
#: Version of the format.
VERSION = 1
#: Fields that determine how audio is pooled. The mode is not included, since both modes pool in the same way.
POOLING = ("rule", "reduce", "compressor", "before_projector", "proportional_attention", "positions", "silence")


@dataclass(frozen=True)
class SavedRule:
    """The compression settings of a model, as they are saved with its weights.

    Attributes:
        mode: ``"dynamic"`` or ``"budget"``.
        before_projector: Whether frames are pooled before the projector.
        rule: Text form of the rule; ``None``: a module compresses.
        reduce: Reduction of a segment; ``None`` without a rule.
        compressor: Class name of the module; ``None`` with a rule.
        proportional_attention: Whether the attention scores of a token have the logarithm of its length.
        positions: Positions of the decoder's rows, ``"time"`` or ``"compact"``.
        silence: What happens to the silence that fills Whisper's window; ``None`` for other families.
        version: Version of the format.
    """

    mode: str
    before_projector: bool
    rule: str | None = None
    reduce: str | None = None
    compressor: str | None = None
    proportional_attention: bool = False
    positions: str = "compact"
    silence: str | float | None = None
    version: int = VERSION

    def __str__(self) -> str:
        what = self.compressor if self.rule is None else self.rule
        how = "" if self.reduce in (None, "mean") else f", reduce={self.reduce}"
        if self.proportional_attention:
            how += ", proportional attention"
        if self.positions == "time":
            how += ", positions in time"
        if self.silence is not None:
            how += f", silence={self.silence}"
        return f"{what}{how}, {'before' if self.before_projector else 'after'} the projector"

    def to_dict(self) -> dict[str, Any]:
        """Return the fields that are not ``None``, the version first."""
        fields = {"version": self.version} | dataclasses.asdict(self)
        return {name: value for name, value in fields.items() if value is not None}

    @staticmethod
    def from_dict(data: Any) -> SavedRule:
        """Read the dict form.

        Raises:
            ValueError: ``data`` is not a dict, a field is unknown or missing, or a value is invalid.
        """
        if not isinstance(data, Mapping):
            raise ValueError(f"{KEY} must be an object with a version, got {data!r}")
        known = {field.name: field for field in dataclasses.fields(SavedRule)}
        version = data.get("version")
        for name in data:
            if name not in known:
                raise ValueError(
                    f"{KEY} has an unknown field {name!r} (version {version!r}); this fastcompress reads version "
                    f"{VERSION} with the fields {', '.join(sorted(known))}: install the fastcompress that wrote it, or "
                    "a newer one"
                )
        if type(version) is not int or version != VERSION:
            raise ValueError(f"{KEY} must have version {VERSION}, got {version!r}; install a newer fastcompress")
        for name, kind in (("mode", str), ("before_projector", bool)):
            if name not in data:
                raise ValueError(f"{KEY} must have a {name}, got the fields {', '.join(data)}")
            if type(data[name]) is not kind:
                raise ValueError(f"{name} of {KEY} must be a {kind.__name__}, got {data[name]!r}")
        for name in ("rule", "reduce", "compressor"):
            if not isinstance(data.get(name), str | None):
                raise ValueError(f"{name} of {KEY} must be a str, got {data[name]!r}")
        if not isinstance(data.get("proportional_attention", False), bool):
            raise ValueError(f"proportional_attention of {KEY} must be a bool, got {data['proportional_attention']!r}")
        if data.get("positions", "compact") not in POSITIONS:
            raise ValueError(f"positions of {KEY} must be one of {', '.join(POSITIONS)}, got {data['positions']!r}")
        if not isinstance(data.get("silence"), str | int | float | None) or isinstance(data.get("silence"), bool):
            raise ValueError(f"silence of {KEY} must be a str or a number, got {data['silence']!r}")
        if (data.get("rule") is None) == (data.get("compressor") is None):
            raise ValueError(f"{KEY} must have a rule or a compressor, got {dict(data)!r}")
        if data.get("rule") is not None:
            Rule.from_string(data["rule"])
        return SavedRule(**data)


def current(model: Any) -> SavedRule | None:
    """Return the compression that a model runs with; ``None``: it keeps every frame."""
    base = unwrap(model)
    if hasattr(base, "fastcompress_settings"):
        return base.fastcompress_settings.saved_rule(base)
    config = base.config
    if config.model_type != "fastcompress":
        return None
    # The reference model: its own configuration has the rule.
    pooling = {"compressor": base.compression}
    if config.rule is not None:
        pooling = {"rule": config.rule, "reduce": config.reduce}
    elif base.compression == "none":
        return None
    return SavedRule(
        "dynamic",
        True,
        proportional_attention=config.proportional_attention,
        positions=config.positions,
        **pooling,
    )


def stored(model: Any) -> SavedRule | None:
    """Return the compression in the configuration of a model; ``None``: it has none.

    Raises:
        ValueError: It cannot be read.
    """
    return stored_in(unwrap(model).config)


def stored_in(config: Any) -> SavedRule | None:
    """Return the compression in a configuration; see ``stored``."""
    data = vars(config).get(KEY)
    return None if data is None else SavedRule.from_dict(data)


def store(model: Any) -> None:
    """Write the compression of a model that ``apply_to`` changed into its configuration."""
    base = unwrap(model)
    found = current(base)
    assert found is not None
    setattr(base.config, KEY, found.to_dict())
    _unwatch(_core(base))


def erase(model: Any) -> None:
    """Remove the compression from the configuration of a model."""
    vars(unwrap(model).config).pop(KEY, None)


def check_same(running: SavedRule | None, trained: SavedRule, what: str, stacklevel: int = 3) -> None:
    """Warn if weights run with another compression than they were trained with."""
    if running is None:
        warnings.warn(f"{what} was trained with {trained}, and runs without compression", stacklevel=stacklevel)
    elif any(getattr(running, name) != getattr(trained, name) for name in POOLING):
        warnings.warn(f"{what} was trained with {trained}, and runs with {running}", stacklevel=stacklevel)


def save_beside_adapter(model: Any, folder: str | Path) -> None:
    """Write ``fastcompress.json`` into a folder that has an ``adapter_config.json``.

    A model that runs without compression, but whose configuration has one, writes that.
    """
    base = unwrap(model)
    if not (Path(folder) / "adapter_config.json").is_file() or not hasattr(base, "config"):
        return
    found = current(base)
    data = vars(base.config).get(KEY) if found is None else found.to_dict()
    if data is not None:
        (Path(folder) / FILE).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def watch() -> None:
    """Extend methods of transformers and peft: they warn about saved rules, and write ``fastcompress.json``.

    This wraps four methods of their classes, once per process. They behave as before for all other models.
    """
    _wrap(PreTrainedModel, "from_pretrained", _after_loading)
    _wrap(PeftAdapterMixin, "load_adapter", _after_loading_adapter)
    if importlib.util.find_spec("peft") is not None:
        from peft import PeftModel

        _wrap(PeftModel, "load_adapter", _after_loading_adapter)
        _wrap(PeftModel, "save_pretrained", _after_saving_adapters)


def _wrap(owner: Any, name: str, after: Callable[..., None]) -> None:
    """Call ``after(result, self, *args, **kwargs)`` after a method, or, with the class as ``self``, a classmethod."""
    found = vars(owner)[name]
    function = getattr(found, "__func__", found)
    if hasattr(function, "of_fastcompress"):
        return

    @functools.wraps(function)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = function(self, *args, **kwargs)
        after(result, self, *args, **kwargs)
        return result

    method.of_fastcompress = True  # type: ignore[attr-defined]
    setattr(owner, name, classmethod(method) if isinstance(found, classmethod) else method)


def _after_loading(result: Any, *args: Any, **kwargs: Any) -> None:
    model = result[0] if isinstance(result, tuple) else result  # with output_loading_info
    watched: set[int] = set()  # encoder and decoder of Whisper share the configuration of the model
    for module in model.modules():  # the thinker of an Omni model is a model inside another
        if isinstance(module, PreTrainedModel) and KEY in vars(module.config) and id(module.config) not in watched:
            watched.add(id(module.config))
            _watch(_core(module))


def _after_loading_adapter(
    result: Any, model: Any, source: Any = None, *args: Any, load_config: Any = None, **kwargs: Any
) -> None:
    base = unwrap(model)
    if source is None:  # the two methods name it differently
        source = kwargs.get("model_id", kwargs.get("peft_model_id"))
    if source is None:
        source = getattr(load_config, "pretrained_model_name_or_path", None)
    config = getattr(base, "config", None)
    is_whisper = getattr(config, "model_type", None) == "whisper"
    if source is None or (getattr(config, "audio_token_id", None) is None and not is_whisper):
        return
    data = _read_beside(source, dict(getattr(load_config, "download_kwargs", None) or {}) | kwargs)
    if data is None:
        return
    running = current(base)
    if running is not None or base.config.model_type == "fastcompress":
        check_same(running, SavedRule.from_dict(data), f"adapter {source}", stacklevel=5)
    else:
        setattr(base.config, KEY, data)
        _watch(_core(base))


def _after_saving_adapters(
    result: Any,
    model: Any,
    save_directory: Any,
    safe_serialization: bool = True,
    selected_adapters: Any = None,
    save_embedding_layers: Any = "auto",
    is_main_process: bool = True,
    *args: Any,
    **kwargs: Any,
) -> None:
    if is_main_process:
        for name in model.peft_config if selected_adapters is None else selected_adapters:
            folder = Path(save_directory)
            save_beside_adapter(model, folder if name == "default" else folder / name)


def _read_beside(source: str | Path, options: Mapping[str, Any]) -> Any:
    """Return the content of ``fastcompress.json`` in the folder of an adapter; ``None``: there is no such file."""
    names = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")
    options = {name: options[name] for name in names if options.get(name) is not None}
    quiet = {f"_raise_exceptions_for_{what}": False for what in ("gated_repo", "missing_entries", "connection_errors")}
    path = cached_file(source, FILE, **options, **quiet)
    if path is None:
        return None
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} must be JSON: {error}") from error


def _core(base: Any) -> Any:
    """Return the module that every use of a model calls; peft does not call the outermost one, but its ``forward``."""
    return getattr(base, "model", base)


def _watch(core: Any) -> None:
    """Warn at the first use of a model."""
    if _warn_once not in core._forward_pre_hooks.values():
        core.register_forward_pre_hook(_warn_once)


def _unwatch(core: Any) -> None:
    for key, hook in list(core._forward_pre_hooks.items()):
        if hook is _warn_once:
            del core._forward_pre_hooks[key]


def _warn_once(core: Any, args: Any) -> None:
    """Warn that weights run without the compression that they were trained with; called before ``forward``."""
    _unwatch(core)
    data = vars(core.config).get(KEY)
    if data is None:  # removed by the user
        return
    try:
        trained = str(SavedRule.from_dict(data))
    except ValueError:
        trained = str(data)
    warnings.warn(
        f"this {core.config.model_type} was trained with {trained}, and runs without compression: call "
        "fastcompress.integrations.transformers.apply_to(model), which takes the rule from its configuration",
        stacklevel=2,
    )
