"""The quickstart: every step runs, frozen parts stay unchanged, and the written checkpoint gives the same answers."""

import json
import os
import signal
import stat
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lion_fast import LionForCausalLM, LionProcessor
from lion_fast.io.boxes import parse_boxes
from lion_fast.io.owning import OutputInUseError
from lion_fast.quickstart import Metrics, evaluate, render, run
from lion_fast.quickstart.data import compute_features, training_batches
from lion_fast.quickstart.evaluation import answer
from lion_fast.quickstart.loop import train
from lion_fast.quickstart.models import IMAGE_SIZE, build_config, build_processor
from lion_fast.quickstart.muon import orthogonalise
from lion_fast.quickstart.parallel import side_by_side
from lion_fast.quickstart.report import format_table
from lion_fast.quickstart.standins import Facts
from lion_fast.scenes import SceneGenerator
from lion_fast.training.evaluation import is_right
from lion_fast.training.run_folder import owned_directory
from lion_fast.training.stages import STAGES, freeze_for_stage, parameter_groups
from tests.rounding import relative_error

SEED = 5  # seed of conftest's quickstart_dir


@pytest.fixture(scope="module")
def processor() -> LionProcessor:
    return build_processor()


def test_all_files_are_written(quickstart_dir: Path) -> None:
    report = json.loads((quickstart_dir / "metrics.json").read_text())
    rows = ["before stage 1", "after stage 1", "after stage 2", "before stage 3", "after stage 3"]
    assert list(report["metrics"]) == rows
    assert all(0 <= share <= 1 for row in report["metrics"].values() for share in row.values())
    assert report["seconds"]["total"] == max(report["seconds"].values())
    assert all(row in (quickstart_dir / "table.txt").read_text() for row in rows)
    umask = os.umask(0o022)
    os.umask(umask)
    for path in quickstart_dir.rglob("*"):
        assert path.is_dir() or stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask, path
    for name in ("predictions.png", "losses.png"):
        with Image.open(quickstart_dir / name) as image:
            assert min(image.size) > 200


def test_the_checkpoint_answers_from_images_and_cached_features_and_is_measured(
    quickstart_dir: Path,
) -> None:
    model = LionForCausalLM.from_pretrained(quickstart_dir / "checkpoint").eval()
    processor = LionProcessor.from_pretrained(quickstart_dir / "checkpoint")
    scenes = render(SceneGenerator(2 * SEED + 1, IMAGE_SIZE), 4, processor, "scenes")
    samples = [scenes.samples(i, "rec" if i % 2 else "caption")[0] for i in range(4)]
    batch = processor(
        images=[scene.image for scene in scenes.scenes],
        text=[sample.text for sample in samples],
        task=[sample.task for sample in samples],
        return_tensors="pt",
    )
    from_images = processor.batch_decode(model.generate(**batch), skip_special_tokens=True)
    assert answer(model, processor, scenes, range(4), samples)[0] == from_images
    with torch.no_grad():
        whole = model(**batch, labels=torch.ones(4, 1, dtype=torch.long)).logits
        compute_features(model, scenes)
        assert scenes.features is not None
        batch.pop("pixel_values")
        cached = model(
            **batch, vision_features=scenes.features.float(), labels=torch.ones(4, 1, dtype=torch.long)
        ).logits
    # Features are cached in float16: a relative error of 2^-11 each, through a few layers.
    assert relative_error(cached, whole) < 20 * 2**-11
    metrics = evaluate(model, processor, render(SceneGenerator(1, IMAGE_SIZE), 3, processor, "scenes"))
    assert set(metrics.as_dict()) == {"caption_exact_match", "question_accuracy", "grounding_accuracy"}


