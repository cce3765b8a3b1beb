"""Make the texts of the synthetic tasks: the spoken text, and the text that the model must write.

* ``digits``: strings of one to six digits, to be transcribed.
* ``numbers``: one or two cardinal numbers from 0 to 9999, to be written in German. Order and word limits differ:
  "two hundred and thirty one" is "zweihunderteinunddreißig".
* ``commands``: commands to a smart speaker, 200 words, to be transcribed or written in German.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable

SPLITS = ("train", "dev", "test")

ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
).split()
TENS = "zero ten twenty thirty forty fifty sixty seventy eighty ninety".split()
ONES_DE = (
    "null eins zwei drei vier fünf sechs sieben acht neun zehn elf zwölf dreizehn vierzehn fünfzehn sechzehn siebzehn "
    "achtzehn neunzehn"
).split()
TENS_DE = "null zehn zwanzig dreißig vierzig fünfzig sechzig siebzig achtzig neunzig".split()


def english(number: int) -> str:
    """Spell a cardinal from 0 to 9999 in English."""
    if number < 20:
        return ONES[number]
    if number < 100:
        return TENS[number // 10] + (f" {ONES[number % 10]}" if number % 10 else "")
    if number < 1000:
        return f"{ONES[number // 100]} hundred" + (f" {english(number % 100)}" if number % 100 else "")
    return f"{english(number // 1000)} thousand" + (f" {english(number % 1000)}" if number % 1000 else "")


def german(number: int) -> str:
    """Spell a cardinal from 0 to 9999 in German, as one word."""
    if number < 20:
        return ONES_DE[number]
    if number < 100:
        one, ten = number % 10, TENS_DE[number // 10]
        return ten if one == 0 else f"{_einer(one)}und{ten}"
    size, word = (1000, "tausend") if number >= 1000 else (100, "hundert")
    return f"{_einer(number // size)}{word}" + (german(number % size) if number % size else "")


def _einer(number: int) -> str:
    """Spell a digit inside a word: "ein", not "eins"."""
    return "ein" if number == 1 else ONES_DE[number]


def _digits(g: random.Random) -> tuple[str, str]:
    text = " ".join(g.choice(ONES[:10]) for _ in range(g.randint(1, 6)))
    return text, text


def _numbers(g: random.Random) -> tuple[str, str]:
    # The number of digits is drawn first; otherwise few numbers would be short.
    found = []
    for _ in range(g.randint(1, 2)):
        size = g.randint(1, 4)
        found.append(g.randrange(0 if size == 1 else 10 ** (size - 1), 10**size))
    return " and ".join(map(english, found)), " und ".join(map(german, found))


ROOMS = {
    "kitchen": "in der küche",
    "bedroom": "im schlafzimmer",
    "bathroom": "im bad",
    "garden": "im garten",
    "office": "im büro",
    "hallway": "im flur",
    "cellar": "im keller",
    "attic": "auf dem dachboden",
}
DEVICES = {
    "light": "das licht",
    "lamp": "die lampe",
    "fan": "den ventilator",
    "heater": "die heizung",
    "radio": "das radio",
    "television": "den fernseher",
    "oven": "den ofen",
    "camera": "die kamera",
}
CITIES = {
    "london": "london",
    "paris": "paris",
    "berlin": "berlin",
    "boston": "boston",
    "denver": "denver",
    "madrid": "madrid",
    "tokyo": "tokio",
    "cairo": "kairo",
    "oslo": "oslo",
    "vienna": "wien",
}
DAYS = {
    "monday": "montag",
    "tuesday": "dienstag",
    "wednesday": "mittwoch",
    "thursday": "donnerstag",
    "friday": "freitag",
    "saturday": "samstag",
    "sunday": "sonntag",
}
NAMES = "anna peter maria john susan david laura michael emma robert alice george".split()
GENRES = {
    "jazz": "jazz",
    "rock": "rock",
    "classical": "klassische musik",
    "country": "country",
    "piano": "klaviermusik",
    "dance": "tanzmusik",
    "folk": "volksmusik",
    "opera": "opern",
}
ITEMS = {
    "apples": "äpfel", "bananas": "bananen", "eggs": "eier", "potatoes": "kartoffeln", "tomatoes": "tomaten",
    "carrots": "karotten", "lemons": "zitronen", "onions": "zwiebeln", "cookies": "kekse", "bottles": "flaschen",
    "candles": "kerzen", "batteries": "batterien",
}  # fmt: skip
PLACES = {
    "station": "zum bahnhof",
    "airport": "zum flughafen",
    "hospital": "zum krankenhaus",
    "library": "zur bibliothek",
    "museum": "zum museum",
    "market": "zum markt",
    "school": "zur schule",
    "bank": "zur bank",
    "hotel": "zum hotel",
    "beach": "zum strand",
}
CHORES = {
    "buy milk": "milch zu kaufen",
    "feed the cat": "die katze zu füttern",
    "pay the rent": "die miete zu zahlen",
    "water the plants": "die pflanzen zu gießen",
    "wash the car": "das auto zu waschen",
    "walk the dog": "den hund auszuführen",
    "clean the house": "das haus zu putzen",
    "bake a cake": "einen kuchen zu backen",
    "fix the bike": "das rad zu reparieren",
    "read the book": "das buch zu lesen",
}
UNITS = {
    "miles": "meilen",
    "meters": "meter",
    "inches": "zoll",
    "pounds": "pfund",
    "grams": "gramm",
    "gallons": "gallonen",
    "liters": "liter",
    "hours": "stunden",
    "minutes": "minuten",
    "seconds": "sekunden",
}
OPENINGS = {"door": "die tür", "window": "das fenster", "curtains": "die vorhänge"}


def _pick(g: random.Random, words: dict[str, str]) -> tuple[str, str]:
    return g.choice(list(words.items()))


def _time(g: random.Random) -> tuple[str, str]:
    hour = g.randint(1, 12)
    kind = g.randrange(4)
    if kind == 0:
        return f"{ONES[hour]} o clock", f"um {_einer(hour)} uhr"
    if kind == 1:
        minute = g.choice((10, 15, 20, 30, 40, 45, 50))
        return f"{ONES[hour]} {english(minute)}", f"um {_einer(hour)} uhr {german(minute)}"
    word, wort = (("quarter past", "viertel nach"), ("quarter to", "viertel vor"))[kind - 2]
    return f"{word} {ONES[hour]}", f"um {wort} {ONES_DE[hour]}"


def _day(g: random.Random) -> tuple[str, str]:
    day, tag = _pick(g, DAYS)
    return f"on {day}", f"am {tag}"


def _when(g: random.Random) -> tuple[str, str]:
    kind = g.randrange(4)
    if kind == 0:
        return g.choice((("today", "heute"), ("tomorrow", "morgen"), ("tonight", "heute abend")))
    if kind == 1:
        return _day(g)
    text, target = _time(g)
    return f"at {text}", target


def _commands(g: random.Random) -> tuple[str, str]:
    kind = g.randrange(14)
    if kind == 0:
        (what, was), (when, wann) = g.choice((("an alarm", "einen wecker"), ("a timer", "einen timer"))), _time(g)
        return f"set {what} for {when}", f"stelle {was} {wann}"
    if kind == 1:
        (state, an), (device, gerät), (room, zimmer) = (
            g.choice((("on", "ein"), ("off", "aus"))),
            _pick(g, DEVICES),
            _pick(g, ROOMS),
        )
        return f"turn {state} the {device} in the {room}", f"schalte {gerät} {zimmer} {an}"
    if kind == 2:
        (genre, art), (room, zimmer) = _pick(g, GENRES), _pick(g, ROOMS)
        return f"play some {genre} music in the {room}", f"spiele {art} {zimmer}"
    if kind == 3:
        (city, stadt), (when, wann) = _pick(g, CITIES), _when(g)
        return f"what is the weather in {city} {when}", f"wie ist das wetter {wann} in {stadt}"
    if kind == 4:
        (verb, tu), name, (when, wann) = (
            g.choice((("call", "rufe {} {} an"), ("meet", "triff {} {}"), ("visit", "besuche {} {}"))),
            g.choice(NAMES),
            _when(g),
        )
        return f"{verb} {name} {when}", tu.format(name, wann)
    if kind == 5:
        (what, was), (one, other) = (
            g.choice((("message", "eine nachricht"), ("letter", "einen brief"), ("picture", "ein bild"))),
            g.sample(NAMES, 2),
        )
        return f"send a {what} to {one} and {other}", f"schicke {was} an {one} und {other}"
    if kind == 6:
        a, b = g.randrange(100), g.randrange(100)
        word, wort = g.choice((("plus", "plus"), ("minus", "minus"), ("times", "mal")))
        return f"how much is {english(a)} {word} {english(b)}", f"wie viel ist {german(a)} {wort} {german(b)}"
    if kind == 7:
        (what, was), people, (when, wann) = (
            g.choice(
                (("table", "einen tisch"), ("room", "ein zimmer"), ("flight", "einen flug"), ("taxi", "ein taxi"))
            ),
            g.randint(2, 9),
            _when(g),
        )
        return (
            f"book a {what} for {ONES[people]} people {when}",
            f"buche {was} für {ONES_DE[people]} personen {wann}",
        )
    if kind == 8:
        who, (chore, arbeit), (when, wann) = g.choice(NAMES), _pick(g, CHORES), _when(g)
        return f"remind {who} to {chore} {when}", f"erinnere {who} daran {wann} {arbeit}"
    if kind == 9:
        (verb, tu), (opening, öffnung), (room, zimmer) = (
            g.choice((("open", "öffne"), ("close", "schließe"))),
            _pick(g, OPENINGS),
            _pick(g, ROOMS),
        )
        return f"{verb} the {room} {opening}", f"{tu} {öffnung} {zimmer}"
    if kind == 10:
        (room, zimmer), degrees = _pick(g, ROOMS), g.randint(10, 99)
        return (
            f"set the {room} temperature to {english(degrees)} degrees",
            f"stelle die temperatur {zimmer} auf {german(degrees)} grad",
        )
    if kind == 11:
        count, (item, ding) = g.randint(2, 99), _pick(g, ITEMS)
        return (
            f"add {english(count)} {item} to the shopping list",
            f"setze {german(count)} {ding} auf die einkaufsliste",
        )
    if kind == 12:
        (place, ort), (how, wie) = _pick(g, PLACES), g.choice((("by car", "mit dem auto"), ("by train", "mit dem zug")))
        return f"take me to the {place} {how}", f"bring mich {wie} {ort}"
    count, (one, eins), (other, anders) = g.randint(2, 199), *g.sample(list(UNITS.items()), 2)
    return f"convert {english(count)} {one} to {other}", f"rechne {german(count)} {eins} in {anders} um"


TASKS: dict[str, Callable[[random.Random], tuple[str, str]]] = {
    "digits": _digits,
    "numbers": _numbers,
    "commands": _commands,
}


def sentence(task: str, split: str, index: int, seed: int = 0) -> tuple[str, str]:
    """Return the text of an utterance of a split, and its German (for ``digits``, the same text).

    The result depends only on the arguments. A hash assigns each text to exactly one split.
    """
    if task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {task!r}")
    g = random.Random(f"{task}, {split}, {index}, {seed}")
    while True:
        text, target = TASKS[task](g)
        if split_of(text) == split:
            return text, target


def split_of(text: str) -> str:
    """Return the split that a text belongs to: of 20 texts, 1 is for development and 1 for tests."""
    share = hashlib.sha256(text.encode()).digest()[0] % 20
    return SPLITS[1] if share == 0 else SPLITS[2] if share == 1 else SPLITS[0]
