"""What a model cannot be trained with."""

from loram.base.errors import UserError
from loram.disk.checkpoint import Checkpoint
from loram.training.engine import STREAMED
from loram.training.experts import taken_for_experts
from loram.training.methods.table import METHODS
from loram.training.options import TrainOptions


def check_model(checkpoint: Checkpoint, options: TrainOptions) -> None:
    """Refuse options that do not go with a model.

    Args:
        checkpoint: the pruned or full model.
        options: the options, with every default filled in.

    Raises:
        UserError: names the option and what to do.
    """
    _check_sparse(checkpoint, options)
    _check_extracted(checkpoint, options)


def _check_sparse(checkpoint: Checkpoint, options: TrainOptions) -> None:
    """Refuse options that only sparse models can have, and those that sparse models cannot have."""
    if options.mask_update and not checkpoint.sparse:
        raise UserError(f"mask_update: {checkpoint.name} is not sparse: it has no weight that the mask would remove")
    if checkpoint.sparse and options.engine == STREAMED and options.load_in_4bit:
        raise UserError(
            f"load_in_4bit: {checkpoint.name} is sparse, and engine streamed has it in 16 bits; leave it out"
        )
    if checkpoint.sparse and METHODS[options.method].weights:
        raise UserError(
            f"method {options.method}: {checkpoint.name} is sparse, and only the weights that it has left could train; "
            "take an adapter's method, or the full model"
        )


def _check_extracted(checkpoint: Checkpoint, options: TrainOptions) -> None:
    """Refuse to train the weights of a pruned mixture of experts if the extracted adapter could not be loaded."""
    row = checkpoint.architecture
    if METHODS[options.method].weights and checkpoint.pruned and (taken := taken_for_experts(row.adapter_targets, row)):
        raise UserError(
            f"method {options.method}: what it changes in a pruned model becomes an adapter on all linears, and PEFT "
            f"takes {taken!r} in {row.model_type} for experts; take an adapter's method, or the full model"
        )
