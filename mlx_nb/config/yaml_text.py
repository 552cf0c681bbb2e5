"""Reads YAML as users mean it: 1e-5 is a number, `on` is text, repeated keys are errors, and keys have positions.

PyYAML follows YAML 1.1, which reads `1e-5` as a string, `on` as True and `012` as 10. Input that would exhaust memory,
recursion or digits is refused in one line.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mlx_nb.errors import CommandError, ConfigError, on_one_line, shortened

_DEEPEST = 32  # levels of nesting
_MOST_VALUES = 100_000  # with all aliases expanded
_MOST_NODES = 10_000  # keys and values as written
_MOST_NODES_WITH_ROWS = 50_000  # the limit if rows are written out
_MOST_CHARACTERS = 1_000_000


@dataclass(frozen=True)
class Document:
    """The mapping of one YAML text. `marks` has (line, column) of each key, counted from 1, by key path.

    `name` is its file, empty for a text. `problems` are the keys given twice: (mark, message).
    """

    values: dict[str, Any]
    marks: dict[tuple[str, ...], tuple[int, int]] = field(default_factory=dict)
    name: str = ""
    problems: tuple[tuple[tuple[int, int], str], ...] = ()

    def mark(self, *path: str) -> tuple[int, int] | None:
        """(line, column) of a key, or of the nearest one that encloses it; None for a key that is not in the text."""
        while path and path not in self.marks:
            path = path[:-1]
        return self.marks.get(path)

    def located(self, mark: tuple[int, int] | None, message: str) -> str:
        """The message with the file, line and column in front."""
        where = [self.name] if self.name else []
        if mark is not None:
            where.append(f"line {mark[0]}, column {mark[1]}")
        return f"{', '.join(where)}: {message}" if where else message


class _Loader(yaml.SafeLoader):
    """SafeLoader with the scalars and tags of the YAML 1.2 core schema, and limits on depth and size."""

    depth = 0
    nodes = 0
    most_nodes = _MOST_NODES

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self.depth += 1
        self.nodes += 1
        if self.depth == 2 and isinstance(index, yaml.ScalarNode) and index.value == "data":
            self.most_nodes = _MOST_NODES_WITH_ROWS
        if self.nodes > self.most_nodes:
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(None, None, f"it has more than {self.most_nodes:,} keys and values", mark)
        if self.depth > _DEEPEST:
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(None, None, f"nested more than {_DEEPEST} levels deep", mark)
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1


def _scalar(pattern: str, what: str, make: Callable[[str], Any]) -> Callable[[yaml.SafeLoader, Any], Any]:
    """A constructor for scalars that match `pattern`; `what` is the name of their type."""
    whole = re.compile(pattern)

    def construct(loader: yaml.SafeLoader, node: Any) -> Any:
        text = loader.construct_scalar(node)
        reason = f"{text[:40]!r} is not {what}"
        if whole.fullmatch(text):
            try:
                return make(text)
            except ValueError:  # Python converts at most 4,300 digits
                reason = f"a number of {len(text):,} digits is too long"
        raise yaml.constructor.ConstructorError(None, None, reason, node.start_mark)

    return construct


def _text(loader: yaml.SafeLoader, node: Any) -> str:
    """A text in which surrogate pairs from JSON escapes are joined to one character."""
    text = loader.construct_scalar(node)
    return re.sub("[\ud800-\udbff][\udc00-\udfff]", lambda pair: _joined(pair.group()), text)


def _joined(pair: str) -> str:
    return pair.encode("utf-16-le", "surrogatepass").decode("utf-16-le")


def _refuse_tag(_loader: yaml.SafeLoader, node: yaml.Node) -> Any:
    tag = node.tag.replace(_TAG, "!!")
    raise yaml.constructor.ConstructorError(None, None, f"the tag {tag} has no meaning here", node.start_mark)


_TAG = "tag:yaml.org,2002:"
_NULL, _BOOL, _INT = r"~|null|Null|NULL|", r"true|True|TRUE|false|False|FALSE", r"[-+]?[0-9][0-9_]*"
_FLOAT = r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
_SCALARS: tuple[tuple[str, str, str, str, Callable[[str], Any]], ...] = (
    ("null", _NULL, "~nN", "null", lambda text: None),
    ("bool", _BOOL, "tTfF", "true or false", lambda text: text.lower() == "true"),
    ("int", _INT, "-+0123456789", "a whole number", lambda text: int(text.replace("_", ""))),
    (
        "float",
        _FLOAT,
        "-+.0123456789",
        "a number",
        lambda text: float(text.replace("_", "").lower().replace(".inf", "inf").replace(".nan", "nan")),
    ),
)
_Loader.yaml_implicit_resolvers = {}
_Loader.yaml_constructors = {
    _TAG + "str": _text,
    _TAG + "seq": yaml.SafeLoader.construct_yaml_seq,
    _TAG + "map": yaml.SafeLoader.construct_yaml_map,
    None: _refuse_tag,
}
for _name, _pattern, _first, _what, _make in _SCALARS:
    _resolved = [*_first, ""] if _name == "null" else list(_first)
    _Loader.add_implicit_resolver(_TAG + _name, re.compile(rf"^(?:{_pattern})$"), _resolved)
    _Loader.add_constructor(_TAG + _name, _scalar(_pattern, _what, _make))


def read_yaml_file(path: Path) -> str:
    """The text of a YAML file in UTF-8, or in UTF-16 with a byte order mark. Raises ConfigError."""
    if path.is_dir():
        raise ConfigError(f"{path} is a folder. Give the path of a YAML file.")
    try:
        size = path.stat().st_size
        if size > 4 * _MOST_CHARACTERS:
            raise _too_long(str(path), f"{size:,} bytes")
        content = path.read_bytes()
    except FileNotFoundError:
        raise ConfigError(f"no such file: {path}. Give the path of a YAML file, or YAML text.") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}.") from None
    utf_16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return content.decode("utf-16" if utf_16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path} cannot be read at line {line}: it is not UTF-8. Save it as UTF-8.") from None


def _too_long(named: str, size: str) -> ConfigError:
    return ConfigError(
        f"{named} is too long for settings: {size}, and at most {_MOST_CHARACTERS:,} characters are read. Put rows "
        "into a file, and name it in `data`."
    )


def load_mapping(text: str, name: str = "") -> Document:
    """Read a YAML mapping; `name` is its file. Raises ConfigError with line and column if it is not one."""
    named = name or "the YAML"
    if len(text) > _MOST_CHARACTERS:
        raise _too_long(named, f"{len(text):,} characters")
    loader = None
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        if root is None:
            return Document({}, name=name)
        if not isinstance(root, yaml.MappingNode):
            if bare := _line_without_colon(text, root.start_mark, _NO_COLON[0]):
                raise ConfigError(f"{named} is not a list of `key: value` lines.{bare[1]}")
            raise ConfigError(f"{named} is not a list of `key: value` lines. Write for example `model: smollm2-135m`.")
        if _size(root, {}) > _MOST_VALUES:
            raise ConfigError(f"{named} holds more than {_MOST_VALUES:,} values once its aliases are written out.")
        marks: dict[tuple[str, ...], tuple[int, int]] = {}
        problems: list[tuple[tuple[int, int], str]] = []
        _record_marks(root, (), marks, problems)
        return Document(loader.construct_document(root), marks, name, tuple(problems))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        if mark and (bare := _line_without_colon(text, mark, error.problem)):
            raise ConfigError(f"{named} cannot be read at line {bare[0]}.{bare[1]}") from None
        where = ""
        if mark:
            number = _last_written(re.split(_LINE_BREAK, text), mark)
            where = f" at line {number + 1}" + (f", column {mark.column + 1}" if number == mark.line else "")
        reason = _REASONS.get(error.problem or "", error.problem or "it is no YAML")
        raise ConfigError(f"{named} cannot be read{where}: {reason}.{_hint(text, mark, error.problem)}") from None
    except yaml.reader.ReaderError as error:
        before = re.split(_LINE_BREAK, text[: error.position])
        where = f"line {len(before)}, column {len(before[-1]) + 1}"
        character = f"U+{error.character:04X}" if isinstance(error.character, int) else repr(error.character)
        raise ConfigError(f"{named} cannot be read at {where}: it has the character {character}. Remove it.") from None
    except (ValueError, OverflowError):  # raised by chr() for "\UFFFFFFFF"
        line = loader.get_mark().line + 1 if loader else 1
        raise ConfigError(f"{named} cannot be read at line {line}: there is no such character.") from None
    finally:
        if loader is not None:
            loader.dispose()


def read_value(text: str) -> Any:
    """Parse the value of a `key=value` word: number, true, false, null, quoted text, list or mapping, else plain text.

    Unlike in YAML lines, `#` and `: ` have no special meaning. Raises ConfigError for an unclosed list.
    """
    if text.lstrip()[:1] in ("[", "{", '"', "'"):
        return load_mapping(f"value: {text}", f"the value {text[:80]}").values["value"]
    for name, pattern, _, _, make in _SCALARS:
        if re.fullmatch(pattern, text.strip()) and name != "null":
            return make(text.strip())
    return None if re.fullmatch(_NULL, text.strip()) else text


def read_list(text: str) -> list[Any]:
    """The elements of a list, with or without its brackets: `exact_match,{regex: ^Yes}`. Raises ConfigError."""
    value = read_value(text if text.lstrip().startswith("[") else f"[{text}]")
    return value if isinstance(value, list) else [value]


def read_words(words: Sequence[str], command: str, example: str) -> dict[str, Any]:
    """The settings in `key=value` words of a command line. Raises CommandError with one line for each wrong word.

    A key and its value as two words are one wrong word.
    """
    values: dict[str, Any] = {}
    problems = []
    left = list(words)
    while left:
        word = left.pop(0)
        key, equals, text = word.partition("=")
        if word.replace(".", "").isidentifier() and left and "=" not in left[0]:
            value = left.pop(0)
            problems.append(f"{command}: {f'{word} {value}'!r} is not key=value. Write `{word}={value}`.")
        elif not equals or not key or not text:
            problems.append(f"{command}: {word!r} is not key=value. For example: {command} {example}")
        elif key in values:
            problems.append(f"{command}: `{on_one_line(key)}` is given twice. Keep one of them.")
        else:
            try:
                values[key] = read_value(text)
            except ConfigError as error:
                problems.append(f"{command}: {error}")
    if problems:
        raise CommandError("\n".join(problems))
    return values


# A setting in an error message: a line of YAML in backticks.
_LINE_OF_ADVICE = re.compile(r"`([a-z_][\w.]*): ([^`]+)`")


@contextmanager
def advice_as_words() -> Iterator[None]:
    """A context that rewrites the advice in errors from YAML lines to `key=value` words."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(_LINE_OF_ADVICE.sub(_as_word, str(error))) from None


