"""Hostile recipes: YAML that is damaged, deep, ambiguous or of wrong types, in files and in overrides."""

import math
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from lion_fast.training.recipe import Recipe, check_resumable, dump_recipe, load_recipe, shipped_recipe
from tests.campaign.running import Trial

NUMBERS = (0, -1, 1, 2**31, 2**63, 10**40, -(10**400), 0.5, -0.0, 1e-320, 1e308, math.inf, -math.inf, math.nan, True)
TEXTS = (
    *(
        "",
        " ",
        "~",
        "~/runs/a",
        "~nobody-here/a",
        "$HOME/a",
        "$UNSET_HERE/a",
        "${UNSET_HERE}",
        "$",
        "${",
        "a\0b",
        "\ud800",
    ),
    *(
        "\udcff",
        "a\nb",
        "\u2028",
        "a" * 300,
        "a/" * 3000,
        "é" * 200,
        "scenes:",
        "scenes:0:0",
        "scenes:1:9",
        "null",
        "1e-4",
    ),
    *(
        "2001-02-30",
        "1:60:99",
        "0x",
        "0o9",
        "!!python/name:os.system",
        "{{7*7}}",
        "%s%n",
        "../..",
        "/dev/zero",
        "=",
        "<<",
    ),
)
VALUES = (
    *NUMBERS,
    *TEXTS,
    None,
    [],
    {},
    [[]],
    {"a": 1},
    ["a", "a"],
    [1, 2, 3],
    ["x.jsonl", "./x.jsonl"],
    [None],
    {1: 2},
)
TOKENS = (
    *("[", "]", "{", "}", ":", "- ", "? ", "&a ", "*a", "*b", "!!python/object/apply:os.system ['true']", "!!bool x"),
    *(
        "!!int x",
        "!!float x",
        "!!timestamp x",
        "!!binary x",
        "!!set {a}",
        "!!omap [a]",
        "!!map [a]",
        "!x y",
        "<<: ",
        "%YAML 9.9\n",
    ),
    *(
        "--- ",
        "...",
        "|\n",
        ">-\n",
        "\t",
        "\r",
        "\x00",
        "\x85",
        "\ufeff",
        "\ud800",
        "'",
        '"',
        "#",
        "@",
        "`",
        "0x_",
        "9" * 5000,
    ),
    *("2001-13-45", "2001-01-01T99:99:99Z", "stage: 1\n", "steps: 3\nsteps: 4\n", "\n", " " * 40),
)
FILES = (
    *["text"] * 6,
    *("bytes", "random", "cut", "deep", "bomb", "cycle", "merge", "twice") * 2,
    "kind",
    "kind",
    "large",
)


def make(rng: random.Random, folder: Path) -> Trial:
    stage = rng.choice((1, 2, 3, 4))
    overrides: list[str] = []
    file = None
    names = ["recipe", *(name.split(".")[-1] for name in _keys(_shipped(stage)))]
    what = rng.choice(("override", "override", "values", "file", "file", "resumed"))
    if what == "override":
        overrides = [_override(rng, stage) for _ in range(rng.choice((1, 1, 1, 2, 5)))]
        names += ["override", *(shown[:20] for text in overrides if (shown := text.partition("=")[0]).isprintable())]
        described = repr(overrides)[:300]
    elif what == "values":
        settings = _shipped(stage)
        changed = [_change(rng, settings) for _ in range(rng.choice((1, 1, 2, 4)))]
        described = f"values {changed!r}"[:300]
        return Trial(f"stage {stage}: {described}", lambda: Recipe.read(settings), [*names, *changed], _same)
    elif what == "resumed":
        old, new = _shipped(stage), load_recipe(stage).plain()
        changed = [_change(rng, old)[:100] for _ in range(rng.choice((1, 2)))]  # as messages show them
        return Trial(
            f"stage {stage}: resumed after {changed!r}"[:300], lambda: check_resumable(old, new), [*names, *changed]
        )
    else:
        file, described = _file(rng, folder, stage)
        names += [file.name[2:40]]  # without the line break, which is shown as \\n
    call: Callable[[], Any] = lambda: load_recipe(stage, file, overrides)  # noqa: E731
    return Trial(f"stage {stage}: {described}", call, names, _same)


