"""The reference's last bits and mixed batches against the original's (golden data), and properties of the architecture.

In float64, `tests/golden` holds the reference's activations, gradients, tokens and training to those of the original,
and `tests/lion_fast/test_golden.py` its activations and training to those of the model here.
"""

import copy

import pytest
import torch
from torch import nn

from lion_reference import LION, generate
from tests.golden.computing import until_end
from tests.rounding import expect_within, relative_error

TASKS = ("region_level", "image_level")


@pytest.fixture(scope="module", params=TASKS)
def task(request) -> str:
    return request.param


def test_parameters_have_the_original_names(model, golden_files, meta):
    names = set(model.state_dict())
    vit = set(torch.load(golden_files["vit"], weights_only=True))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name.removeprefix("visual_encoder.") for name in names if name.startswith("visual_encoder.")} == vit
    assert trained == set(meta["trainable"])
    assert all(name.startswith("t5_model.") for name in names - trained if not name.startswith("visual_encoder."))


def test_bit_equality(golden_files, inputs, expected, meta, task, task_ids, rounds_as_golden):
    """On a CPU that rounds like the golden data's, results are bit-equal: operations and order are the original's."""
    if not rounds_as_golden:
        pytest.skip("this CPU or build of torch rounds differently from the golden data's")
    model = LION.from_checkpoint_files(**golden_files)
    states = model.visual_encoder(inputs["pixel_values"])
    assert all(torch.equal(states[layer], expected[f"vit.layer{layer}"]) for layer in (18, 28, 38))
    output = model(**inputs, task_ids=task_ids[task], labels=expected[f"{task}.labels"])
    assert torch.equal(output.visual_prefix, expected["visual_prefix"])
    assert torch.equal(output.encoder_output, expected[f"{task}.enc"])
    assert torch.equal(output.logits, expected[f"{task}.logits"])
    assert torch.equal(output.loss, expected[f"{task}.loss"].squeeze())
    output.loss.backward()
    for name in meta["trainable"]:
        gradient, wanted = model.get_parameter(name).grad, expected[f"{task}.grad.{name}"]
        assert gradient is not None, name
        if ".router_ratio" in name:
            # The sum is by sample here and by batch in the original, whose batches have one task: last bits differ.
            assert relative_error(gradient, wanted) < 1e-6, name
        else:
            assert torch.equal(gradient, wanted), name


def test_a_batch_may_mix_tasks(model, inputs, expected):
    mixed = torch.tensor([0, 1, 1, 0])
    with torch.no_grad():
        logits = model(**inputs, task_ids=mixed, labels=expected["image_level.labels"]).logits
    answers = until_end(generate(model, **inputs, task_ids=mixed, max_new_tokens=20))
    for n, task_id in enumerate(mixed):
        task = TASKS[task_id]
        expect_within("logits of one sample", relative_error(logits[n], expected[f"{task}.logits"][n]))
        assert answers[n] == until_end(expected[f"{task}.generate.beams5.rp1.5"])[n]


def test_min_length_delays_eos(model, inputs, task_ids):
    settings = {"task_ids": task_ids["region_level"], "num_beams": 5, "max_new_tokens": 16}
    assert min(len(answer) for answer in until_end(generate(model, **inputs, **settings))) < 15
    assert min(len(answer) for answer in until_end(generate(model, **inputs, **settings, min_length=15))) >= 15


def test_training_mode_only_adds_dropout(model, inputs, expected, task_ids):
    arguments = {**inputs, "task_ids": task_ids["image_level"], "labels": expected["image_level.labels"]}
    model = copy.deepcopy(model)
    with torch.no_grad():
        without = model(**arguments).loss
        model.train()
        assert len({model(**arguments).loss.item() for _ in range(2)} | {without.item()}) == 3
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        assert model(**arguments).loss == without


def test_invalid_tasks_are_refused(model, inputs, expected):
    labels = expected["image_level.labels"]
    with pytest.raises(ValueError, match=r"task_ids: expected values from 0 to 1, got \[2\]"):
        model(**inputs, task_ids=torch.tensor([0, 1, 2, 0]), labels=labels)
    with pytest.raises(ValueError, match="task_ids: expected one id per sequence"):
        model(**inputs, labels=labels)
