"""Write the rows of the quickstart: plain-English requests to a house, and the one line of JSON each should become.

    python example_notebooks/make_home_requests.py

A request is made from a phrase and the values that fill it, so the right answer is known without anybody's judgement.
No request stands in two splits, so test requests were never trained on. The same seed gives the same files.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

SEED = 7
ROWS = {"train": 480, "valid": 60, "test": 100}
ROOMS = ["kitchen", "bedroom", "office", "bathroom", "garage", "hallway", "nursery", "living room"]
LEVELS = {"10": 10, "20": 20, "25": 25, "30": 30, "40": 40, "60": 60, "70": 70, "75": 75, "80": 80, "90": 90}
WORDS = {"half": 50, "a quarter": 25, "full": 100}
DEGREES = ["17", "18", "19", "20", "21", "22", "23", "24"]
# What people say for a device, and the house's own word for it.
DEVICES = {
    "light": ["light", "lights", "lamp"],
    "fan": ["fan", "ceiling fan"],
    "blind": ["blind", "blinds", "shades"],
    "heater": ["heater", "heating", "radiator"],
    "speaker": ["speaker", "music"],
    "plug": ["plug", "socket"],
}
# (request, device or None for any that can be switched, action, what the value is)
PHRASES = [
    ("turn on the {thing} in the {room}", None, "on", None),
    ("switch on the {room} {thing}", None, "on", None),
    ("put the {thing} on in the {room}", None, "on", None),
    ("turn off the {thing} in the {room}", None, "off", None),
    ("switch off the {room} {thing}", None, "off", None),
    ("shut off the {thing} in the {room}", None, "off", None),
    ("in the {room}, turn the {thing} off", None, "off", None),
    ("nobody is in the {room}, so switch the {thing} off", None, "off", None),
    ("dim the {thing} in the {room} to {level} percent", "light", "set", "level"),
    ("set the {room} {thing} to {level} percent", "light", "set", "level"),
    ("it is too bright in the {room}, take the {thing} down to {level}%", "light", "set", "level"),
    ("dim the {room} {thing} to {word}", "light", "set", "word"),
    ("close the {thing} in the {room}", "blind", "close", None),
    ("lower the {room} {thing}", "blind", "close", None),
    ("open the {thing} in the {room}", "blind", "open", None),
    ("raise the {room} {thing}", "blind", "open", None),
    ("set the {thing} in the {room} to {degrees} degrees", "heater", "set", "degrees"),
    ("make the {room} {degrees} degrees", "heater", "set", "degrees"),
    ("I am cold in the {room}, put the {thing} at {degrees}", "heater", "set", "degrees"),
    ("play the {thing} in the {room} at {level} percent", "speaker", "set", "level"),
    ("set the {room} {thing} volume to {level}", "speaker", "set", "level"),
    ("turn the {thing} in the {room} to {word} volume", "speaker", "set", "word"),
    ("run the {room} {thing} at {level} percent", "fan", "set", "level"),
    ("put the {thing} in the {room} at {word} speed", "fan", "set", "word"),
]
POLITE = ["{}", "{}", "please {}", "{} please", "could you {}?", "can you {}?", "hey, {}", "would you {}, please?"]
SWITCHED = ["light", "fan", "heater", "speaker", "plug"]


def answer(device: str, room: str, action: str, value: int | None) -> str:
    """The house format: one line, these four keys in this order, no spaces, null where nothing is set."""
    fields = {"device": device, "room": room, "action": action, "value": value}
    return json.dumps(fields, separators=(",", ":"))


def draw(source: random.Random) -> dict:
    """One row: a user's request and the assistant's line of JSON."""
    phrase, device, action, kind = source.choice(PHRASES)
    device = device or source.choice(SWITCHED)
    room = source.choice(ROOMS)
    level, word, degrees = source.choice(list(LEVELS)), source.choice(list(WORDS)), source.choice(DEGREES)
    values = {None: None, "level": LEVELS[level], "word": WORDS[word], "degrees": int(degrees)}
    thing = source.choice(DEVICES[device])
    request = phrase.format(thing=thing, room=room, level=level, word=word, degrees=degrees)
    statement = phrase.startswith(("it is", "nobody", "I am", "in the"))
    request = source.choice(["{}", "hey, {}"] if statement else POLITE).format(request)
    return {
        "messages": [
            {"role": "user", "content": request[0].upper() + request[1:]},
            {"role": "assistant", "content": answer(device, room, action, values[kind])},
        ]
    }


def make() -> dict[str, list[dict]]:
    """The splits. No request stands in two of them, or twice in one."""
    source = random.Random(SEED)
    seen: set[str] = set()
    splits: dict[str, list[dict]] = {}
    for split, count in ROWS.items():
        splits[split] = []
        while len(splits[split]) < count:
            row = draw(source)
            request = row["messages"][0]["content"].lower().strip("?.")
            if request not in seen:
                seen.add(request)
                splits[split].append(row)
    return splits


def main() -> None:
    folder = Path(__file__).parent / "home_requests"
    folder.mkdir(exist_ok=True)
    for split, rows in make().items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(lines, encoding="utf-8")


if __name__ == "__main__":
    main()