def _same(recipe: Recipe) -> None:
    """A recipe that was accepted can be written, read again and continued, and has only finite numbers."""
    again = Recipe.read(yaml.safe_load(dump_recipe(recipe)))
    assert again == recipe, "not the same after it was written and read"
    check_resumable(yaml.safe_load(dump_recipe(recipe)), recipe.plain())
    for name, value in _leaves(recipe.plain()):
        assert not isinstance(value, float) or math.isfinite(value), f"{name} is {value}"
    for path in (recipe.output_dir, *recipe.model.carry_over):
        assert path, "an empty path"
        assert "\0" not in path
        assert not path.startswith("~/"), f"{path} is not expanded"


def _shipped(stage: int) -> dict[str, Any]:
    return yaml.safe_load(
        shipped_recipe(stage).replace("1e-4", "1.0e-4").replace("1e-5", "1.0e-5").replace("1e-6", "1.0e-6")
    )


def _keys(settings: dict[str, Any]) -> list[str]:
    keys = []
    for key, value in settings.items():
        if not isinstance(key, str) or "." in key:
            continue
        keys += [key, *(f"{key}.{name}" for name in _keys(value))] if isinstance(value, dict) else [key]
    return keys


def _leaves(settings: dict[str, Any]) -> list[tuple[str, Any]]:
    leaves = []
    for key, value in settings.items():
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        leaves += [(key, value)] if not items else [leaf for k, v in items for leaf in _leaves({f"{key}.{k}": v})]
    return leaves


def _change(rng: random.Random, settings: dict[Any, Any]) -> str:
    """Change, remove or add one setting at any level, and return its key."""
    key = rng.choice(_keys(settings))
    *parents, name = key.split(".")
    for parent in parents:
        settings = settings[parent]
    action = rng.choice(("value", "value", "value", "list", "remove", "add", "nest", "long"))
    if action == "value":
        settings[name] = rng.choice(VALUES)
    elif action == "list":
        settings[name] = [rng.choice(VALUES) for _ in range(rng.choice((1, 2, 2, 50)))]
    elif action == "remove":
        del settings[name]
    elif action == "add":
        name = rng.choice([value for value in VALUES if not isinstance(value, list | dict)])
        settings[name] = rng.choice(VALUES)
    elif action == "long":
        settings[name] = rng.choice(("x" * 10**5, ["y"] * 10**5, {str(i): i for i in range(10**4)}))
    else:
        value = settings[name]
        for _ in range(rng.choice((1, 3, 40))):
            value = [value] if rng.random() < 0.5 else {"a": value}
        settings[name] = value
    return str(name) if str(name).isprintable() else "as at the start of the run"


def _override(rng: random.Random, stage: int) -> str:
    key = rng.choice(_keys(_shipped(stage)))
    kind = rng.choice(("value", "value", "token", "token", "key", "depth", "bytes"))
    if kind == "value":
        value = rng.choice(VALUES)
        text = str(value) if isinstance(value, str) or rng.random() < 0.3 else _dumped(value)
        return f"{key}={text}"
    if kind == "token":
        return f"{key}={''.join(rng.choice((*TOKENS, *TEXTS, 'a', ' ')) for _ in range(rng.randint(1, 8)))}"
    if kind == "key":
        return rng.choice(
            (key, f"{key}.", f".{key}=1", f"{key}.a=1", f"{key.upper()}=1", f"{rng.choice(TEXTS)}={key}", "=")
        )
    if kind == "depth":
        return f"{'.'.join(['a'] * rng.choice((2, 100, 5000)))}=1" if rng.random() < 0.5 else f"{key}={'[' * 5000}"
    characters = [chr(rng.choice((rng.randrange(128), rng.randrange(0x3000)))) for _ in range(rng.randint(1, 40))]
    return f"{key}={''.join(characters)}"