def test_training_does_not_change_the_stand_ins(processor: LionProcessor) -> None:
    torch.manual_seed(0)
    scenes = render(SceneGenerator(0, IMAGE_SIZE), 6, processor, "scenes")
    for stage in STAGES[:3]:
        model = LionForCausalLM(build_config(processor, stage.visual_input))
        compute_features(model, scenes)
        freeze_for_stage(model, stage)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        batches = training_batches(processor, scenes, ("caption", "rec"), 4, np.random.default_rng(0), tag_rate=1.0)
        optimizer = torch.optim.AdamW(parameter_groups(model, lr=1e-3))
        train("test", ("caption", "rec"), (model(**batch).loss for batch in batches), [optimizer], 2)
        moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
        assert moved
        assert all(stage.trains(name) for name in moved)
        assert "soft_prompt" in moved


def test_pixel_values_equal_those_of_the_processor(processor: LionProcessor) -> None:
    scenes = render(SceneGenerator(4, IMAGE_SIZE), 3, processor, "scenes")
    expected = processor.image_processor([scene.image for scene in scenes.scenes], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(scenes.pixel_values([2, 0]), expected[[2, 0]], rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="generator: expected images of 100 pixels"):
        render(SceneGenerator(4, 64), 1, processor, "scenes")


def test_facts_contain_the_words_of_every_object(processor: LionProcessor) -> None:
    scenes = [next(s for s in SceneGenerator(seed, 32) if len(s.objects) == 2) for seed in range(3)]
    tokenizer = processor.tokenizer
    embedding = torch.nn.Embedding(len(tokenizer), 128)
    torch.nn.init.zeros_(embedding.weight)
    facts = Facts(scenes, embedding, tokenizer)
    for scene, words, is_word in zip(scenes, facts.words, facts.is_word, strict=True):
        told = [
            set(tokenizer.convert_ids_to_tokens(row[mask].tolist()))
            for row, mask in zip(words, is_word[..., 0], strict=True)
        ]
        first, second = scene.objects
        assert told[0] == {f"▁{scene.background}"}
        for o, position, row in ((first, "leftmost", told[1]), (second, "rightmost", told[2])):
            assert row == {f"▁{word}" for word in (o.kind, o.color, o.size, o.text, position) if word}
    # With zero embeddings, only the waves of the boxes remain: zero for the background, and those of the objects.
    told = facts.tell(np.array([0, 1, 2]), 8, np.random.default_rng(0))
    assert told.shape == (3, 8, 128)
    exact = facts.waves @ facts.directions
    exact = exact / exact[:, 1:].square().mean(-1).sqrt().mean()
    for b in range(3):
        similarity = torch.nn.functional.cosine_similarity(told[b, :, None], exact[b, None, 1:], dim=-1)
        assert (similarity.amax(0) > 0.7).all()  # each object occurs at least once, with noise


def test_side_by_side_runs_both_functions_and_reports_failures() -> None:
    threads = torch.get_num_threads()
    ours, theirs = side_by_side(lambda: torch.ones(2), lambda: {"process": os.getpid(), "tensor": torch.zeros(3)})
    assert torch.equal(ours, torch.ones(2))
    assert torch.equal(theirs["tensor"], torch.zeros(3))
    assert (theirs["process"] != os.getpid()) == (os.cpu_count() != 1)
    with pytest.raises(RuntimeError, match=r"second process failed(?s:.)*ZeroDivisionError"):
        side_by_side(lambda: None, lambda: 1 / 0)
    if os.cpu_count() != 1:
        with pytest.raises(RuntimeError, match="it was killed"):
            side_by_side(lambda: None, lambda: os.kill(os.getpid(), signal.SIGKILL))
        # An interrupt of both processes leaves the second to the first.
        handler = side_by_side(lambda: None, lambda: signal.getsignal(signal.SIGINT))[1]
        assert handler == signal.SIG_IGN
    with pytest.raises(KeyError):
        side_by_side(lambda: {}["ours"], lambda: time.sleep(60))
    assert torch.get_num_threads() == threads


@given(word=st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1))
def test_the_tokenizer_restores_any_text(processor: LionProcessor, word: str) -> None:
    tokenizer = processor.tokenizer
    if "<" in word:
        return  # the word may be a special token, which decoding skips
    text = f"a {word} on a plain background"
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


