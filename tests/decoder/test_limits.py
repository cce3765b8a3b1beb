"""Warnings about limits that cut a result: new tokens and positions, of the reference model and of stock ones."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
import torch
import transformers

from fastcompress.decoder.limits import counting_answers
from fastcompress.integrations.transformers import apply_to
from fastcompress.lalm import FastCompressConfig, FastCompressForConditionalGeneration
from tests.support import audio_llms
from tests.support.compressed_llms import batch, make

END = audio_llms.END


def reference(positions: int = 512) -> Any:
    torch.manual_seed(0)
    config = FastCompressConfig(
        audio_llms.WHISPER | {"model_type": "whisper"},
        audio_llms.TEXT | {"model_type": "qwen2", "max_position_embeddings": positions},
        "uniform:3",
        audio_token_id=audio_llms.AUDIO,
    )
    return FastCompressForConditionalGeneration(config).eval()


def inputs_of_reference(model: Any, rows: tuple[int, ...] = (20, 9, 16)) -> dict[str, Any]:
    ids = torch.tensor([[5, audio_llms.AUDIO, 6, 7]] * len(rows))
    mask = (torch.arange(100) < 2 * torch.tensor(rows)[:, None]).long()
    return {"input_ids": ids, "input_features": torch.randn(len(rows), 16, 100), "feature_attention_mask": mask}


@pytest.fixture(params=["reference", "qwen2_audio", "qwen2_5_omni_thinker"])
def model_and_inputs(request: pytest.FixtureRequest) -> tuple[Any, dict[str, Any]]:
    """A reference model, and stock ones that do and do not get the ids of the prompt."""
    if request.param == "reference":
        model = reference()
        return model, inputs_of_reference(model)
    model = apply_to(make(request.param), "uniform:3")
    return model, batch(request.param, model)


def ends(model: Any, ids: int | list[int] | None) -> None:
    model.generation_config.eos_token_id = ids
    model.generation_config.pad_token_id = 0


def said_by(model: Any, inputs: dict[str, Any], **kwargs: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.generate(**inputs, do_sample=False, **kwargs)
    return [str(w.message) for w in caught if "were cut" in str(w.message) or "position" in str(w.message)]


def test_answers_that_the_limit_cuts(model_and_inputs: tuple[Any, dict[str, Any]]):
    model, inputs = model_and_inputs
    ends(model, None)
    first = model.generate(**inputs, do_sample=False, max_new_tokens=4)[:, -4:]
    ends(model, 119)
    if bool((first == 119).any()):
        pytest.skip("the model wrote the end token by chance")
    assert said_by(model, inputs, max_new_tokens=4) == [
        "3 of 3 answers were cut at max_new_tokens=4: pass a larger one"
    ]
    length = inputs["input_ids"].shape[1]
    assert said_by(model, inputs, max_length=length + 4) == said_by(model, inputs, max_new_tokens=4)
    config = transformers.GenerationConfig(max_new_tokens=4, eos_token_id=119, pad_token_id=0)
    assert said_by(model, inputs, generation_config=config) == said_by(model, inputs, max_new_tokens=4)
    (said,) = said_by(model, inputs)
    assert re.fullmatch("3 of 3 answers were cut at the default limit of [0-9]+ new tokens: pass a larger one", said)
    assert said_by(model, inputs, max_new_tokens=4, num_beams=2, num_return_sequences=2)[0].startswith("6 of 6")
    assert said_by(model, inputs, max_new_tokens=4, min_new_tokens=4) == []  # as many as were asked for
    stop = [lambda ids, scores: torch.ones(len(ids), dtype=torch.bool)]
    criteria = transformers.StoppingCriteriaList(stop)
    assert said_by(model, inputs, max_new_tokens=4, stopping_criteria=criteria) == []
    with counting_answers() as answers:
        assert said_by(model, inputs, max_new_tokens=4) == said_by(model, inputs, max_new_tokens=3) == []
    assert (answers.cut, answers.total) == (6, 6)
    assert said_by(model, inputs, max_new_tokens=4, return_dict_in_generate=True)[0].startswith("3 of 3")


def test_answers_that_end_are_not_counted(model_and_inputs: tuple[Any, dict[str, Any]]):
    model, inputs = model_and_inputs
    ends(model, None)
    first = model.generate(**inputs, do_sample=False, max_new_tokens=4)[:, -4:]
    assert said_by(model, inputs, max_new_tokens=4) == []  # without an end token every answer reaches the limit
    ends(model, first[:, -1].unique().tolist())
    assert said_by(model, inputs, max_new_tokens=4) == []
    ends(model, int(first[0, 1]))
    ended = int((first == first[0, 1]).any(1).sum())
    left = [f"{3 - ended} of 3 answers were cut at max_new_tokens=4: pass a larger one"] if ended < 3 else []
    assert ended >= 1 and said_by(model, inputs, max_new_tokens=4) == left


@pytest.mark.parametrize("positions", ["compact", "time"])
@pytest.mark.parametrize("pack", [True, False])
def test_samples_longer_than_the_positions(pack: bool, positions: Any):
    model = make("qwen2_audio")
    inputs = batch("qwen2_audio", model, labels=True)
    lengths = apply_to(model, "uniform:3", pack=pack, positions=positions)(**inputs).compressed.next_positions
    limit = int(lengths.max())
    decoder = model.config.get_text_config(decoder=True)
    prompt = {name: value for name, value in inputs.items() if name != "labels"}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        decoder.max_position_embeddings = limit
        model(**inputs)
    decoder.max_position_embeddings = limit - 1
    longer, unit = int((lengths > limit - 1).sum()), "positions" if positions == "time" else "rows"
    text = f"{longer} of 3 samples are longer than the decoder's max_position_embeddings={limit - 1} (the longest has "
    for call in (inputs, prompt):
        with pytest.warns(UserWarning, match=re.escape(f"{text}{limit} {unit})")) as caught:
            model(**call)
        assert len([w for w in caught if "positions" in str(w.message) or "max_position" in str(w.message)]) == 1
    decoder.max_position_embeddings = limit + 2
    assert said_by(model, prompt, max_new_tokens=2, min_new_tokens=2) == []
    (said,) = said_by(model, prompt, max_new_tokens=3, min_new_tokens=3)
    assert said.startswith(f"{longer} of 3 samples are longer than the decoder's max_position_embeddings={limit + 2}")


def test_samples_of_the_reference_model_longer_than_the_positions():
    model = reference(positions=8)
    inputs = inputs_of_reference(model)  # of 7, 3 and 6 tokens and 3 of text
    text = "2 of 3 samples are longer than the decoder's max_position_embeddings=8 (the longest has 10 rows)"
    with pytest.warns(UserWarning, match=re.escape(text)) as caught:
        model(**inputs)
    assert len([w for w in caught if "max_position" in str(w.message)]) == 1
    model._runs_packed = False
    with pytest.warns(UserWarning, match=re.escape(text)):
        model(**inputs)
    (said,) = said_by(model, inputs, max_new_tokens=3, min_new_tokens=3)
    assert said.startswith("3 of 3 samples are longer") and "13 rows" in said
