"""Writes short_answers/: questions with a short answer that is chosen and a long one, just as true, that is rejected.

    python example_notebooks/make_short_answers.py
"""

from __future__ import annotations

import json
from pathlib import Path

FOLDER = Path(__file__).parent / "short_answers"
HELD_OUT = 12

FACTS = """
What is the capital of France?|Paris
What is the capital of Japan?|Tokyo
What is the capital of Italy?|Rome
What is the capital of Egypt?|Cairo
What is the capital of Canada?|Ottawa
What is the capital of Norway?|Oslo
What is the capital of Kenya?|Nairobi
What is the capital of Peru?|Lima
What color is a ripe lemon?|Yellow
What color is fresh grass?|Green
What color is coal?|Black
What color is fresh snow?|White
How many legs does a spider have?|Eight
How many days are in a week?|Seven
How many months are in a year?|Twelve
How many sides does a triangle have?|Three
How many minutes are in an hour?|Sixty
How many wheels does a bicycle have?|Two
How many players are in a football team on the field?|Eleven
How many strings does a violin have?|Four
Which animal says moo?|A cow
Which animal barks?|A dog
Which animal builds dams?|A beaver
Which animal gives us wool?|A sheep
Which bird cannot fly and lives in Antarctica?|A penguin
Which insect makes honey?|A bee
What do we call frozen water?|Ice
What do we call a baby cat?|A kitten
What do we call a baby dog?|A puppy
What do we call the color between red and yellow?|Orange
What is the opposite of hot?|Cold
What is the opposite of early?|Late
What is the opposite of full?|Empty
What is the opposite of loud?|Quiet
Which planet do we live on?|Earth
Which planet is known for its rings?|Saturn
Which planet is closest to the sun?|Mercury
Which season comes after winter?|Spring
Which day comes after Monday?|Tuesday
Which month comes after June?|July
Which meal is eaten in the morning?|Breakfast
Which drink is made from roasted beans?|Coffee
Which fruit is used to make wine?|Grapes
Which tool drives in a nail?|A hammer
Which tool cuts paper?|Scissors
Which sense do we use our ears for?|Hearing
Which organ pumps the blood?|The heart
Which metal is attracted by a magnet?|Iron
What do bees collect from flowers?|Nectar
What does a thermometer measure?|Temperature
What does a clock show?|The time
What is a baker's main product?|Bread
Who writes the words of a book?|The author
Who flies an aeroplane?|The pilot
Who teaches children at school?|The teacher
Who repairs teeth?|The dentist
Where do fish live?|In water
Where do we borrow books?|In a library
Where does a train stop?|At a station
Where do bears sleep in winter?|In a den
"""
LONG_WINDED = (
    "That is a great question! There is a lot that one could say about it, but the answer you are looking for is: "
    "{answer}. I hope that this helps, and feel free to ask me anything else.",
    "Thank you for asking. When we think about it step by step, we come to the conclusion that the answer is {answer}, "
    "although there is of course much more to be said about this interesting subject.",
    "Many people wonder about this. As an assistant I am happy to explain that the correct answer would be {answer}. "
    "Would you like to know more about it, or is there something else that I can do for you?",
)


def pairs() -> list[dict[str, str]]:
    """One row for each fact; the ways of being long-winded take turns."""
    rows = []
    for number, line in enumerate(FACTS.strip().splitlines()):
        question, answer = line.split("|")
        said = LONG_WINDED[number % len(LONG_WINDED)].format(answer=answer[0].lower() + answer[1:])
        rows.append({"prompt": question, "chosen": f"{answer}.", "rejected": said, "answer": answer})
    return rows


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    rows = pairs()
    held_out = rows[:: len(rows) // HELD_OUT]
    for split, chosen in (("train", [row for row in rows if row not in held_out]), ("valid", held_out)):
        lines = [json.dumps(row, ensure_ascii=False) for row in chosen]
        (FOLDER / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