def _dumped(value: Any) -> str:
    try:
        return yaml.safe_dump(value, default_flow_style=True).removesuffix("\n...\n").strip()
    except ValueError:  # an integer that Python refuses to print
        return hex(value)


def _file(rng: random.Random, folder: Path, stage: int) -> tuple[Path, str]:
    kind = rng.choice(FILES)
    file = folder / rng.choice(("mine.yaml", "mine", "m\nine.yaml", "é.yaml", "a" * 200 + ".yaml"))
    text = shipped_recipe(stage)
    if kind == "text":
        for _ in range(rng.choice((1, 1, 2, 6))):
            at = rng.randrange(len(text))
            text = text[:at] + rng.choice((*TOKENS, *TEXTS)) + text[at + rng.choice((0, 0, 1, 5)) :]
    elif kind == "deep":
        text = rng.choice(
            (
                "a: " + "[" * 10**4,
                "{a: " * 10**4,
                "- " * 10**4,
                "? " * 3000,
                "a:\n" + "".join(f"{' ' * i}a:\n" for i in range(1, 900)),
            )
        )
    elif kind == "bomb":
        wide, high = rng.choice(((10, 9), (2, 40), (300, 3))), rng.choice(("[{}]", "{{x: [{}]}}"))
        lines = [f"a0: &a0 {high.format('1, 1')}"]
        lines += [f"a{i}: &a{i} {high.format(', '.join([f'*a{i - 1}'] * wide[0]))}" for i in range(1, wide[1])]
        text = "\n".join([*lines, f"{rng.choice(_keys(_shipped(stage))).split('.')[0]}: *a{wide[1] - 1}\n"])
    elif kind == "cycle":
        text = rng.choice(
            ("data: &a {train: *a}", "data: &a [*a]", "&a {data: *a}", "? &a [*a]\n: 1", "data: &a {<<: *a}")
        )
    elif kind == "merge":
        text = "data: &a {workers: 3}\nbatch:\n  <<: [" + ", ".join(["*a"] * rng.choice((1, 2, 10**4))) + "]\n"
    elif kind == "twice":
        name, value = rng.choice(list(_shipped(stage).items()))
        text += f"\n{yaml.safe_dump({name: value})}"
    elif kind == "large":
        text = rng.choice(
            (
                "#" * (2 << 20),
                f"output_dir: {'a' * (1 << 19)}\n",
                "data: [" + "1," * 60_000 + "]",
                "\n" * (1 << 19),
                "a: b\n" * 100_000,
            )
        )
    if kind == "kind":
        form = rng.choice(("directory", "fifo", "absent", "link", "loop", "socket", "empty", "device", "long"))
        if form == "directory":
            file.mkdir()
        elif form == "fifo":
            os.mkfifo(file)
        elif form in ("link", "loop"):
            file.symlink_to(file if form == "loop" else folder / "nothing")
        elif form == "empty":
            file.touch()
        elif form == "device":
            file = Path(rng.choice(("/dev/zero", "/dev/null", "/dev/full")))
        elif form == "long":
            file = folder / ("a" * 5000)
        return file, f"{form} as a file"
    content = text.encode("utf-8", "surrogatepass")
    if kind == "bytes":
        at = rng.randrange(len(content))
        content = content[:at] + rng.randbytes(rng.choice((1, 2, 8))) + content[at:]
        content = rng.choice((content, content.decode("latin-1").encode("utf-16"), b"\xff\xfe" + content))
    elif kind == "random":
        content = rng.randbytes(rng.choice((1, 10, 1000)))
    elif kind == "cut":
        content = content[: rng.randrange(len(content))]
    file.write_bytes(content)
    return file, f"{kind} {content[:200]!r}"