def _as_word(line: re.Match[str]) -> str:
    name, value = line.groups()
    return f"`'{name}={value}'`" if re.search(r"[\s{}\[\]]", value) else f"`{name}={value}`"


def _size(node: yaml.Node, known: dict[int, int]) -> int:
    """Number of values in `node` with its aliases expanded. Raises ComposerError if it contains itself."""
    size = known.get(id(node))
    if size == 0:
        raise yaml.composer.ComposerError(None, None, "an anchor that holds itself", node.start_mark)
    if size is None:
        known[id(node)] = 0
        children = node.value if isinstance(node, yaml.CollectionNode) else ()
        parts = [part for child in children for part in (child if isinstance(child, tuple) else (child,))]
        size = known[id(node)] = 1 + sum(_size(part, known) for part in parts)
    return size


def _record_marks(
    node: yaml.Node,
    path: tuple[str, ...],
    marks: dict[tuple[str, ...], tuple[int, int]],
    problems: list[tuple[tuple[int, int], str]],
) -> None:
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _record_marks(item, (*path, str(index)), marks, problems)
    if not isinstance(node, yaml.MappingNode):
        return
    seen: dict[str, int] = {}
    for key_node, value_node in node.value:
        key, mark = str(key_node.value), (key_node.start_mark.line + 1, key_node.start_mark.column + 1)
        if key in seen:
            problems.append(
                (mark, f"`{on_one_line(shortened(key))}` is given twice, first on line {seen[key]}. Keep one of them.")
            )
        else:
            seen[key] = mark[0]
        if key == "<<" and key_node.style is None:
            raise yaml.composer.ComposerError(None, None, "`<<` does not merge here", key_node.start_mark)
        marks[(*path, key)] = mark
        _record_marks(value_node, (*path, key), marks, problems)


