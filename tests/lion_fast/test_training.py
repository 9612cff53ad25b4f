"""Training by recipe: what is read, what comes out, and that nothing that happens to a process changes it."""

import itertools
import json
import multiprocessing
import os
import random
import runpy
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import Dataset
from transformers import BlipImageProcessorPil, TrainerCallback, get_scheduler

from lion_fast import LionConfig, LionForCausalLM, LionProcessor
from lion_fast.cli import main
from lion_fast.quickstart.vocabulary import build_qformer_tokenizer, build_text_tokenizer, scene_texts
from lion_fast.stages import parameter_groups
from lion_fast.training import NonFiniteError, RecipeError, load_recipe, saving, shipped_recipe, train
from lion_fast.training.data import POSITION, SAMPLE_IDS, SceneSamples, TrainingData, TrainingOrder, open_sources
from lion_fast.training.evaluation import evaluate
from lion_fast.training.recipe import Recipe, Sources, check_resumable
from lion_fast.training.run import SCHEDULE, build_model, schedule_rates

PROCESS = Path(__file__).with_name("training_process.py")
MakeRecipe = Callable[..., Recipe]
WIDTH = 16


@pytest.fixture(scope="session")
def tiny_lion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a joint model of a few thousand parameters that reads scenes, with dropout."""
    texts = scene_texts(20)
    image_processor = BlipImageProcessorPil(size={"height": 28, "width": 28})
    processor = LionProcessor(image_processor, build_text_tokenizer(texts), build_qformer_tokenizer(texts))
    part = {"hidden_size": WIDTH, "num_attention_heads": 2, "intermediate_size": 24}
    config = LionConfig(
        vision_config={**part, "num_hidden_layers": 3, "image_size": 28, "patch_size": 14},
        qformer_config={**part, "num_hidden_layers": 2, "vocab_size": len(processor.qformer_tokenizer)},
        aggregator_config={**part, "feature_layers": [2, 1, 0], "projection_size": 24},
        text_config={
            "model_type": "t5",
            "d_model": WIDTH,
            "d_kv": 8,
            "d_ff": 24,
            "num_layers": 1,
            "num_heads": 2,
            "vocab_size": len(processor.tokenizer),
            "feed_forward_proj": "gated-gelu",
            "dense_act_fn": "gelu",
            "tie_word_embeddings": False,
            "decoder_start_token_id": 0,
            "initializer_factor": 0.3,
        },
        num_query_tokens=4,
        adapter_rank=4,
        soft_prompt_token_id=processor.soft_prompt_token_id,
    )
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("tiny") / "lion"
    LionForCausalLM(config).save_pretrained(directory)
    processor.save_pretrained(directory)
    return directory


@pytest.fixture
def make_recipe(tiny_lion: Path, tmp_path: Path) -> MakeRecipe:
    """A stage's recipe with the tiny model, scenes, and few small steps."""

    def make(stage: int = 3, *overrides: str, name: str = "run") -> Recipe:
        trained = {1: ["image_level"], 2: ["region_level"]}.get(stage, ["image_level", "region_level"])
        settings = [
            f"output_dir={tmp_path / name}",
            f"model.carry_over=['{tiny_lion}']",
            *(f"data.train.{task}=['scenes:0:7']" for task in trained),
            "data.mix=sample",
            "data.workers=0",
            "optimizer.lr=1e-3",
            "optimizer.warmup_steps=2",
            "batch.size=4",
            "batch.per_process=2",
            "steps=6",
            "precision=fp32",
            "log_every=1",
            "checkpoints.every=2",
            "evaluation.max_new_tokens=4",
        ]
        return load_recipe(stage, overrides=[*settings, *overrides])

    return make


def losses_of(run_dir: Path | str, name: str = "loss") -> list[float]:
    history = json.loads((saving.checkpoints(Path(run_dir))[0] / "trainer_state.json").read_text())["log_history"]
    return [entry[name] for entry in history if name in entry]


def weights_of(run_dir: Path | str) -> dict[str, Tensor]:
    return load_file(Path(run_dir) / "model" / "model.safetensors")


# Recipes


