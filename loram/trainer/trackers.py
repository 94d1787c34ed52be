"""Trackers, which `report_to` names: where they write, and which cannot be used."""

import logging
import os
from pathlib import Path
from typing import Any

from huggingface_hub.constants import HF_HOME
from transformers import Trainer, TrainingArguments
from transformers.integrations.integration_utils import (
    TensorBoardCallback,
    TrackioCallback,
    WandbCallback,
    get_available_reporting_integrations,
    get_reporting_integration_callbacks,
)

from loram.base.errors import UserError
from loram.base.paths import local
from loram.trainer.arguments import as_user_error

logger = logging.getLogger(__name__)

_PACKAGES = {"azure_ml": "azureml-mlflow", "flyte": "flytekit", "kubeflow": "kubeflow-training"}


def check_trackers(arguments: TrainingArguments, stage: str) -> None:
    """Refuse trackers that could not write, before a model is loaded.

    Args:
        arguments: the Trainer's arguments.
        stage: what the error about an unknown one begins with.

    Raises:
        UserError: one is not known, is not installed, or writes nowhere that stays.
    """
    names: Any = arguments.report_to  # a list, once the arguments are made
    try:
        get_reporting_integration_callbacks(names)
    except ValueError as error:
        raise as_user_error(error, stage) from error
    if missing := sorted(set(names) - set(get_available_reporting_integrations())):
        package = _PACKAGES.get(missing[0], missing[0])
        raise UserError(f"trainer: report_to is {missing[0]}, which is not installed: pip install {package}")
    if "codecarbon" in names:
        raise UserError(
            "trainer: report_to is codecarbon, which writes into the folder of the checkpoints, and that is removed; "
            "leave it out, and run `codecarbon monitor` beside the training"
        )


def place_trackers_(trainer: Trainer, events: Path) -> None:
    """Let each tracker write where its files stay, and say where that is.

    TensorBoard would write into the folder that the Trainer has for checkpoints, which is removed.

    Args:
        trainer: the Trainer, before it trains.
        events: the folder for TensorBoard, unless TENSORBOARD_LOGGING_DIR names one.
    """
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback):
            callback.logging_dir = callback.logging_dir or str(events)
            logger.info("tensorboard writes to %s", callback.logging_dir)
        elif isinstance(callback, WandbCallback):
            logger.info("wandb writes to %s", local(os.environ.get("WANDB_DIR") or ".") / "wandb")
        elif isinstance(callback, TrackioCallback):
            folder = os.environ.get("TRACKIO_DIR") or Path(HF_HOME) / "trackio"
            logger.info("trackio writes to %s, into the project %s", local(folder), trainer.args.project)