_LINE_BREAK = "\r\n|[\n\r\x85\u2028\u2029]"
# PyYAML's messages, reworded for someone who writes settings.
_REASONS = {
    f"it has more than {_MOST_NODES_WITH_ROWS:,} keys and values": (
        f"it has more than {_MOST_NODES_WITH_ROWS:,} keys and values; put rows into a file, and name it in `data`"
    ),
    "found unhashable key": "a list or mapping cannot be a key; put a text with braces in quotes",
    "found duplicate anchor": "an anchor is given twice",
    "but found another document": "there is a second document after `---`; keep one",
}


# A line that is meant as `key: value`, and what is missing in it.
_FORGOTTEN = {
    r"([A-Za-z_][\w.-]*)(?:[ ]+([^:=]*\S))?": "no colon",
    r"([A-Za-z_][\w.-]*):(?!//)([^\s:].*)": "no space behind its colon",
    r"([A-Za-z_][\w.-]*)\s*=\s*(\S.*)": "`=` in place of a colon",
}
_NO_COLON = ("mapping values are not allowed here", "could not find expected ':'")


def _line_without_colon(text: str, mark: yaml.Mark, problem: str | None) -> tuple[int, str] | None:
    """(number, advice) of the line that lacks its colon, or the space after it, if that explains the error.

    YAML reports the place where it needed the colon, which may be as late as the next non-empty line.
    """
    if problem not in _NO_COLON:
        return None
    lines = re.split(_LINE_BREAK, text)
    for number in range(min(mark.line, len(lines) - 1), -1, -1):
        line = lines[number].split(" #")[0].strip()
        if not line or line.startswith("#"):
            continue
        for pattern, what in _FORGOTTEN.items():
            if bare := re.fullmatch(pattern, line):
                write = f"{bare[1]}: {bare[2][:80]}" if bare[2] else f"{bare[1]}: ..."
                return number + 1, f" It reads `{line[:80]}`. Line {number + 1} has {what}: write `{write}`."
        if number < mark.line:
            return None
    return None


