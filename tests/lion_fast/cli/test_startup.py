"""What a command imports before it answers or refuses: nothing that takes seconds. Modules are counted, not time."""

import json

import pytest

from tests.lion_fast.processes import run_python

HEAVY = {"numpy", "torch", "transformers", "triton", "gradio", "ray", "bitsandbytes"}
MAIN = """
import json, sys
from lion_fast.cli import main
done = []
for arguments in json.loads(sys.argv[1]):
    try:
        status = main(arguments)
    except SystemExit as exit_of_argparse:
        status = exit_of_argparse.code
    done.append((arguments, status, sorted(name for name in sys.modules if "." not in name)))
print("\\n" + json.dumps(done))
"""
COMMANDS = (
    "quickstart",
    "convert",
    "data",
    "train",
    "memory",
    "caption",
    "ask",
    "locate",
    "tag",
    "demo",
    "check",
    "bench",
)
ANSWERS = [["--help"], *([command, "--help"] for command in COMMANDS), ["data", "convert", "--help"]]
ANSWERS += [["train", "--stage", "1", "--print-recipe"]]
REFUSALS = [
    [],
    ["caption"],
    ["caption", "none.png", "--model", "nowhere"],
    ["caption", "none.png", "--model", "."],
    ["ask", "none.png"],
    ["locate", "none.png", "the dog", "--num-beams", "0"],
    ["tag", "none.png"],
    ["tag", "none.png", "--ram", "nowhere"],
    ["tag", "none.png", "--ram", "."],
    ["caption", ".", "--out", "rows.txt"],
    ["caption", ".", "--out", "rows.jsonl", "--model", "nowhere"],
    ["demo", "--model", "nowhere"],
    ["demo", "--model", ".", "--host", "no address"],
    ["data", "tag", "none.jsonl", "--ram", "nowhere", "--out", "out.jsonl"],
    ["data", "check", "none.jsonl"],
    ["data", "convert", "gqa", "none.json", "--out", "out.jsonl"],
    ["convert", "--vit", "a", "--llm", "b", "--bert", "c", "--lion", "d", "--out", "e"],
    ["train", "--stage", "4", "no.such=setting"],
    ["memory", "--stage", "4", "no.such=setting"],
    ["memory"],
    ["check", "--operators", "layer_norm"],
    ["check", "--json", "."],
    ["bench"],
]


def test_help_and_refusals_import_nothing_heavy() -> None:
    """One process runs all of them, so that the names of the first that imports too much are clear."""
    for command, status, modules in json.loads(run_python("-c", MAIN, json.dumps(ANSWERS + REFUSALS)).splitlines()[-1]):
        assert not HEAVY & set(modules), command
        assert status == (0 if command in ANSWERS else 2), command


@pytest.mark.parametrize(
    "code",
    [
        "import lion_fast, transformers",
        "import transformers, lion_fast",
        "import lion_fast; from transformers.models.instructblip import modeling_instructblip",
        "from lion_fast import LionProcessor",
    ],
)
def test_the_classes_register_with_transformers(code: str) -> None:
    names = run_python(
        "-c",
        code + "; from transformers.models.auto import configuration_auto, modeling_auto, processing_auto"
        "; print(*sorted(name for name in configuration_auto.CONFIG_MAPPING._extra_content))"
        "; print(*sorted(c.__name__ for c in modeling_auto.MODEL_MAPPING._extra_content.values()))"
        "; print(*sorted(c.__name__ for c in processing_auto.PROCESSOR_MAPPING._extra_content.values()))",
    ).split("\n")
    assert names[:3] == ["lion lion_aggregator lion_ram lion_vision", "LionForCausalLM RamTagger", "LionProcessor"]


def test_the_package_alone_imports_nothing_heavy() -> None:
    """Its names and modules are attributes all the same."""
    code = (
        "import lion_fast, sys; print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
        "; assert set(lion_fast.__all__) <= set(dir(lion_fast)); assert lion_fast.io.__name__ == 'lion_fast.io'"
        "; print(all(hasattr(lion_fast, name) for name in lion_fast.__all__), hasattr(lion_fast, 'nothing'))"
    )
    assert run_python("-c", code).split("\n")[:2] == ["[]", "True False"]


UNUSED = {
    "datasets",
    "gradio",
    "matplotlib",
    "pandas",
    "peft",
    "pyarrow",
    "ray",
    "scipy",
    "sklearn",
    "tensorboard",
    "torchvision",
}


def test_the_model_imports_little_beyond_its_libraries() -> None:
    """What captioning and the estimate of memory import is nearly all PyTorch's and transformers' T5."""
    code = (
        "import sys, torch; from transformers.models.t5 import modeling_t5; libraries = len(sys.modules)"
        "; import lion_fast.inference.pipeline, lion_fast.io.images, lion_fast.training.memory"
        "; print(libraries, len(sys.modules), *{name.split('.')[0] for name in sys.modules})"
    )
    libraries, modules, *names = run_python("-c", code).split()
    assert int(modules) < int(libraries) + 250
    assert not UNUSED & set(names)


def test_an_error_of_arguments_shows_an_example(run_cli) -> None:
    status, _, err = run_cli("caption")
    assert status == 2
    assert err.startswith(
        "lion-fast caption: the following arguments are required: IMAGE (for example: lion-fast caption "
    )
    assert len(err.splitlines()) == 1
