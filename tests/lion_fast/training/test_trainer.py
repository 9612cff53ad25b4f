"""transformers' own Trainer with LION: exact accumulation, its own losses, metrics, and answers for evaluation."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import DataCollatorForSeq2Seq, EvalPrediction, Seq2SeqTrainer, Seq2SeqTrainingArguments
from transformers.trainer_pt_utils import LabelSmoother

from lion_fast.modeling_lion import token_cross_entropy
from tests.extras import needs
from tests.lion_fast.tiny import Batch, make_batch, make_model, scene_processor, without_labels
from tests.rounding import LOSS_TWO_WAYS, TWO_WAYS

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

    def make(model: Any, compute_metrics: Any = None, compute_loss_func: Any = None, **settings: Any) -> Seq2SeqTrainer:
        arguments = Seq2SeqTrainingArguments(
            str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no", **settings
        )
        return Seq2SeqTrainer(
            model,
            arguments,
            train_dataset=samples,
            eval_dataset=samples,
            compute_metrics=compute_metrics,
            compute_loss_func=compute_loss_func,
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


SMOOTHING = 0.1
# An older LabelSmoother averages over each accumulated batch, not over all of them.
EXACT_ACCUMULATION = "num_items_in_batch" in inspect.signature(LabelSmoother.__call__).parameters


def smoothed_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute the mean cross-entropy with targets of 1 - SMOOTHING for the label and the rest spread evenly."""
    losses = []
    for row, label in zip(logits.flatten(0, 1), labels.flatten().tolist(), strict=True):
        if label != -100:
            target = torch.full_like(row, SMOOTHING / len(row))
            target[label] += 1 - SMOOTHING
            losses.append(-(target * row.log_softmax(-1)).sum())
    return torch.stack(losses).mean()


@pytest.mark.parametrize("family", ["t5", "llama", "qwen2"])
def test_label_smoothing(make_trainer: MakeTrainer, batch: Batch, family: str) -> None:
    """Trainer takes the labels out of the batch, and smooths them on the logits of the answers."""
    batch["labels"][2, 1] = -100  # not only padding at the end
    expected = make_model(family).train()
    loss = smoothed_loss(expected(**batch).logits, batch["labels"])
    loss.backward()
    torch.optim.SGD(expected.parameters(), lr=0.1).step()
    after = expected.state_dict()
    for accumulation in (1, 2) if EXACT_ACCUMULATION else (1,):
        model = make_model(family)
        trainer = make_trainer(
            model,
            label_smoothing_factor=SMOOTHING,
            per_device_train_batch_size=4 // accumulation,
            per_device_eval_batch_size=4,
            gradient_accumulation_steps=accumulation,
            max_steps=1,
            learning_rate=0.1,
            optim="sgd",
            lr_scheduler_type="constant",
            max_grad_norm=0,
        )
        assert trainer.evaluate()["eval_loss"] == pytest.approx(loss.item(), rel=LOSS_TWO_WAYS)
        assert trainer.train().training_loss == pytest.approx(loss.item(), rel=LOSS_TWO_WAYS)
        for name, value in model.state_dict().items():
            torch.testing.assert_close(value, after[name], msg=f"{name}, {accumulation} batches")


@pytest.mark.parametrize("family", ["t5", "llama"])
def test_label_smoothing_with_lora(make_trainer: MakeTrainer, batch: Batch, family: str) -> None:
    peft = needs("peft", "test")
    base = make_model(family)
    loss = smoothed_loss(base(**batch).logits, batch["labels"])
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["qkv", "query"]))
    trainer = make_trainer(model, label_smoothing_factor=SMOOTHING, per_device_train_batch_size=4, max_steps=1)
    assert trainer.train().training_loss == pytest.approx(loss.item(), rel=LOSS_TWO_WAYS)


@pytest.mark.parametrize("family", ["t5", "llama"])
def test_a_loss_function_gets_the_logits_of_the_labels(make_trainer: MakeTrainer, batch: Batch, family: str) -> None:
    def loss_of(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        return token_cross_entropy(outputs.logits, labels, num_items_in_batch)

    expected = make_model(family).train()(**batch).loss.item()
    trainer = make_trainer(
        make_model(family),
        compute_loss_func=loss_of,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=1,
    )
    assert trainer.train().training_loss == pytest.approx(expected, rel=LOSS_TWO_WAYS)


def test_metrics_with_label_smoothing(make_trainer: MakeTrainer, batch: Batch) -> None:
    seen: list[EvalPrediction] = []
    model = make_model("llama")
    trainer = make_trainer(
        model, lambda found: seen.append(found) or {}, label_smoothing_factor=SMOOTHING, per_device_eval_batch_size=2
    )
    trainer.evaluate()
    expected = model(**batch).logits
    counts = batch["labels"] != -100
    torch.testing.assert_close(torch.from_numpy(seen[0].predictions)[counts], expected[counts], **TWO_WAYS)  # type: ignore[arg-type]


@pytest.mark.parametrize("family", ["t5", "llama"])
def test_the_collator_for_sequences_makes_the_models_inputs(batch: Batch, family: str) -> None:
    """`DataCollatorForSeq2Seq(model=...)` pads the labels and lets the model shift them."""
    model = make_model(family)
    names = ("input_ids", "qformer_input_ids", "pixel_values", "task_ids")
    rows = [
        {name: batch[name][sample].tolist() for name in names}
        | {"labels": [label for label in batch["labels"][sample].tolist() if label != -100]}
        for sample in range(4)
    ]
    made = DataCollatorForSeq2Seq(scene_processor(40).tokenizer, model=model)(rows)
    assert torch.equal(made["labels"], batch["labels"])
    out = model(**made)
    expected = model(**batch)
    torch.testing.assert_close(out.loss, expected.loss, rtol=LOSS_TWO_WAYS, atol=0)
    unlabelled = model(**without_labels(made)).logits
    counts = batch["labels"] != -100
    torch.testing.assert_close(unlabelled[counts], expected.logits[counts], **TWO_WAYS)


def test_decoder_input_ids_are_checked() -> None:
    model, batch = make_model("llama"), make_batch(labels=True)
    shifted = model.prepare_decoder_input_ids_from_labels(batch["labels"])
    with pytest.raises(ValueError, match=r"decoder_input_ids: expected \[3, 4\], got \[3, 3\]"):
        model(**batch, decoder_input_ids=shifted[:, 1:])
    with pytest.raises(ValueError, match=r"decoder_input_ids: expected ids in 0\.\.63, got \[64\]"):
        model(**without_labels(batch), decoder_input_ids=torch.full_like(shifted, 64))


def test_other_models_are_trained_as_before(tmp_path: Any) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    make_model().train()
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    sizes["num_attention_heads"] = 2
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=32))
    ids = torch.arange(6).repeat(2, 1)
    arguments = TrainingArguments(
        str(tmp_path), label_smoothing_factor=SMOOTHING, use_cpu=True, report_to="none", disable_tqdm=True
    )
    trainer = Trainer(model, arguments)
    loss = trainer.compute_loss(model, {"input_ids": ids, "labels": ids})
    expected = smoothed_loss(model(input_ids=ids).logits[:, :-1], ids[:, 1:])
    torch.testing.assert_close(loss, expected)