@pytest.mark.parametrize("stage", [1, 2, 3, 4])
def test_shipped_recipes_are_whole(stage: int) -> None:
    recipe = load_recipe(stage)
    assert recipe.stage == stage
    assert recipe.optimizer.lr == (1e-5 if stage == 4 else 1e-4)
    numbers = [line for line in shipped_recipe(stage).splitlines() if line.startswith("optimizer:")]
    assert numbers
    sourced = shipped_recipe(stage).split("optimizer:\n")[1].split("\n\n")[0].splitlines()
    assert all("# [" in line for line in sourced), "every number of the optimizer names its source"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.learning_rate=1", "optimizer.learning_rate: unknown key; expected one of lr, min_lr, warmup_lr"),
        ("stepz=1", "stepz: unknown key; expected one of stage, output_dir"),
        ("steps=many", "steps: expected a valid integer, got 'many'"),
        ("steps=true", "steps: expected a valid integer, got True"),
        ("optimizer.lr='1e-4'", "optimizer.lr: expected a valid number, got '1e-4'"),
        ("optimizer.lr=-1", "optimizer.lr: expected greater than 0, got -1"),
        ("precision=fp16", "precision: expected 'bf16' or 'fp32', got 'fp16'"),
        ("optimizer=3", "optimizer: expected a valid dictionary or instance of Optimizer, got 3"),
        ("data.image_to_region=[0,1]", "image_to_region: expected two whole numbers of 1 or more"),
        ("data.train.image_level=x", "data.train.image_level: expected a valid list, got 'x'"),
        ("stage=2", "stage: expected 1 (the stage that was asked for), got 2"),
        ("steps", "override: expected section.key=value, got 'steps'"),
    ],
)
def test_errors_name_the_key(override: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(1, overrides=[override])
    assert message in str(caught.value)


def test_a_file_lies_over_the_stage_s_recipe(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("optimizer:\n  lr: 3e-5\nsteps: 7\n")
    recipe = load_recipe(1, file, ["steps=8"])
    assert (recipe.optimizer.lr, recipe.optimizer.min_lr, recipe.steps) == (3e-5, 1e-5, 8)
    file.write_text("steps: [\n")
    with pytest.raises(RecipeError, match=r"mine.yaml: not readable as YAML"):
        load_recipe(1, file)


def test_data_and_model_are_asked_for_first(make_recipe: MakeRecipe) -> None:
    with pytest.raises(RecipeError, match=r"data.train.region_level: expected one file or more, got \[\]"):
        make_recipe(3, "data.train.region_level=[]").check_sources()
    with pytest.raises(RecipeError, match=r"data.train.region_level: expected none in stage 1, got \['x.jsonl'\]"):
        make_recipe(1, "data.train.region_level=['x.jsonl']").check_sources()
    with pytest.raises(RecipeError, match=r"model: expected a directory in model.frozen_from or model.carry_over"):
        make_recipe(1, "model.carry_over=[]").check_sources()
    with pytest.raises(RecipeError, match=r"batch.size: expected a multiple of 6 .* got 4"):
        make_recipe(1, "batch.per_process=3").batch.accumulation(2)
    with pytest.raises(RecipeError, match="scenes:SEED:COUNT"):
        open_sources(Sources(image_level=["scenes:x"], region_level=[]), None)


def test_a_run_goes_on_only_as_it_began(make_recipe: MakeRecipe) -> None:
    began = make_recipe().model_dump(mode="json")
    check_resumable(began, make_recipe(3, "batch.per_process=4", "checkpoints.keep=1").model_dump(mode="json"))
    with pytest.raises(RecipeError, match=r"optimizer.lr: expected 0.001, with which the run began, got 0.002"):
        check_resumable(began, make_recipe(3, "optimizer.lr=2e-3").model_dump(mode="json"))


# Schedule, order, randomness


def test_the_schedule_warms_up_and_ends_at_the_minimum(make_recipe: MakeRecipe) -> None:
    """Stage 3's own numbers: 1e-6 -> 1e-4 in 2000 steps, 1e-5 at the end, the aggregator's scaled throughout."""
    recipe = make_recipe(3, "optimizer.lr=1e-4", "optimizer.warmup_steps=2000", "optimizer.boost_lr_scale=0.2")
    model, _ = build_model(recipe)
    settings = recipe.optimizer
    groups = parameter_groups(model, lr=settings.lr, boost_lr_scale=settings.boost_lr_scale)
    optimizer = torch.optim.AdamW(groups)
    schedule = get_scheduler(SCHEDULE, optimizer, 2000, 10_000, scheduler_specific_kwargs=schedule_rates(recipe))
    rates = []
    for _ in range(10_000):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    base, aggregator = [step[0] for step in rates], [step[-1] for step in rates]
    assert [base[0], base[1999], base[-1]] == pytest.approx([1e-6, 1e-4, 1e-5])
    assert base[1000] == pytest.approx(1e-6 + (1e-4 - 1e-6) * 1000 / 1999)
    assert all(later > earlier for earlier, later in itertools.pairwise(base[:2000]))
    assert all(later <= earlier for earlier, later in itertools.pairwise(base[1999:]))
    assert aggregator == pytest.approx([0.2 * rate for rate in base])


def test_every_pass_is_a_permutation_and_tasks_take_turns() -> None:
    order = TrainingOrder(
        {"image_level": 5, "region_level": 3}, [2, 1], steps=30, batch_size=3, mix="sample", shuffle=True, seed=1
    )
    keys = list(order)
    assert [position for position, _, _ in keys] == list(range(90))
    for task, size in order.sizes.items():
        indices = [index for _, at, index in keys if at == task]
        passes = [indices[start : start + size] for start in range(0, len(indices) - size + 1, size)]
        assert len(indices) == (60 if task == "image_level" else 30)
        assert all(sorted(each) == list(range(size)) for each in passes)
        assert len({tuple(each) for each in passes}) > 1
    assert all([at for _, at, _ in keys[start : start + 3]].count("image_level") == 2 for start in range(0, 90, 3))
    assert [order[position] for position in (77, 3, 50)] == [keys[77], keys[3], keys[50]]
    by_step = TrainingOrder(order.sizes, [1, 1], steps=4, batch_size=3, mix="step", shuffle=False, seed=0)
    assert [task for _, task, _ in by_step] == 2 * (3 * ["image_level"] + 3 * ["region_level"])
    assert [index for _, task, index in by_step if task == "image_level"] == [0, 1, 2, 3, 4, 0]


def test_a_sample_s_random_numbers_follow_from_its_position() -> None:
    class Draws(Dataset):
        def __len__(self) -> int:
            return 2

        def __getitem__(self, index: int) -> dict[str, Any]:
            return {"drawn": (random.random(), torch.rand(1).item())}

    def drawn(position: int, index: int = 0, seed: int = 0) -> Any:
        return TrainingData({"a": Draws()}, seed)[position, "a", index]["drawn"]

    assert drawn(3) == drawn(3)
    assert len({drawn(3), drawn(4), drawn(3, seed=1)}) == 3


# Runs


def test_the_command_trains_the_stages_and_carries_over(
    make_recipe: MakeRecipe, tiny_lion: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stages 1 and 2 from frozen parts, in bf16 and with checkpointing, then stage 3 from both, then stage 4."""
    config = tmp_path / "config.yaml"
    config.write_text(
        "data: {workers: 0}\nbatch: {size: 4, per_process: 2}\nsteps: 2\ngradient_checkpointing: true\n"
        "optimizer: {lr: 1e-2, min_lr: 1e-2, warmup_steps: 0}\nlog_every: 1\n"
        "evaluation: {every: 2, samples: 3, pictures: 2, max_new_tokens: 3}\n"
    )
    image, region = (f"data.train.{task}=[scenes:0:4]" for task in ("image_level", "region_level"))
    model = {number: tmp_path / f"stage{number}" / "model" for number in (1, 2, 3, 4)}
    starts = {
        1: [f"model.frozen_from={tiny_lion}", image, "data.evaluate.image_level=[scenes:1:3]"],
        2: [f"model.frozen_from={tiny_lion}", region],
        3: [f"model.carry_over=[{model[1]}, {model[2]}]", image, region],
        4: [f"model.carry_over=[{model[3]}]", image, region, "optimizer.min_lr=0.0"],
    }
    for number, start in starts.items():
        argv = ["train", "--stage", str(number), "--config", str(config), f"output_dir={tmp_path / f'stage{number}'}"]
        assert main([*argv, *start]) == 0, capsys.readouterr().err
    states = {number: load_file(path / "model.safetensors") for number, path in model.items()}
    base = load_file(tiny_lion / "model.safetensors")
    joint = LionForCausalLM.from_pretrained(model[4])
    name = "language_model.encoder.block.0.layer.1.adapter.adapters.{}.down_proj.weight"
    for number, single in ((1, 1), (2, 0)):
        # A step of AdamW moves a weight by about its rate, 1e-2, and stage 3 takes two from where stage 1 or 2 ended.
        assert (states[3][name.format(single)] - states[number][name.format(0)]).abs().max() < 0.025
        assert (states[3][name.format(1 - single)] - states[number][name.format(0)]).abs().max() > 0.1
        assert not torch.equal(states[3][name.format(single)], states[number][name.format(0)])
    for frozen in ("vision_model.pos_embed", "language_model.encoder.block.0.layer.0.SelfAttention.q.weight"):
        assert torch.equal(states[4][frozen].float(), base[frozen].to(torch.bfloat16).float()), frozen
    assert not torch.equal(states[1]["query_tokens"], base["query_tokens"])
    assert joint.config.visual_input == "ALL"
    pictures = Image.open(tmp_path / "stage1" / "pictures" / "step-2.png")
    assert pictures.size[0] > 640
    assert list((tmp_path / "stage1" / "tensorboard").iterdir())
    assert main([*argv, *start]) == 2
    assert "output_dir: expected a folder without checkpoints" in capsys.readouterr().err


def test_the_command_says_what_is_wrong(tiny_lion: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["train", "--stage", "1", f"output_dir={tmp_path}"]
    assert main([*argv, "--print-recipe"]) == 0
    assert capsys.readouterr().out == shipped_recipe(1)
    for more, message in (
        ([], "model: expected a directory in model.frozen_from or model.carry_over, got neither"),
        (["model.carry_over=[absent]", "data.train.image_level=[scenes:0:1]"], "absent: no such directory"),
        (["--config", "absent.yaml"], "absent.yaml"),
    ):
        assert main([*argv, *more]) == 2
        err = capsys.readouterr().err
        assert message in err
        assert len(err.strip().splitlines()) == 1


class GoldenSamples(Dataset):
    """The golden batch's samples, by task and number."""

    def __init__(self, task: str):
        self.task = task

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"task": self.task, "index": index}


def test_the_golden_curve_comes_out(
    golden: Any, golden_batch: Callable[[str], dict[str, Tensor]], converted: Path, make_recipe: MakeRecipe
) -> None:
    """Within what chaos leaves of fp32's rounding (`test_golden.test_twelve_training_steps`)."""

    def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
        assert [sample["index"] for sample in samples] == [0, 1, 2, 3]
        ids = [sample["id"] for sample in samples]
        return {**golden_batch(samples[0]["task"]), SAMPLE_IDS: ids, POSITION: samples[0][POSITION]}

    expected, settings = golden.meta["adamw"]["losses"], golden.meta["adamw"]
    recipe = make_recipe(
        3,
        *(f"model.carry_over=['{converted}']", "model.dropout=0.0", "data.shuffle=false", "data.mix=step"),
        *(f"optimizer.{name}={settings['lr']}" for name in ("lr", "min_lr", "warmup_lr")),
        *("optimizer.warmup_steps=0", "optimizer.clip=0.0", f"optimizer.weight_decay={settings['weight_decay']}"),
        *("batch.per_process=4", f"steps={len(expected)}", "checkpoints.every=100"),
    )
    samples = {task: GoldenSamples(task) for task in ("image_level", "region_level")}
    train(recipe, train_samples=samples, data_collator=collate)
    losses = losses_of(recipe.output_dir)
    assert losses[:2] == pytest.approx(expected[:2], rel=3e-5)
    assert losses == pytest.approx(expected, rel=2e-2)


def test_accumulated_and_checkpointed_steps_are_the_big_batch_s(make_recipe: MakeRecipe) -> None:
    """AdamW turns a gradient's rounding, 1e-7 of it, into as much of a step; six steps add up to 1e-5 at the most."""
    curves = {}
    for name, settings in {
        "whole": ("batch.per_process=4",),
        "halves": ("batch.per_process=2",),
        "ones, checkpointed": ("batch.per_process=1", "gradient_checkpointing=true"),
    }.items():
        recipe = make_recipe(3, "model.dropout=0.0", *settings, name=name)
        train(recipe)
        curves[name] = losses_of(recipe.output_dir)
    assert curves["whole"][0] != curves["whole"][-1]
    for curve in curves.values():
        assert curve == pytest.approx(curves["whole"], rel=1e-5)


@pytest.mark.parametrize("action", ["stop", "skip"])
def test_a_loss_that_is_not_finite_is_reported(make_recipe: MakeRecipe, action: str) -> None:
    from lion_fast.training.data import LionCollator

    recipe = make_recipe(1, f"on_nonfinite={action}", "data.shuffle=false", "batch.size=2", "steps=4")
    _, processor = build_model(recipe)
    plain = LionCollator(processor)

    def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = plain(samples)
        for place, sample_id in enumerate(batch[SAMPLE_IDS]):
            if sample_id.endswith(":2"):
                batch["pixel_values"][place] = float("nan")
        return batch

    seen: list[dict[str, Tensor]] = []

    class Look(TrainerCallback):
        def on_step_end(self, *_: Any, model: Any = None, **__: Any) -> None:
            seen.append({name: value.detach().clone() for name, value in model.named_parameters()})

    report = Path(recipe.output_dir) / "nonfinite" / "step-2.json"
    if action == "stop":
        with pytest.raises(NonFiniteError, match=r"step 2: loss not finite, samples scenes:0:7:2, scenes:0:7:3"):
            train(recipe, data_collator=collate, callbacks=[Look()])
        assert len(seen) == 1
    else:
        train(recipe, data_collator=collate, callbacks=[Look()])
        assert all(torch.equal(seen[0][name], value) for name, value in seen[1].items())
        assert any(not torch.equal(seen[1][name], value) for name, value in seen[2].items())
        assert all(torch.isfinite(value).all() for value in weights_of(recipe.output_dir).values())
    assert json.loads(report.read_text())["batches"][0] == {"samples": ["scenes:0:7:2", "scenes:0:7:3"], "loss": "nan"}


def test_evaluation_weighs_by_tokens_and_draws(tiny_lion: Path) -> None:
    model = LionForCausalLM.from_pretrained(tiny_lion).eval()
    processor = LionProcessor.from_pretrained(tiny_lion)
    samples = torch.utils.data.ConcatDataset([SceneSamples("image_level", 0, 3), SceneSamples("region_level", 0, 4)])
    results = [
        evaluate(
            model,
            processor,
            samples,
            indices=range(7),
            batch_size=batch_size,
            device=torch.device("cpu"),
            pictures=7,
            autocast=torch.no_grad,
            num_beams=1,
            max_new_tokens=3,
        )
        for batch_size in (1, 3, 7)
    ]
    for metrics, shown in results:
        assert len(shown) == 7
        # fp32 sums in other orders
        assert metrics["loss"] == pytest.approx(results[0][0]["loss"], rel=1e-5)
        assert set(metrics) == {"loss", "exact_match", "grounding_accuracy"}


# Checkpoints


def test_a_damaged_checkpoint_is_passed_over(make_recipe: MakeRecipe, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = make_recipe(3, "checkpoints.keep=3")
    train(recipe)
    run_dir = Path(recipe.output_dir)
    expected, curve = weights_of(run_dir), losses_of(run_dir)
    newest, middle, oldest = saving.checkpoints(run_dir)
    content = bytearray((newest / "optimizer.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (newest / "optimizer.pt").write_bytes(content)
    assert saving.damage(newest) == "optimizer.pt does not hold what was written"
    (middle / "trainer_state.json").unlink()
    assert saving.damage(middle) == "trainer_state.json is missing"
    assert saving.last_complete(run_dir) == oldest
    train(recipe, resume=True)
    assert f"resuming from {oldest}" in capsys.readouterr().out
    assert all(torch.equal(value, expected[name]) for name, value in weights_of(run_dir).items())
    assert losses_of(run_dir) == curve
    (run_dir / "checkpoint-6" / saving.SEAL).write_text("{")
    assert "cannot be read" in str(saving.damage(run_dir / "checkpoint-6"))


# Processes


@pytest.fixture(scope="session")
def start() -> Iterator[Callable[..., Any]]:
    """Start a `training_process`; forked from a server that has imported everything, it is there at once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lion_fast.training.run", "lion_fast.training.fsdp2", "torch.utils.tensorboard"])

    def begin(recipe: Recipe, **arguments: Any) -> Any:
        given = {"recipe": recipe.model_dump(mode="json"), **arguments}
        process = context.Process(
            target=runpy.run_path,
            args=(str(PROCESS),),
            kwargs={"init_globals": {"ARGUMENTS": given}, "run_name": "__main__"},
        )
        process.start()
        return process

    with pytest.MonkeyPatch.context() as patch:  # for the server, which starts with the first process
        patch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
        yield begin


def finish(*processes: Any) -> None:
    for process in processes:
        process.join(timeout=120)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert codes == [0] * len(processes)


def test_kills_change_nothing(make_recipe: MakeRecipe, start: Callable[..., Any], tmp_path: Path) -> None:
    """Twenty kills by SIGKILL: half as an operation on a file begins, half at any moment.

    The run that nothing happens to also loads its samples in two workers.
    """
    rng = random.Random(0)
    whole = make_recipe(3, "steps=40", "data.workers=2", name="whole")
    finish(start(whole, count_to=str(tmp_path / "count")))
    operations = int((tmp_path / "count").read_text())
    assert operations > 20 * 10, "twenty checkpoints of ten files or more"
    killed = make_recipe(3, "steps=40", name="killed")
    began_at = set()
    for number in range(20):
        process = start(killed, resume=True, kill_at=rng.randint(1, operations // 8) if number % 2 else None)
        process.join(timeout=120 if number % 2 else rng.uniform(0.1, 0.8))
        process.kill()
        process.join()
        assert process.exitcode == -9
        began_at.add(saving.last_complete(Path(killed.output_dir)))
    assert len(began_at) > 3, "kills came before any progress"
    finish(start(killed, resume=True))
    expected = weights_of(whole.output_dir)
    assert all(torch.equal(value, expected[name]) for name, value in weights_of(killed.output_dir).items())
    assert losses_of(killed.output_dir) == losses_of(whole.output_dir)
    assert not (Path(killed.output_dir) / saving.ASIDE / "checkpoint-40").exists()


def test_a_full_disk_leaves_the_last_checkpoint(
    make_recipe: MakeRecipe, start: Callable[..., Any], tmp_path: Path
) -> None:
    recipe = make_recipe(3, "steps=4")
    train(recipe.model_copy(update={"output_dir": str(tmp_path / "whole")}))
    size = (tmp_path / "whole" / "model" / "model.safetensors").stat().st_size
    process = start(recipe, file_limit=size // 2, error_to=str(tmp_path / "error"))
    process.join(timeout=120)
    assert process.exitcode == 1
    assert "checkpoint-2: cannot be written" in (tmp_path / "error").read_text()
    assert saving.checkpoints(Path(recipe.output_dir)) == []
    finish(start(recipe, resume=True))
    expected = weights_of(tmp_path / "whole")
    assert all(torch.equal(value, expected[name]) for name, value in weights_of(recipe.output_dir).items())


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def run_on(processes: int, start: Callable[..., Any], recipe: Recipe, **arguments: Any) -> None:
    port = free_port()
    group = [start(recipe, rank=rank, world=processes, port=port, **arguments) for rank in range(processes)]
    finish(*group)


def test_two_processes_are_one(make_recipe: MakeRecipe, start: Callable[..., Any]) -> None:
    """DDP and FSDP2 on two gloo processes give one process's curve; sharded checkpoints go from 2 to 1 and back to 2.

    Dropout is on: its seeds follow the samples. 1e-5 as for accumulation: the sums over processes are in another order.
    """
    # Five samples in batches of two: one process runs out of them before the other.
    evaluation = ("data.evaluate.image_level=['scenes:1:5']", "evaluation.every=6")
    one = make_recipe(3, *evaluation, name="one")
    train(one)
    expected = losses_of(one.output_dir)
    two = make_recipe(3, *evaluation, name="two")
    run_on(2, start, two)
    assert losses_of(two.output_dir) == pytest.approx(expected, rel=1e-5)
    assert losses_of(two.output_dir, "eval_loss") == pytest.approx(losses_of(one.output_dir, "eval_loss"), rel=1e-5)
    assert len(losses_of(one.output_dir, "eval_loss")) == 1
    sharded = make_recipe(3, "checkpoints.keep=1", name="sharded")
    for world, until in ((2, 2), (1, 4), (2, 6)):
        run_on(world, start, sharded, engine="fsdp2", resume=True, stop_after=until)
    progress = saving.checkpoints(Path(sharded.output_dir))[0] / "progress.json"
    assert json.loads(progress.read_text())["losses"] == pytest.approx(expected, rel=1e-5)
    weights = weights_of(sharded.output_dir)
    # A step of AdamW is at most 1e-3 whatever the gradient; where that is all rounding, it is off by 1e-2 of a step.
    for name, value in weights_of(one.output_dir).items():
        torch.testing.assert_close(weights[name], value, rtol=1e-4, atol=1e-5, msg=name)
