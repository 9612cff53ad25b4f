"""Checkpoints that ask for code: refused by every call and command, by file and key, with no question or contact."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from transformers import AutoConfig, AutoModel, AutoProcessor, BertConfig

from lion_fast import LionConfig, LionForCausalLM, LionProcessor, RamTagger, ZeroShotTagger
from lion_fast.io.checkpoints import CheckpointError
from lion_fast.io.untrusted import expect_data_only
from tests.lion_fast.processes import import_path
from tests.lion_fast.tiny import make_answerer, make_tagger

SCRIPT = Path(__file__).with_name("load_hostile.py")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of small directories: `lion`, `ram`, and `llm` and `bert` as `convert` reads them."""
    root = tmp_path_factory.mktemp("folders")
    answerer = make_answerer()
    answerer.model.save_pretrained(root / "lion")
    answerer.processor.save_pretrained(root / "lion")
    make_tagger(["dog", "cat"], [0.5, 0.5]).save_pretrained(root / "ram")
    answerer.processor.tokenizer.save_pretrained(root / "llm")
    answerer.model.config.text_config.save_pretrained(root / "llm")
    answerer.processor.qformer_tokenizer.save_pretrained(root / "bert")
    BertConfig(hidden_size=16, num_attention_heads=2).save_pretrained(root / "bert")
    Image.new("RGB", (28, 28)).save(root / "image.png")
    return root


def test_no_call_or_command_runs_code_asks_or_contacts_anybody(folders: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(folders)],
        input="y\n" * 1000,
        env={**os.environ, "PYTHONPATH": import_path()},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["wrong"] == []
    assert found["contacts"] == []
    assert "y/N" not in done.stdout + done.stderr
    assert not (folders / "ran").exists()
    assert found["calls"] > 150


def test_the_code_of_these_tests_is_run_by_who_trusts_it(tmp_path: Path) -> None:
    """Otherwise the test above would hold for code that nothing could run."""
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    (tmp_path / "config.json").write_text(json.dumps({"auto_map": {"AutoConfig": "evil.Evil"}, "model_type": "evil"}))
    with pytest.raises(AttributeError):
        AutoConfig.from_pretrained(tmp_path, trust_remote_code=True)
    assert (tmp_path / "ran").exists()


