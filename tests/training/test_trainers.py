"""Trainers of others run prepared models unchanged: transformers' Trainer, accelerate, FSDP2."""

import pytest
import rank_processes
import torch
from models import build, inputs, output

import mxcompile
from mxcompile.errors import TrainingError
from mxcompile.tensor.weight import unfused_matmuls
from mxcompile.training.rounded_weights import rounded_weights

QUICK = "w4a4-mxfp-quick"


def prepared():
    return mxcompile.prepare_training(build("llama"), inputs("llama"), QUICK)


def logits(model):
    with torch.no_grad(), unfused_matmuls():
        return output(model.eval()(**inputs("llama")))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")  # of names that transformers renamed
def test_transformers_trainer_and_its_checkpoints(tmp_path):
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    rows = [{"input_ids": row, "labels": row} for row in inputs("llama", batch=6)["input_ids"]]
    options = {"per_device_train_batch_size": 1, "learning_rate": 1e-2, "report_to": "none", "use_cpu": True}
    how = TrainingArguments(str(tmp_path), max_steps=4, save_steps=2, logging_steps=1, **options)
    one, other = prepared(), prepared()
    trainer = Trainer(one, how, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 4
    assert torch.equal(logits(mxcompile.finish_training(one)), logits(one))
    Trainer(other, how, train_dataset=rows).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert torch.equal(logits(other), logits(one))


def test_accelerate_runs_a_plain_loop():
    accelerate = pytest.importorskip("accelerate")
    model = prepared()
    accelerator = accelerate.Accelerator(cpu=True)
    run, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    losses, x = [], inputs("llama")
    for _ in range(4):
        loss = run(**x, labels=x["input_ids"]).loss
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    trained = accelerator.unwrap_model(run)
    assert torch.equal(logits(mxcompile.finish_training(trained)), logits(trained))


def test_fsdp2_shards_it_and_its_full_state_is_finished(tmp_path):
    from torch import distributed
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.fsdp import fully_shard

    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/ranks", rank=0, world_size=1)
    try:
        model, x = prepared(), inputs("llama")
        mesh = distributed.device_mesh.init_device_mesh("cpu", (1,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(2):
            optimizer.zero_grad()
            model(**x, labels=x["input_ids"]).loss.backward()
            optimizer.step()
        expected = logits(model)
        assert len(rounded_weights(model)) == 7
        with pytest.raises(TrainingError, match="is sharded over processes: gather the state"):
            mxcompile.finish_training(model)
        state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    finally:
        distributed.destroy_process_group()
    fresh = prepared()
    fresh.load_state_dict(state)
    assert torch.equal(logits(mxcompile.finish_training(fresh)), expected)


@pytest.mark.slow
def test_fsdp2_in_two_processes_trains_as_one_does():
    """Each process has half of the rows and of the weights; the finished models are equal, and that of the shards."""
    first, second = rank_processes.run("sharded_training", 2)
    (alone,) = rank_processes.run("sharded_training", 1)
    for found in (first, second, alone):
        assert torch.equal(found["finished"], found["logits"])
    assert torch.equal(first["logits"], second["logits"])
    losses = [sum(pair) / 2 for pair in zip(first["losses"], second["losses"], strict=True)]
    assert losses == pytest.approx(alone["losses"], rel=1e-3)
    assert (first["logits"] - alone["logits"]).norm() < 0.05 * alone["logits"].norm()
