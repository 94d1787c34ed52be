"""What is checked before a model is pruned: its tensors, and that what will be written can be loaded."""

from collections.abc import Mapping
from typing import Any

import torch

from loram.base.errors import UserError, in_one_line
from loram.compute.loading import empty_model, empty_wrapped, tower_names
from loram.compute.streaming import fill_before_layers_, without_layers
from loram.disk.checkpoint import Checkpoint
from loram.model.families import architecture_of
from loram.model.plan import PruningPlan
from loram.pruning.layout import blank_plan, pruned_specs
from loram.pruning.options import ResolvedPruneOptions

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def check_prunable(checkpoint: Checkpoint, options: ResolvedPruneOptions) -> None:
    """Refuse a model that cannot be pruned like this, or whose pruned folder could not be loaded.

    Raises:
        UserError: names the tensor, config key or option.
    """
    architecture = architecture_of(checkpoint.config, checkpoint.name)
    options.check_fits(checkpoint.geometry, architecture, checkpoint.config)
    check_weights(checkpoint)
    empty_model(checkpoint, torch.float32)  # or transformers refuses the full model, which pruning and recovery need
    plan = blank_plan(checkpoint, options)
    check_loads(checkpoint, plan)
    if options.keep_towers:
        _check_towers(checkpoint, plan)


def check_loads(checkpoint: Checkpoint, plan: PruningPlan) -> None:
    """Build the pruned model from the config that will be written, and compare it with the tensors that will be.

    The model has no weights. Its rotary tables are computed for the first position and for one beyond the trained
    length, since some kinds have another table there.

    Args:
        checkpoint: the full model.
        plan: a plan of the pruned model; which units it keeps makes no difference.

    Raises:
        UserError: transformers cannot build the model, or the model has other tensors.
    """
    model = empty_model(checkpoint, torch.float32, plan)
    weights, masks = pruned_specs(checkpoint, plan)
    built = _compared(checkpoint, {name: spec.shape for name, spec in {**weights, **masks}.items()}, model)
    where = checkpoint.folder / "config.json"
    positions, row = (
        torch.tensor([[0, model.config.get_text_config().max_position_embeddings]]),
        checkpoint.architecture,
    )
    zeros = {
        name: torch.zeros(1 if name in row.embedding_weights else built[name][0], *built[name][1:])
        for name in row.weights_before_layers
    }
    fill_before_layers_(model, zeros, torch.device("cpu"))
    try:
        with torch.no_grad(), without_layers(model, row, lambda index, hidden, **_: hidden) as decoder:
            decoder(input_ids=torch.zeros(1, 2, dtype=torch.long), position_ids=positions, use_cache=False)
    except Exception as error:  # whatever transformers' own code raises
        raise UserError(
            f"{where}: transformers cannot compute the rotary tables of this config ({in_one_line(error)})"
        ) from error


def _check_towers(checkpoint: Checkpoint, plan: PruningPlan) -> None:
    """Build the wrapped model around the pruned text model, and compare it as `check_loads` does.

    Raises:
        UserError: the model is not wrapped, or as `check_loads`.
    """
    if (wrapper := checkpoint.wrapper) is None:
        raise UserError(f"keep_towers: {checkpoint.name} has no towers, it is a text model alone; leave it out")
    weights, _ = pruned_specs(checkpoint, plan)
    written = {wrapper.outside(name): spec.shape for name, spec in weights.items()}
    written |= {name: checkpoint.whole.shape(stored) for name, stored in tower_names(checkpoint).items()}
    _compared(checkpoint, written, empty_wrapped(checkpoint, plan))


def _compared(checkpoint: Checkpoint, written: Mapping[str, tuple[int, ...]], model: Any) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a built model's tensors, without tied ones, if they are those that will be written.

    Args:
        checkpoint: the full model.
        written: the shapes that will be written, by name.
        model: the pruned model, without weights.

    Raises:
        UserError: a shape differs, or a tensor is missing on one side.
    """
    tied = model.all_tied_weights_keys.keys()
    built = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}
    for name in sorted(built.keys() | written.keys() - tied):
        ours, theirs = (shapes.get(name, "no such tensor") for shapes in (written, built))
        if ours != theirs:
            raise UserError(
                f"{checkpoint.folder / 'config.json'}: a model with this config cannot be pruned: of {name}, the "
                f"pruned folder would have {ours}, and transformers builds {theirs}"
            )
    return built


def check_weights(checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint whose tensors are missing, or differ in shape or number from what its config says.

    Raises:
        UserError: names the tensor or config key, what was found and what was expected.
    """
    geometry, name, row = checkpoint.geometry, checkpoint.name, checkpoint.architecture
    embedding, head = row.embedding_weight, row.head_weight
    if checkpoint.quantized:
        raise UserError(f"{name}: the model is quantised; prune the original in 16 or 32 bits")
    layers, first = geometry.num_hidden_layers, geometry.layer(row, geometry.num_hidden_layers - 1).linears[0].path
    if any(tensor.startswith(f"{row.layer_path(layers)}.") for tensor in checkpoint.index):
        raise UserError(f"{name}: has more layers than config.json's {layers}")
    if (last := f"{row.layer_path(layers - 1)}.{first}.weight") not in checkpoint.index:
        raise UserError(f"{name}: no tensor {last}, though config.json says {layers} layers")
    if head not in checkpoint.index and not geometry.tie_word_embeddings:
        raise UserError(
            f"{name}: no tensor {head}, but config.json's tie_word_embeddings is false; "
            f"set it to true if {row.head} shares the embedding's weight"
        )
    shapes = geometry.tensor_shapes(row)
    for tensor, expected in shapes.items():
        if tensor not in checkpoint.index:
            raise UserError(f"{name}: no tensor {tensor}, which config.json's family needs")
        if checkpoint.spec(tensor).dtype not in _FLOATS:
            raise UserError(f"{name}: {tensor} is {checkpoint.spec(tensor).dtype}, not float32 or 16 bits")
        if checkpoint.shape(tensor) != expected:
            raise UserError(
                f"{name}: {tensor} has shape {checkpoint.shape(tensor)}, but config.json says {expected}"
                + (" (vocab_size, hidden_size)" if tensor in (embedding, head) else "")
            )
    biases = {f"{linear.path}.bias" for linear in row.linears}
    for tensor in checkpoint.names():
        place = row.split(tensor)
        if place is not None and place[1] in biases and tensor not in shapes:
            path = place[1].removesuffix(".bias")
            raise UserError(f"{name}: has a tensor {tensor}, but config.json says that {path} has no bias")
        if tensor not in shapes and tensor != head:
            raise UserError(
                f"{name}: has a tensor {tensor}, which {row.model_class} does not have; save the model without it: "
                "AutoModelForCausalLM.from_pretrained(MODEL).save_pretrained(FOLDER)"
            )
    if head in checkpoint.index and geometry.tie_word_embeddings and not _shares_embedding(checkpoint):
        raise UserError(
            f"{name}: config.json's tie_word_embeddings is true, but {head} differs from {embedding}; "
            "set tie_word_embeddings to false"
        )


def _shares_embedding(checkpoint: Checkpoint) -> bool:
    embedding, head = checkpoint.architecture.embedding_weight, checkpoint.architecture.head_weight
    if checkpoint.shape(head) != checkpoint.shape(embedding):
        return False
    return all(
        torch.equal(rows.float(), checkpoint.tensor(head, start, start + len(rows)).float())
        for start, rows in checkpoint.blocks(embedding)
    )
