"""A single process trains on the GPU that it was given, however many there are."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainingArguments

from loram.trainer.fit import use_one_gpu_


@pytest.fixture
def arguments(tmp_path: Path) -> TrainingArguments:
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, per_device_train_batch_size=4)
    assert arguments.device == torch.device("cpu")
    arguments._n_gpu = 3  # as the Trainer's arguments say where there are three GPUs
    assert arguments.train_batch_size == 12
    return arguments


def test_other_gpus_are_left_alone(arguments: TrainingArguments, monkeypatch: pytest.MonkeyPatch) -> None:
    current: list[Any] = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    use_one_gpu_(arguments, torch.device("cuda:1"))
    assert (arguments.n_gpu, arguments.train_batch_size) == (1, 4)
    assert arguments.device == torch.device("cuda:1")
    assert current == [torch.device("cuda:1")]


def test_a_cpu_stays_as_it_is(arguments: TrainingArguments) -> None:
    use_one_gpu_(arguments, torch.device("cpu"))
    assert arguments.device == torch.device("cpu")