def _last_written(lines: Sequence[str], mark: yaml.Mark) -> int:
    """The index of the marked line, or of the last non-empty one before it: YAML notices many mistakes late."""
    number = min(mark.line, len(lines) - 1)
    while number > 0 and not lines[number].strip():
        number -= 1
    return number


def _hint(text: str, mark: yaml.Mark | None, problem: str | None) -> str:
    lines = re.split(_LINE_BREAK, text)
    if mark is None:
        return ""
    number = _last_written(lines, mark)
    line = lines[number]
    if "\t" in line:
        return " YAML does not allow tabs: indent with spaces."
    if re.match(r"\s*[\w-]+\s*=", line):
        return " Write `key: value`, not `key=value`."
    if problem == _NO_COLON[0]:
        before = next((one for one in reversed(lines[:number]) if one.strip()), "")
        if _indent(line) > _indent(before) and re.match(r"\s*[\w-]+: +[^\s#|>]", before):
            return f" Line {number + 1} is indented more than the one before it: begin both at the same place."
        if (two := re.fullmatch(r"\s*([\w-]+): ([^\s'\"].*: .*)", line)) and "'" not in two[2]:
            return f" A value with a colon is put in quotes: write `{two[1]}: '{two[2].strip()[:80]}'`."
    return f" The line reads: {line.strip()[:80]}"


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())