def test_tokenizers_know_words_coordinates_and_the_soft_prompt(processor: LionProcessor) -> None:
    tokenizer = processor.tokenizer
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)
    scene = next(s for s in SceneGenerator(9, 32) if any(o.text for o in s.objects))
    pieces = scene.caption.replace(",", " ,").split()
    assert len(tokenizer(scene.caption, add_special_tokens=False).input_ids) == len(pieces)
    box = "[0.440,0.060,0.650,1.000]"
    tokens = tokenizer.convert_ids_to_tokens(tokenizer(box, add_special_tokens=False).input_ids)
    assert tokens == ["▁[0.440", ",0.060", ",0.650", ",1.000", "]"]
    spelt = tokenizer.convert_ids_to_tokens(tokenizer("[0.441", add_special_tokens=False).input_ids)
    assert spelt == ["▁", *"[0.441"]
    assert processor.soft_prompt_token_id is not None
    question = processor.qformer_tokenizer(scene.samples()[-1].text)
    assert processor.qformer_tokenizer.unk_token_id not in question.input_ids


def test_orthogonalise_keeps_singular_vectors_and_equalises_values() -> None:
    generator = torch.Generator().manual_seed(0)
    for shape in ((3, 24, 8), (3, 8, 24), (1, 16, 16)):
        u, s, vh = torch.linalg.svd(torch.randn(shape, generator=generator), full_matrices=False)
        s = s.clamp(min=0.1 * s.max())  # values below a tenth of the largest need more iterations
        out = orthogonalise(u * s.unsqueeze(-2) @ vh)
        inner = u.mT @ out @ vh.mT
        values = inner.diagonal(dim1=-2, dim2=-1)
        torch.testing.assert_close(inner, torch.diag_embed(values), rtol=0, atol=1e-4)
        assert values.min() > 0.5
        assert values.max() < 1.5


def test_a_box_is_correct_from_an_iou_of_one_half() -> None:
    true = "[0.200,0.200,0.600,0.600]"
    assert is_right("Answer: [0.200,0.200,0.600,0.600]", true)
    assert is_right("[0.200,0.200,0.600,0.410]", true)
    assert not is_right("[0.200,0.200,0.600,0.390]", true)
    assert not is_right("a red circle", true)
    assert is_right("a red circle", "a red circle ")
    assert not is_right("a circle", "a red circle")


def test_the_text_of_a_box_is_exact() -> None:
    """At this image size, the three decimals of a box's text lose nothing."""
    scenes = SceneGenerator(3, IMAGE_SIZE)
    samples = [sample for index in range(20) for sample in scenes[index].samples() if sample.kind == "rec"]
    assert samples
    for sample in samples:
        assert sample.box is not None
        assert parse_boxes(sample.answer) == [list(sample.box)]


def test_the_table_shows_percentages() -> None:
    table = format_table({"before": Metrics(0.0, 0.125, 1.0)})
    assert table.splitlines()[-1].split() == ["before", "0.0%", "12.5%", "100.0%"]


def test_scale_must_be_positive(tmp_path: Path) -> None:
    for scale in (0, -1, float("nan"), float("inf"), 10**400, "2"):
        with pytest.raises(ValueError, match="scale: expected a positive factor up to 1000, got"):
            run(tmp_path, scale=scale)  # type: ignore[arg-type]
    for seed in (-1, 2**32, 10**5000, 1.5, None):
        with pytest.raises(ValueError, match="seed: expected a whole number from 0 to"):
            run(tmp_path, seed=seed)  # type: ignore[arg-type]


def test_files_that_no_quickstart_wrote_are_left_alone(tmp_path: Path) -> None:
    for name, content in (("table.txt", "mine"), ("metrics.json", '{"accuracy": 1}'), ("metrics.json", "[" * 10**5)):
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=f"output_dir: expected the directory of an earlier .* without {name}"):
            run(tmp_path, smoke=True, show=False)
        assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {name: content}
        (tmp_path / name).unlink()
    with owned_directory(tmp_path), pytest.raises(OutputInUseError, match="output_dir: expected a directory that no"):
        run(tmp_path, smoke=True, show=False)
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="output_dir: expected a directory, got a file"):
        run(tmp_path / "file", smoke=True, show=False)
