r"""The built-in reward functions. Each scores one completion, from 0 (not at all) to 1.

They are named in `rewards:`; one with a value is a mapping with one key, `{regex: "^Answer: \d+$"}`. A new reward is a
function here and an entry in REWARDS; its docstring is its help.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from decimal import Context, Decimal
from importlib.util import find_spec
from typing import Any, NamedTuple

from mlx_nb.errors import ConfigError, did_you_mean
from mlx_nb.rollouts.rewards.overlap import chrf_score, missing, rouge_l_score

RewardFunction = Callable[..., Any]

# Digits with or without thousands commas, decimals and an exponent. Bounded in length: "1e999999999" is not a number.
_DIGITS = (
    r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<![\w.])\.\d+)"
    r"(?:[eE][-+]?\d{1,3}(?!\d))?"
)
_SIGN = r"(?:(?<![\w)\]}])[-−]\\?[$€£¥]?)?"  # a minus after a word or a bracket is a hyphen or a subtraction
_NUMBER_TEXT = rf"{_SIGN}{_DIGITS}(?:\s*/\s*{_DIGITS})?"
_NUMBER = re.compile(rf"(?P<sign>{_SIGN})(?P<top>{_DIGITS})(?:\s*/\s*(?P<bottom>{_DIGITS}))?")
_LATEX_FRACTION = re.compile(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}")
# `\boxed{...}`, and `#### 12` alone on the rest of its line: "#### 2. Add up" is a heading.
_MARKED = re.compile(
    rf"\\boxed\s*\{{([^{{}}]*(?:\{{[^{{}}]*\}}[^{{}}]*)*)\}}|####[ \t]*(\\?[$€£¥]?{_NUMBER_TEXT})[ \t]*%?\.?[ \t]*$",
    re.MULTILINE,
)
_FORTY_DIGITS = Context(prec=40)
_PARTIAL_CREDIT = 0.5
_NO_JSON = object()


def exact_match(completion: str, answer: Any) -> float:
    """1 if the completion equals the answer, apart from leading and trailing white space."""
    return float(completion.strip() == _answer_text(answer).strip())


def number_match(completion: str, answer: Any) -> float:
    """1 if the last or marked number in the completion equals that in the answer; see `stated_number`."""
    expected = stated_number(_answer_text(answer))
    if expected is None:
        raise ValueError(f"the answer {answer!r} holds no number")
    return float(stated_number(completion) == expected)


def stated_number(text: str) -> Decimal | None:
    r"""The last number marked as answer, in `\boxed{12}` or `#### 12` at the end of a line; else the last in the text.

    `1,234.50`, `$12`, `50%` (= 50), `-3`, `1e-4`, `3/4` and `\frac{3}{4}` are numbers. None if there is none.
    """
    text = _LATEX_FRACTION.sub(r"\1/\2", text.replace("{,}", ",").replace("\\!", ""))
    marked = (match.group(1) or match.group(2) or "" for match in reversed(list(_MARKED.finditer(text))))
    for part in (*marked, text):
        numbers = list(_NUMBER.finditer(part))
        if numbers:
            return _decimal(numbers[-1])
    return None


def _decimal(number: re.Match[str]) -> Decimal | None:
    # The sign goes into the text, since `-Decimal` would round to the precision of the notebook's context.
    top = Decimal(("-" if number["sign"] else "") + number["top"].replace(",", ""))
    if number["bottom"] is None:
        return top
    bottom = Decimal(number["bottom"].replace(",", ""))
    return _FORTY_DIGITS.divide(top, bottom) if bottom else None


def _answer_text(answer: Any) -> str:
    if answer is None:
        raise ValueError("the row has no answer")
    if isinstance(answer, (list, tuple, Mapping)):
        raise ValueError(f"the answer is a {type(answer).__name__}, but it must be text or a number")
    return str(answer)


def regex(pattern: Any) -> RewardFunction:
    """1 if the pattern is found anywhere in the completion, as with `re.search`."""
    if not isinstance(pattern, str):
        raise ConfigError(f"reward regex takes a pattern as text, not {pattern!r}.")
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"reward regex: {pattern!r} is not a regular expression: {error}.") from None

    def score(completion: str) -> float:
        return float(compiled.search(completion) is not None)

    return score


def rouge_l(completion: str, answer: Any) -> float:
    """ROUGE-L F1 with the answer: the words of the longest common subsequence. Needs the package rouge-score."""
    return rouge_l_score(completion, _answer_text(answer))


def chrf(completion: str, answer: Any) -> float:
    """chrF with the answer: character n-grams in common, from 0 to 1. Needs the package sacrebleu."""
    return chrf_score(completion, _answer_text(answer))


def json_valid(completion: str) -> float:
    """1 if the completion is JSON."""
    return float(_json_value(completion) is not _NO_JSON)


def json_schema(schema: Any) -> RewardFunction:
    """1 if the completion is JSON that is valid against a JSON schema, 0.5 if it is only JSON.

    Needs the package jsonschema, which comes with Jupyter.
    """
    validator = _schema_validator(schema)

    def score(completion: str) -> float:
        value = _json_value(completion)
        if value is _NO_JSON:
            return 0.0
        return 1.0 if validator.is_valid(value) else _PARTIAL_CREDIT

    return score


def _schema_validator(schema: Any) -> Any:
    if not isinstance(schema, Mapping):
        raise ConfigError(f"reward json_schema takes a schema as a mapping, not {schema!r}.")
    try:
        from jsonschema import SchemaError, validators
    except ImportError:
        raise ConfigError("reward json_schema needs the package jsonschema. Try `pip install jsonschema`.") from None
    kind = validators.validator_for(schema)
    try:
        kind.check_schema(schema)
    except SchemaError as error:
        raise ConfigError(f"reward json_schema: not a JSON schema at {error.json_path}: {error.message}.") from None
    return kind(schema)


def _json_value(completion: str) -> Any:
    try:
        return json.loads(completion, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):  # "[[[[..." of a degenerate model
        return _NO_JSON


def _refuse_constant(word: str) -> None:
    raise ValueError(f"{word} is not JSON")


def length(limits: Any) -> RewardFunction:
    """`max: 200`: 1 up to 200 tokens, then falling linearly to 0 at 400.

    `target: 200`: 1 at 200 tokens, falling linearly to 0 at none and at 400. `unit: characters` counts characters.
    """
    kind, limit, unit = _read_limits(limits)

    def score(completion: str, completion_tokens: list[int]) -> float:
        size = len(completion_tokens if unit == "tokens" else completion)
        excess = size - limit if kind == "max" else abs(size - limit)
        return min(1.0, max(0.0, 1.0 - excess / limit))

    return score


def _read_limits(limits: Any) -> tuple[str, float, str]:
    if not isinstance(limits, Mapping) or len({"max", "target"} & set(limits)) != 1:
        raise ConfigError(f"reward length takes either {{max: 200}} or {{target: 200}}, not {limits!r}.")
    for key in limits:
        if key not in ("max", "target", "unit"):
            raise ConfigError(f"reward length: unknown `{key}`.{did_you_mean(str(key), ['max', 'target', 'unit'])}")
    kind = "max" if "max" in limits else "target"
    limit, unit = limits[kind], limits.get("unit", "tokens")
    if isinstance(limit, bool) or not isinstance(limit, (int, float)) or not 0 < limit < float("inf"):
        raise ConfigError(f"reward length: `{kind}` must be a number above 0, not {limit!r}.")
    if unit not in ("tokens", "characters"):
        raise ConfigError(f"reward length: `unit` is tokens or characters, not {unit!r}.")
    return kind, limit, unit


def xml_tags(tags: Any) -> RewardFunction:
    """The share of the tags that are opened and closed exactly once, each after the previous one is closed."""
    names = [tags] if isinstance(tags, str) else tags
    if not isinstance(names, (list, tuple)) or not names or len(set(map(str, names))) < len(names):
        raise ConfigError(f"reward xml_tags takes a list of different tags, such as [think, answer], not {tags!r}.")
    for name in names:
        if not isinstance(name, str) or not re.fullmatch(r"[^\s<>/]+", name):
            raise ConfigError(f"reward xml_tags: {name!r} is not the name of a tag. Write think, not <think>.")

    def score(completion: str) -> float:
        held, end = 0, 0
        for name in names:
            opening, closing = f"<{name}>", f"</{name}>"
            start, stop = completion.find(opening), completion.find(closing)
            once = completion.count(opening) == completion.count(closing) == 1
            if once and end <= start < stop:
                held, end = held + 1, stop + len(closing)
        return held / len(names)

    return score


class BuiltIn(NamedTuple):
    """A built-in reward.

    function  the reward function; if there is an example, a function that makes it from the value
    example   how its value is written in YAML; None = it takes none
    package   the package that it imports, and its name on PyPI; None = none
    """

    function: RewardFunction
    example: str | None = None
    package: tuple[str, str] | None = None

    def require(self, name: str) -> None:
        """Raise ConfigError if its package is not installed."""
        if self.package is not None and find_spec(self.package[0]) is None:
            raise missing(name, self.package[1])


REWARDS: dict[str, BuiltIn] = {
    "exact_match": BuiltIn(exact_match),
    "number_match": BuiltIn(number_match),
    "rouge_l": BuiltIn(rouge_l, package=("rouge_score", "rouge-score")),
    "chrf": BuiltIn(chrf, package=("sacrebleu", "sacrebleu")),
    "json_valid": BuiltIn(json_valid),
    "regex": BuiltIn(regex, r'"^Answer: \\d+$"'),
    "json_schema": BuiltIn(json_schema, "{type: object, required: [name]}"),
    "length": BuiltIn(length, "{max: 200}"),
    "xml_tags": BuiltIn(xml_tags, "[think, answer]"),
}
