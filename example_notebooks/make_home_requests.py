"""Write the rows of the quickstart: plain-English requests to a house, and the one line of JSON each should become.

    python example_notebooks/make_home_requests.py

A request is made from a phrase and the values that fill it, so the right answer is known without anybody's judgment.
Every answer belongs to one split: a model that gets a test row right has never been shown that line of JSON, only its
parts. The same seed gives the same files.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

SEED = 7
ROWS = {"train": 480, "valid": 60, "test": 100}
ROOMS = ["kitchen", "bedroom", "office", "bathroom", "garage", "hallway", "nursery", "living room"]
# What people say for a device, and the house's own word for it.
DEVICES = {
    "light": ["light", "lights", "lamp"],
    "fan": ["fan", "ceiling fan"],
    "blind": ["blind", "blinds", "shades"],
    "heater": ["heater", "heating", "radiator"],
    "speaker": ["speaker", "music"],
    "plug": ["plug", "socket"],
}
SWITCHED = ["light", "fan", "heater", "speaker", "plug"]
# What people say for a value, and the number that the house wants.
VALUES = {
    "level": {str(level): level for level in (10, 20, 25, 30, 40, 60, 70, 75, 80, 90)},
    "word": {"half": 50, "quarter": 25, "full": 100},
    "degrees": {str(degrees): degrees for degrees in range(17, 25)},
}
# (request, devices it can be said of, action, kind of value)
PHRASES = [
    ("turn on the {thing} in the {room}", SWITCHED, "on", None),
    ("switch on the {room} {thing}", SWITCHED, "on", None),
    ("put the {thing} on in the {room}", SWITCHED, "on", None),
    ("turn off the {thing} in the {room}", SWITCHED, "off", None),
    ("switch off the {room} {thing}", SWITCHED, "off", None),
    ("shut off the {thing} in the {room}", SWITCHED, "off", None),
    ("in the {room}, turn the {thing} off", SWITCHED, "off", None),
    ("nobody is in the {room}, so switch the {thing} off", SWITCHED, "off", None),
    ("close the {thing} in the {room}", ["blind"], "close", None),
    ("lower the {room} {thing}", ["blind"], "close", None),
    ("open the {thing} in the {room}", ["blind"], "open", None),
    ("raise the {room} {thing}", ["blind"], "open", None),
    ("dim the {thing} in the {room} to {value} percent", ["light"], "set", "level"),
    ("set the {room} {thing} to {value} percent", ["light"], "set", "level"),
    ("it is too bright in the {room}, take the {thing} down to {value}%", ["light"], "set", "level"),
    ("turn the {room} {thing} to {value} brightness", ["light"], "set", "word"),
    ("set the {thing} in the {room} to {value} degrees", ["heater"], "set", "degrees"),
    ("make the {room} {value} degrees", ["heater"], "set", "degrees"),
    ("I am cold in the {room}, put the {thing} at {value}", ["heater"], "set", "degrees"),
    ("turn the {thing} in the {room} to {value} percent", ["speaker"], "set", "level"),
    ("set the {room} {thing} volume to {value}", ["speaker"], "set", "level"),
    ("turn the {thing} in the {room} to {value} volume", ["speaker"], "set", "word"),
    ("run the {room} {thing} at {value} percent", ["fan"], "set", "level"),
    ("put the {thing} in the {room} at {value} speed", ["fan"], "set", "word"),
]
POLITE = ["{}", "{}", "please {}", "{} please", "could you {}?", "can you {}?", "hey, {}", "would you {}, please?"]
# A request that begins with a statement cannot follow "could you".
STATEMENTS = ("it is", "nobody", "I am", "in the")
POLITE_STATEMENT = ["{}", "hey, {}"]


def draw(source: random.Random) -> tuple[str, str]:
    """One request in plain words, before any politeness, and its answer.

    The house format of the answer: one line, these four keys in this order, no spaces, null where nothing is set.
    """
    phrase, devices, action, kind = source.choice(PHRASES)
    device = source.choice(devices)
    room = source.choice(ROOMS)
    said, value = source.choice(list(VALUES[kind].items())) if kind else ("", None)
    request = phrase.format(thing=source.choice(DEVICES[device]), room=room, value=said)
    fields = {"device": device, "room": room, "action": action, "value": value}
    return request, json.dumps(fields, separators=(",", ":"))


def polite(request: str, source: random.Random) -> str:
    """The request as somebody might put it."""
    manner = source.choice(POLITE_STATEMENT if request.startswith(STATEMENTS) else POLITE)
    sentence = manner.format(request)
    return sentence[0].upper() + sentence[1:]


def make() -> dict[str, list[dict]]:
    """The splits. No answer stands in two of them, and no request twice, politeness aside."""
    source = random.Random(SEED)
    splits: dict[str, list[dict]] = {split: [] for split in ROWS}
    split_of: dict[str, str] = {}
    seen: set[str] = set()
    while any(len(splits[split]) < count for split, count in ROWS.items()):
        request, answer = draw(source)
        if answer not in split_of:
            split_of[answer] = source.choices(list(ROWS), weights=list(ROWS.values()))[0]
        split = split_of[answer]
        if request in seen or len(splits[split]) == ROWS[split]:
            continue
        seen.add(request)
        messages = [
            {"role": "user", "content": polite(request, source)},
            {"role": "assistant", "content": answer},
        ]
        splits[split].append({"messages": messages})
    return splits


def write(folder: Path) -> None:
    """One JSON Lines file a split."""
    folder.mkdir(exist_ok=True)
    for split, rows in make().items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(lines, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    write(Path(__file__).parent / "home_requests")
