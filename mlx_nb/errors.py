"""The exceptions of mlx_nb. Each says in one message what is wrong, where, and what to do next.

MlxNbError
├── ConfigError         a setting is unknown, out of bounds, or would have no effect
├── DataError           rows cannot be found or read; names file, line, row and column
│   └── MaskRefused     no trustworthy loss mask exists for a conversation
├── ModelError          a model, tokenizer or adapter cannot be found, read or converted
├── TrainingError       an update was not applied; names the rows; nothing was changed
│   ├── NonFiniteLoss   loss or gradient became NaN or infinite
│   ├── LossSpike       the loss is far above that of the previous updates
│   ├── OutOfMemory     the update does not fit into memory
│   ├── LossRaised      a user-defined loss function raised an error
│   └── ModelChanged    the model no longer has the arrays that the run trains
├── CheckpointError     a checkpoint cannot be written or read
│   └── FolderError     a run's folder cannot be written, or holds a file that mlx_nb did not write
│       └── FolderTaken another run has the folder
└── CommandError        a notebook command or command line was not understood
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable, Sequence
from typing import Any

BreakLine = Callable[[str], list[str]]
_break_line: BreakLine | None = None


def break_error_lines_with(break_line: BreakLine | None) -> None:
    """Break each line of an error that is displayed with this function; None leaves them as they are."""
    global _break_line
    _break_line = break_line


def error_lines(text: str) -> list[str]:
    """The lines of an error as IPython displays them."""
    lines = text.splitlines()
    return lines if _break_line is None else [part for line in lines for part in _break_line(line)]


class MlxNbError(Exception):
    """Base of all errors raised on purpose. In IPython it shows as one line for each problem, without a traceback."""

    def _render_traceback_(self) -> list[str]:
        return error_lines(f"{type(self).__name__}: {self}")


class ConfigError(MlxNbError):
    """A setting is unknown, of the wrong kind, out of bounds, or would have no effect."""


class DataError(MlxNbError):
    """Rows cannot be found, read or understood."""


class MaskRefused(DataError):
    """No trustworthy loss mask exists for this conversation with this chat template."""


class ModelError(MlxNbError):
    """A model, tokenizer or adapter cannot be found, read or converted."""


class TrainingError(MlxNbError):
    """An update was not applied: parameters, optimizer and position in the data are as they were before it.

    reason             a word for the kind of failure, as in the event RunFailed
    rows               numbers of the training rows in the batch
    largest_gradients  (parameter, L2 norm) of those with the largest gradients, NaN first
    """

    reason = "failed"

    def __init__(
        self, message: str, rows: Sequence[int] = (), largest_gradients: Sequence[tuple[str, float]] = ()
    ) -> None:
        super().__init__(message)
        self.rows = tuple(rows)
        self.largest_gradients = tuple(largest_gradients)


class NonFiniteLoss(TrainingError):
    """Loss or gradient became NaN or infinite."""

    reason = "not finite"


class LossSpike(TrainingError):
    """The loss is far above that of the previous updates."""

    reason = "loss spike"


class OutOfMemory(TrainingError):
    """The update does not fit into memory."""

    reason = "out of memory"


class LossRaised(TrainingError):
    """A user-defined loss function raised an error."""

    reason = "loss raised"


class ModelChanged(TrainingError):
    """Other code replaced the parameters that the run trains."""

    reason = "model changed"


TRAINING_ERRORS = {kind.reason: kind for kind in (NonFiniteLoss, LossSpike, OutOfMemory, LossRaised, ModelChanged)}


class CheckpointError(MlxNbError):
    """A checkpoint cannot be written or read. The run in memory and older checkpoints are unchanged."""


class FolderError(CheckpointError):
    """A run's folder cannot be written, or mlx_nb would have to replace a file that it did not write."""


class FolderTaken(FolderError):
    """Another run uses the folder: it is still alive, or was started there later."""


class CommandError(MlxNbError):
    """A notebook command or command line was not understood."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """` Did you mean 'x'?` for the most similar known word; an empty string if none is similar."""
    near = nearest(word, known)
    return f" Did you mean {near!r}?" if near else ""


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word that `word` is probably a misspelling of, ignoring case; None if there is none.

    A typo is a letter that is added, omitted, replaced or swapped with the next. One typo is allowed for every three
    letters, and a replaced letter counts as two in words of up to three letters: `ppo` is not a misspelling of `cpo`.
    Of equally similar words the first is returned. If none is similar, the only word that begins with `word` is.
    """
    word, names = word.lower(), list(known)
    near = [(typos, at) for at, name in enumerate(names) if (typos := _typos(word, name.lower())) <= len(word) // 3]
    if near:
        return names[min(near)[1]]
    begun = [name for name in names if len(word) >= 3 and name.lower().startswith(word)]
    return begun[0] if len(begun) == 1 else None


def _typos(one: str, other: str) -> int:
    """The number of letters to insert, delete, replace or swap with the next to turn one word into the other.

    Words with the same first letter whose other letters are only in another order differ by one typo.
    """
    if one[:1] == other[:1] and sorted(one) == sorted(other):
        return int(one != other)
    replacing = 1 if max(len(one), len(other)) > 3 else 2
    rows = [list(range(len(other) + 1))]
    for i, letter in enumerate(one, start=1):
        row = [i]
        for j, its in enumerate(other, start=1):
            same = letter == its
            fewest = min(rows[-1][j] + 1, row[-1] + 1, rows[-1][j - 1] + (0 if same else replacing))
            if i > 1 and j > 1 and letter == other[j - 2] and one[i - 2] == its:
                fewest = min(fewest, rows[-2][j - 2] + (0 if same else 1))
            row.append(fewest)
        rows.append(row)
    return rows[-1][-1]


def on_one_line(text: str) -> str:
    """The text with its line breaks and control characters escaped, as in `repr`."""
    return "".join(repr(one)[1:-1] if unicodedata.category(one) in ("Cc", "Zl", "Zp") else one for one in text)


def shortened(text: str, size: int = 80) -> str:
    """At most `size` characters of a text, the last of them an ellipsis if it was longer."""
    return text if len(text) <= size else text[: size - 1].rstrip() + "…"


def shown(value: Any) -> str:
    """`repr` of a value on one line of at most 80 characters, whatever the value is."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # of an int of more than 4,300 digits, or of an object with a broken __repr__
        text = f"a huge {type(value).__name__}" if isinstance(value, int) else f"a {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:77]}..."


def and_more(names: Sequence[str], most: int) -> str:
    """The first `most` of some names, followed by how many more there are, if any."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more:,} more" if more > 0 else "")


def counted(count: int, noun: str) -> str:
    """`1 row`, `12 rows`."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


MOST_PROBLEMS = 200


def listed_problems(lines: Sequence[str]) -> str:
    """The first 200 lines about problems, followed by how many more there are, if any."""
    more = len(lines) - MOST_PROBLEMS
    return "\n".join([*lines[:MOST_PROBLEMS], *([f"and {counted(more, 'more problem')}."] if more > 0 else [])])
