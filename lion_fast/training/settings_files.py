"""Settings in YAML, from people's files and command lines: read strictly, and with bounds on time and memory."""

import re
from pathlib import Path
from typing import Any

import yaml
from yaml.composer import ComposerError
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from lion_fast.io.reading import shown
from lion_fast.training.sections import RecipeError, shown_name

_MAX_BYTES = 1 << 20
_MAX_NODES = 50_000  # PyYAML takes 0.1 ms for each
_MAX_DEPTH = 50


def read_settings(file: Path) -> dict[str, Any]:
    """Return the settings in a YAML file.

    Raises:
        RecipeError: it is no file, is larger than 1 MiB, or is not a mapping in YAML; see `parse_settings`.
        OSError: it cannot be opened.
    """
    name = shown_name(file)
    try:
        # A pipe that a shell made for `--config <(...)` is read; another could block forever.
        if not file.is_file() and (file.is_dir() or not file.is_relative_to("/dev")):
            if not file.exists():
                raise FileNotFoundError(f"{name}: expected a YAML file, found nothing")
            got = "a directory" if file.is_dir() else "no regular file"
            raise RecipeError(f"{name}: expected a YAML file, got {got}")
        with file.open("rb") as opened:
            content = opened.read(_MAX_BYTES + 1)
    except OSError as error:
        if error.errno is not None:
            error.filename = name  # which is of limited length, and which errors of reading lack
        raise
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{name}: expected text in UTF-8, got other bytes in line {_line(content, error)}") from error
    return parse_settings(text, name)


def parse_settings(text: str, name: str) -> dict[str, Any]:
    """Return the settings in a text of YAML; `name` is its name in errors.

    Raises:
        RecipeError: the text is not readable as YAML, or not a mapping.
    """
    loaded = parse_value(text, name)
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise RecipeError(f"{name}: expected keys with values, got {type(loaded).__name__}")
    return loaded


def parse_value(text: str, name: str) -> Any:
    """Return the value of a text of YAML.

    Raises:
        RecipeError: the text is longer than 1 MiB, has more than 50,000 values (each alias counts as what it stands
            for) or 50 levels, repeats a key, refers to itself, or is not readable as YAML.
    """
    if len(text) > _MAX_BYTES:
        raise RecipeError(f"{name}: expected at most {_MAX_BYTES} bytes, got more")
    try:
        return yaml.load(text, _Loader)
    except Exception as error:  # PyYAML's constructors raise errors of many types, such as KeyError for `!!bool x`
        detail = " ".join(str(error).split()) or type(error).__name__
        raise RecipeError(f"{name}: not readable as YAML ({detail[:300]})") from error


class _Loader(yaml.SafeLoader):
    """A YAML loader that refuses repeated keys, aliases that multiply and deep nesting.

    Numbers are those of YAML 1.2: `1e-4` is a number, which PyYAML (YAML 1.1) reads as a string.
    """

    def __init__(self, stream: str):
        super().__init__(stream)
        self._depth = self._nodes = 0
        self._extent: dict[int, tuple[int, int]] = {}  # id of a node -> nodes and levels in it, aliases counted as such

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        event: Any = self.peek_event()
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise self._refusal(f"expected at most {_MAX_DEPTH} levels", event)
        self._nodes += 1
        if self._nodes > _MAX_NODES:  # without reading the rest
            raise self._refusal(f"expected at most {_MAX_NODES} values and {_MAX_DEPTH} levels", event)
        node = super().compose_node(parent, index)
        self._depth -= 1
        if isinstance(event, yaml.AliasEvent):
            if id(node) not in self._extent:
                raise self._refusal(f"{event.anchor} refers to itself", event)
            return node
        parts: list[Any] = []
        if isinstance(node, MappingNode):
            self._expect_distinct_keys(node)
            parts = [part for pair in node.value for part in pair]
        elif isinstance(node, SequenceNode):
            parts = node.value
        extents = [self._extent[id(part)] for part in parts]
        size, levels = 1 + sum(size for size, _ in extents), 1 + max((levels for _, levels in extents), default=0)
        if size > _MAX_NODES or levels > _MAX_DEPTH:
            raise self._refusal(f"expected at most {_MAX_NODES} values and {_MAX_DEPTH} levels", event)
        self._extent[id(node)] = size, levels
        return node

    def _expect_distinct_keys(self, node: MappingNode) -> None:
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if isinstance(key, ScalarNode):
                line, same = key.start_mark.line + 1, (key.tag, key.value)
                if same in lines:
                    problem = f"key {shown(key.value)} is given twice, in lines {lines[same]} and {line}"
                    raise ComposerError(None, None, problem)
                lines[same] = line

    @staticmethod
    def _refusal(problem: str, event: Any) -> ComposerError:
        return ComposerError(None, None, problem, event.start_mark)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$"), list("-+.0123456789")
)


def _line(content: bytes, error: UnicodeDecodeError) -> int:
    return content.count(b"\n", 0, error.start) + 1
