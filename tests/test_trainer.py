"""The Trainer's callback: rows counted are rows fed, in a loop that is not ours."""

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from emocore import Moments, Rows, Tokens
from emocore.errors import CaptureError, LabelError
from emocore.integrations.trainer import CaptureCallback

LENGTHS = [3, 6, 1, 4, 5, 2, 6, 3]


class Texts(torch.utils.data.Dataset):
    """Texts of ids 3.., padded to 6 on the right."""

    def __len__(self) -> int:
        return len(LENGTHS)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        mask = (torch.arange(6) < LENGTHS[i]).long()
        ids = (torch.arange(6) + 3 + i) * mask
        return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def trainer(model, folder, callbacks, **options) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        per_device_eval_batch_size=4,
        num_train_epochs=2,
        gradient_accumulation_steps=2,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        **options,
    )
    return Trainer(model, arguments, train_dataset=Texts(), eval_dataset=Texts(), callbacks=callbacks)


CHECKPOINTING = {
    "plain": {},
    "reentrant": {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}},
    "non-reentrant": {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}},
}


@pytest.mark.parametrize("kind", CHECKPOINTING)
def test_rows_counted_are_rows_fed(tiny, tmp_path, kind) -> None:
    model = tiny("llama")
    points = {2: [(Moments(covariance=True), Tokens()), (Rows(), Tokens(pool="mean"))], "model.layers.0.mlp": Moments()}
    watching = CaptureCallback(points)
    trainer(model, tmp_path, [watching], **CHECKPOINTING[kind]).train()
    tokens, sequences = 2 * sum(LENGTHS), 2 * len(LENGTHS)
    single, pooled = watching.tap.sinks["model.layers.2"]
    assert (single.count, len(pooled), watching.tap.sinks["model.layers.0.mlp"].count) == (tokens, sequences, tokens)
    inside = watching.tap.ledger["model.layers.0.mlp"]
    for ledger in (*watching.tap.ledger["model.layers.2"], inside):
        ledger.check()
        assert (ledger.forwards, ledger.tokens.selected, ledger.tokens.masked) == (8, tokens, 6 * sequences - tokens)
    assert inside.tokens.recomputed == (6 * sequences if kind == "reentrant" else 0)


def test_training_is_the_same_with_and_without_it(tiny, tmp_path) -> None:
    def trained(callbacks):
        model = tiny("llama")
        trainer(model, tmp_path, callbacks).train()
        return model.state_dict()

    alone, watched = trained([]), trained([CaptureCallback("model.layers.*", Rows)])
    assert all(torch.equal(watched[name], weight) for name, weight in alone.items())


@pytest.mark.parametrize(("training", "forwards"), [(True, 8), (None, 8 + 2 * 2), (False, 2 * 2)])
def test_evaluation_in_between_is_left_out_unless_asked_for(tiny, tmp_path, training, forwards) -> None:
    watching = CaptureCallback({1: Moments()}, training=training)
    trainer(tiny("llama"), tmp_path, [watching], eval_strategy="epoch").train()
    ledger = watching.tap.ledger["model.layers.1"]
    ledger.check()
    assert ledger.forwards == forwards


class Fail(TrainerCallback):
    """Raises after a number of steps."""

    def on_step_end(self, args, state, control, **rest) -> None:
        if state.global_step == 2:
            raise RuntimeError("bomb")


def hooks(model) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_hooks_go_when_training_ends_or_fails(tiny, tmp_path) -> None:
    model = tiny("llama")
    watching = CaptureCallback({1: Moments()})
    trainer(model, tmp_path, [watching]).train()
    assert hooks(model) == 0
    with pytest.raises(RuntimeError, match="bomb"), watching:
        trainer(model, tmp_path, [watching, Fail()]).train()
    assert hooks(model) == 0
    watching.tap.ledger["model.layers.1"].check()


def test_a_training_after_a_failed_one_starts_anew(tiny, tmp_path) -> None:
    model, watching = tiny("llama"), CaptureCallback("model.layers.1", Rows)
    with pytest.raises(RuntimeError, match="bomb"):
        trainer(model, tmp_path, [watching, Fail()]).train()
    failed = watching.tap
    trainer(model, tmp_path, [watching]).train()
    assert hooks(model) == 0
    assert len(failed.sinks["model.layers.1"]) > 0
    assert len(watching.tap.sinks["model.layers.1"]) == 2 * sum(LENGTHS)


def test_a_labelled_sink_says_that_the_loop_gives_no_labels(tiny, tmp_path) -> None:
    watching = CaptureCallback({1: Moments(labels=["a"])})
    with pytest.raises(LabelError, match="captured without labels"), watching:
        trainer(tiny("llama"), tmp_path, [watching]).train()


def test_there_is_no_capture_before_a_training() -> None:
    with pytest.raises(CaptureError, match="no training has begun"):
        _ = CaptureCallback({1: Moments()}).tap
