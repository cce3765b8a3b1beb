"""The texts of the synthetic tasks."""

from __future__ import annotations

import re

import pytest

from fastcompress.synthesis import texts

RATE = 16_000


def test_numbers():
    said = {
        0: ("zero", "null"), 1: ("one", "eins"), 7: ("seven", "sieben"), 11: ("eleven", "elf"), 12: ("twelve", "zwölf"),
        16: ("sixteen", "sechzehn"), 17: ("seventeen", "siebzehn"), 20: ("twenty", "zwanzig"),
        21: ("twenty one", "einundzwanzig"), 30: ("thirty", "dreißig"), 61: ("sixty one", "einundsechzig"),
        77: ("seventy seven", "siebenundsiebzig"), 100: ("one hundred", "einhundert"),
        101: ("one hundred one", "einhunderteins"), 111: ("one hundred eleven", "einhundertelf"),
        216: ("two hundred sixteen", "zweihundertsechzehn"), 1000: ("one thousand", "eintausend"),
        1001: ("one thousand one", "eintausendeins"), 1100: ("one thousand one hundred", "eintausendeinhundert"),
        3021: ("three thousand twenty one", "dreitausendeinundzwanzig"),
        9999: ("nine thousand nine hundred ninety nine", "neuntausendneunhundertneunundneunzig"),
    }  # fmt: skip
    for number, (english, german) in said.items():
        assert (texts.english(number), texts.german(number)) == (english, german)
    for spell in (texts.english, texts.german):
        assert len({spell(n) for n in range(10_000)}) == 10_000


@pytest.mark.parametrize("task", texts.TASKS)
def test_each_text_is_in_one_split(task: str):
    found = {split: [texts.sentence(task, split, i) for i in range(300)] for split in texts.SPLITS}
    said = {split: {text for text, _ in lines} for split, lines in found.items()}
    assert not (said["train"] & said["dev"] | said["train"] & said["test"] | said["dev"] & said["test"])
    assert all(len(lines) > 100 for lines in said.values())
    assert found["train"] == [texts.sentence(task, "train", i) for i in range(300)]
    assert found["train"] != [texts.sentence(task, "train", i, seed=1) for i in range(300)]
    for text, target in found["train"]:
        assert re.fullmatch(r"[a-z]+( [a-z]+)*", text) and re.fullmatch(r"[a-zäöüß]+( [a-zäöüß]+)*", target)
    # All words of the held-out texts occur in training texts.
    words = {word for text, _ in (texts.sentence(task, "train", i) for i in range(4000)) for word in text.split()}
    assert {word for text in said["test"] for word in text.split()} <= words


def test_an_unknown_task():
    with pytest.raises(ValueError, match="task must be one of digits, numbers, commands, got 'poems'"):
        texts.sentence("poems", "train", 0)