@pytest.fixture
def lion(folders: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint."""
    return Path(shutil.copytree(folders / "lion", tmp_path / "lion"))


def change(file: Path, **settings: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def test_auto_classes_do_not_ask_for_ours(lion: Path) -> None:
    change(lion / "config.json", auto_map={"AutoModel": "evil.Evil", "AutoConfig": "evil.Evil"})
    for auto_class in (AutoConfig, AutoModel):
        with pytest.raises(ValueError, match=f"{lion}: auto_map: expected none"):
            auto_class.from_pretrained(lion)
    change(lion / "config.json", auto_map=None)
    change(lion / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", None]})
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: auto_map: expected none"):
        AutoProcessor.from_pretrained(lion)


def test_ordinary_settings_are_accepted(lion: Path) -> None:
    """Published tokenizers record names and paths of where they were made."""
    recorded = {
        "name_or_path": "google/t5-v1_1-xl",
        "special_tokens_map_file": "/home/somebody/special_tokens_map.json",
    }
    change(lion / "tokenizer_config.json", tokenizer_file=None, **recorded)
    change(lion / "config.json", _name_or_path="google/flan-t5-xl", attn_implementation="eager", torch_dtype="float32")
    assert LionForCausalLM.from_pretrained(lion).config._attn_implementation == "eager"
    LionProcessor.from_pretrained(lion)
    with pytest.raises(ValueError, match="trust_remote_code: expected False, got True; load a classifier"):
        ZeroShotTagger.from_pretrained(lion, ["dog"], trust_remote_code=True)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("config.json", {"model_type": "t5"}, "model_type: expected 'lion', got 't5'"),
        ("config.json", {"dtype": "load"}, "dtype: expected the name of a floating-point dtype, got 'load'"),
        ("config.json", {"dtype": "float8_e4m3fn"}, "dtype: expected the name of a floating-point dtype"),
        ("config.json", {"text_config": {"auto_map": {}}}, r"text_config\.auto_map: expected none"),
        ("config.json", {"quantization_config": []}, "quantization_config: expected a JSON object"),
        ("config.json", {"to_dict": 1}, "to_dict: expected no setting of this name"),
        ("config.json", {"num_labels": 10**9}, "num_labels: expected at most 1048576, got 1000000000"),
        ("processor_config.json", {"max_txt_len": True}, "max_txt_len: expected a whole number"),
        (
            "processor_config.json",
            {"image_processor": {"size": {"height": 10**9, "width": 1}}},
            "size: expected height",
        ),
        (
            "processor_config.json",
            {"image_processor": {"do_pad": True, "pad_size": {"height": 10**9, "width": 1}}},
            "pad_size: expected height",
        ),
        ("processor_config.json", {"image_processor": {"crop_size": 10**9}}, "crop_size: expected height"),
        ("processor_config.json", {"image_processor": {"preprocess": 1}}, "preprocess: expected no setting of this"),
        ("processor_config.json", {"soft_prompt_token": ""}, "soft_prompt_token: expected text or null"),
        ("processor_config.json", {"image_processor": {"image_std": [1, 0, 1]}}, "image_std: expected three positive"),
        ("processor_config.json", {"image_processor": {"image_processor_type": "CLIPImageProcessor"}}, "one of Blip"),
        ("tokenizer_config.json", {"tokenizer_class": "pipeline"}, "tokenizer_class: expected the name of a tokenizer"),
        ("tokenizer_config.json", {"vocab_file": "/etc/passwd"}, "vocab_file: expected the name of a file"),
        (
            "qformer_tokenizer/tokenizer_config.json",
            {"processor_class": "Evil"},
            "processor_class: expected one of Lion",
        ),
    ],
)
def test_unusable_settings_are_named(lion: Path, name: str, settings: dict, message: str) -> None:
    change(lion / name, **settings)
    load = LionForCausalLM.from_pretrained if name == "config.json" else LionProcessor.from_pretrained
    with pytest.raises(CheckpointError, match=f"{lion / name}: .*{message}") as caught:
        load(lion)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xef\xbb\xbf{}", "not a readable JSON file"),
        ('{"a": 1}'.encode("utf-16"), "not a readable JSON file"),
        (b'{"a":' * 100_000, "not a readable JSON file"),
        (b"[]", "expected a JSON object, got list"),
        (b"{}" + b" " * (16 << 20), "expected at most 16777216 bytes of settings, got 16777218"),
    ],
)
def test_unreadable_settings_are_named(lion: Path, content: bytes, message: str) -> None:
    (lion / "config.json").write_bytes(content)
    for load in (LionConfig.from_pretrained, LionForCausalLM.from_pretrained):
        with pytest.raises(CheckpointError, match=rf"config\.json: {message}"):
            load(lion)


@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "qformer_tokenizer/x.txt"]
)
@pytest.mark.parametrize("kind", ["pipe", "directory", "link to nothing"])
def test_what_is_no_file_is_not_opened(lion: Path, name: str, kind: str) -> None:
    file = lion / name
    file.unlink(missing_ok=True)
    {"pipe": os.mkfifo, "directory": os.mkdir, "link to nothing": lambda path: path.symlink_to("absent")}[kind](file)
    got = {"pipe": "a pipe, socket or device", "directory": "a directory"}.get(kind, "No such file or directory")
    with pytest.raises(CheckpointError, match=f"{file}: expected a file, got {got}"):
        LionProcessor.from_pretrained(lion)


def test_a_damaged_tokenizer_of_the_qformer_is_not_replaced_by_the_other(lion: Path) -> None:
    (lion / "qformer_tokenizer" / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="qformer_tokenizer: not a readable tokenizer"):
        LionProcessor.from_pretrained(lion)


def test_an_adapter_is_named(lion: Path) -> None:
    (lion / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "evil/base"}))
    with pytest.raises(CheckpointError, match=r"adapter_config\.json: expected a model, got an adapter"):
        LionForCausalLM.from_pretrained(lion)


def test_names_on_the_hub_are_read_from_its_cache(folders: Path, tmp_path: Path) -> None:
    """A downloaded repository goes through the same checks, and a tagger's name is only looked up when asked."""
    for kind in ("lion", "ram"):
        repository = tmp_path / f"models--org--{kind}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text("0" * 40)
        shutil.copytree(folders / kind, repository / "snapshots" / ("0" * 40))
    cached = {"cache_dir": tmp_path, "local_files_only": True}
    model = LionForCausalLM.from_pretrained("org/lion", **cached)
    assert model.config.name_or_path == "org/lion"
    LionProcessor.from_pretrained("org/lion", **cached)
    RamTagger.from_pretrained("org/ram", download=True, **cached)
    with pytest.raises(NotADirectoryError, match=r"org/ram: no such directory; to download .* pass download=True"):
        RamTagger.from_pretrained("org/ram", **cached)
    change(tmp_path / "models--org--lion" / "snapshots" / ("0" * 40) / "config.json", auto_map={"AutoModel": "a.B"})
    with pytest.raises(CheckpointError, match=r"config\.json: auto_map: expected none"):
        LionForCausalLM.from_pretrained("org/lion", trust_remote_code=True, **cached)
    for name in ("org/absent", "no name!", str(tmp_path / "absent")):
        with pytest.raises(OSError, match=name) as caught:
            LionConfig.from_pretrained(name, **cached)
        assert "\n" not in str(caught.value)


def test_a_configuration_by_its_file(lion: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    shutil.copy(lion / "config.json", other)
    assert LionForCausalLM.from_pretrained(lion, config=other).config.num_query_tokens == 4
    change(other, auto_map={"AutoConfig": "evil.Evil"})
    with pytest.raises(CheckpointError, match=r"other\.json: auto_map: expected none"):
        LionConfig.from_pretrained(other)


def test_parts_are_checked_alone(folders: Path) -> None:
    for name in ("lion", "ram", "llm", "bert"):
        expect_data_only(folders / name)
