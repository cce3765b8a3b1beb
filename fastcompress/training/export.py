"""Write a trained model as a plain checkpoint, which transformers and serving engines load."""

from __future__ import annotations

from pathlib import Path

from fastcompress.files import WRITE_ERRORS, check_folder, reason, write_folder
from fastcompress.lalm.loading import RunError, load_model
from fastcompress.training.settings import SettingsError
from fastcompress.training.stock import is_reference, load_stock, run_folder


def export(run: str, out: Path) -> None:
    """Merge the adapter of a run into its base model, and write the weights, the processor and the rule.

    The rule is in ``config.json`` under the key ``fastcompress`` (a stock model), or among the settings of the
    reference model. The weights have the dtypes of the base model; parts of the reference model that were trained in
    full are in fp32. An interrupted export leaves no folder.

    Args:
        run: Folder of a run of ``finetune`` or ``train``, of its adapter, or of a model.
        out: Folder to write. It must not exist, or be empty.

    Raises:
        SettingsError: The run cannot be loaded, or the folder cannot be written.
    """
    out = out.absolute()
    try:
        check_folder(out)
        if out.exists() and any(out.iterdir()):
            raise SettingsError(f"`out` {out}: is not empty")
    except WRITE_ERRORS as error:
        raise SettingsError(f"`out` {out}: {reason(error)}") from error
    if is_reference(run_folder(run)):
        try:
            model, processor = load_model(run_folder(run), keep_dtypes=True)
        except (RunError, RuntimeError) as error:
            raise SettingsError(f"`model`: {error}") from error
        if hasattr(model, "merge_and_unload"):
            model = model.merge_and_unload()
    else:
        model, processor = load_stock(run)

    def write(folder: Path) -> None:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)

    try:
        write_folder(out, write)
    except WRITE_ERRORS as error:
        raise SettingsError(f"`out` {out}: {reason(error)}") from error
