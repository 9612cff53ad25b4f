"""transformers' own Trainer with LION: exact accumulation, metrics, and answers generated for evaluation."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import EvalPrediction, Seq2SeqTrainer, Seq2SeqTrainingArguments

from lion_fast import LionForCausalLM
from tests.extras import needs
from tests.lion_fast.tiny import Batch, make_batch, make_model
from tests.rounding import LOSS_TWO_WAYS

needs("accelerate", "train")

MakeTrainer = Callable[..., Seq2SeqTrainer]


@pytest.fixture
def batch() -> Batch:
    """Four samples whose answers have 1, 4, 4 and 2 tokens."""
    batch = make_batch(batch=4, labels=True)
    batch["labels"][0, 1:] = batch["labels"][3, 2:] = -100
    return batch


@pytest.fixture
def make_trainer(tmp_path: Path, batch: Batch) -> MakeTrainer:
    samples: Any = [{name: value[sample] for name, value in batch.items()} for sample in range(4)]

    def make(model: LionForCausalLM, compute_metrics: Any = None, **settings: Any) -> Seq2SeqTrainer:
        arguments = Seq2SeqTrainingArguments(
            str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no", **settings
        )
        return Seq2SeqTrainer(
            model, arguments, train_dataset=samples, eval_dataset=samples, compute_metrics=compute_metrics
        )

    return make


@pytest.mark.parametrize("family", ["t5", "llama", "qwen3"])
def test_accumulated_steps_equal_the_whole_batch(make_trainer: MakeTrainer, batch: Batch, family: str) -> None:
    """One SGD step of Trainer, on four samples or twice two, equals that on the mean loss over all target tokens."""
    expected = make_model(family).train()
    loss = expected(**batch).loss
    loss.backward()
    torch.optim.SGD(expected.parameters(), lr=0.1).step()
    after, before = expected.state_dict(), make_model(family).state_dict()
    assert sum(not torch.equal(value, before[name]) for name, value in after.items()) > 20
    for accumulation in (1, 2):
        model = make_model(family)
        trainer = make_trainer(
            model,
            per_device_train_batch_size=4 // accumulation,
            gradient_accumulation_steps=accumulation,
            max_steps=1,
            learning_rate=0.1,
            optim="sgd",
            lr_scheduler_type="constant",
            max_grad_norm=0,
        )
        assert trainer.train().training_loss == pytest.approx(loss.item(), rel=LOSS_TWO_WAYS)
        for name, value in model.state_dict().items():
            torch.testing.assert_close(value, after[name], msg=f"{name}, {accumulation} batches")


@pytest.mark.parametrize("family", ["t5", "llama"])
def test_answers_are_generated_for_evaluation(make_trainer: MakeTrainer, batch: Batch, family: str) -> None:
    model = make_model(family)
    trainer = make_trainer(
        model, predict_with_generate=True, generation_num_beams=1, generation_max_length=6, per_device_eval_batch_size=2
    )
    result = trainer.predict(trainer.eval_dataset)  # type: ignore[arg-type]
    expected = model.generate(**batch, num_beams=1, max_new_tokens=5 if family == "t5" else 6)
    assert np.array_equal(result.predictions[:, : expected.shape[1]], expected)  # type: ignore[index]
    assert result.metrics is not None
    assert result.metrics["test_loss"] > 0


def test_metrics_are_computed_from_logits(make_trainer: MakeTrainer, batch: Batch) -> None:
    def accuracy(prediction: EvalPrediction) -> dict[str, float]:
        counts = prediction.label_ids != -100
        return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids)[counts].mean())}  # type: ignore[union-attr]

    model = make_model()
    metrics = make_trainer(model, accuracy, per_device_eval_batch_size=2).evaluate()
    hits = model(**batch).logits.argmax(-1) == batch["labels"]
    assert metrics["eval_accuracy"] == pytest.approx(hits[batch["labels"] != -100].float().mean().item())
