"""Load models, pruned ones included. Only this file touches how transformers builds a model."""

import contextlib
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging

from loram.base.errors import UserError, in_one_line
from loram.base.paths import local
from loram.base.progress import without_library_bars
from loram.disk.checkpoint import Checkpoint
from loram.disk.opening import open_model
from loram.model import modeling_loram
from loram.model.families import family_of
from loram.model.plan import PruningPlan

_CODE = "modeling_loram"
_SLOW_BYTES = 4 << 30
# What somebody once wanted of a forward pass. A pruned folder leaves it out: it says nothing about the model.
_OF_A_RUN = ("return_dict", "output_attentions", "output_hidden_states", "quantization_config")
_OF_THE_FULL = ("model_type", "architectures", "transformers_version", "auto_map", *_OF_A_RUN)


def write_config(full: PreTrainedConfig, plan: PruningPlan, out: Path) -> None:
    """Write a pruned model's config.json, and the code that builds the model, into a folder.

    Args:
        full: the config of the full model.
        plan: the pruning plan.
        out: the folder to write into.
    """
    _write(_pruned_config(full, plan), out)


def write_wrapped_config(checkpoint: Checkpoint, plan: PruningPlan, out: Path) -> None:
    """Do as `write_config` for a wrapped model around its pruned text model.

    Args:
        checkpoint: the full wrapped model.
        plan: the pruning plan of its text model.
        out: the folder to write into.
    """
    _write(_wrapped_config(checkpoint, plan), out)


def _write(config: PreTrainedConfig, out: Path) -> None:
    config.save_pretrained(out)
    shutil.copyfile(Path(str(modeling_loram.__file__)), out / f"{_CODE}.py")


def config_of(checkpoint: Checkpoint) -> PreTrainedConfig:
    """Return transformers' config of a model; of a wrapped one, its text model's."""
    if checkpoint.wrapper is not None or checkpoint.packing:
        return AutoConfig.for_model(**checkpoint.config)
    config: PreTrainedConfig = AutoConfig.from_pretrained(checkpoint.folder)
    return config


def _pruned_config(full: PreTrainedConfig, plan: PruningPlan) -> PreTrainedConfig:
    config_class, model_class = modeling_loram.pruned_classes(plan.architecture.model_class)
    values = full.to_dict()
    for key in _OF_THE_FULL:
        values.pop(key, None)
    keys, own = plan.config_keys(), {int(layer): widths for layer, widths in values.get("per_layer_config", {}).items()}
    if own:  # the family's layers differ in size themselves
        narrow = {int(layer): widths for layer, widths in keys["per_layer_config"].items()}
        keys |= {
            "per_layer_config": {
                str(layer): {**own.get(layer, {}), **narrow.get(layer, {})} for layer in sorted({*own, *narrow})
            },
            "full_per_layer_config": {str(layer): own[layer] for layer in sorted(own)},
        }
    values |= {
        "head_dim": plan.geometry.head_dim,  # some families would divide by a number of heads that varies
        "architectures": [model_class.__name__],
        "auto_map": {
            "AutoConfig": f"{_CODE}.{config_class.__name__}",
            "AutoModelForCausalLM": f"{_CODE}.{model_class.__name__}",
        },
        **keys,
    }
    return _as_read(config_class(**values))


def _wrapped_config(checkpoint: Checkpoint, plan: PruningPlan) -> PreTrainedConfig:
    """Return the config of a wrapped model around its pruned text model."""
    assert checkpoint.wrapper is not None
    config_class, model_class = modeling_loram.wrapped_classes(checkpoint.wrapper.model_class)
    values, text = config_of(checkpoint.whole).to_dict(), _pruned_config(config_of(checkpoint), plan).to_dict()
    for key in _OF_THE_FULL:
        values.pop(key, None)
    del text["auto_map"]  # the wrapped model's says where the code is
    values |= {
        "text_config": text,
        "architectures": [model_class.__name__],
        "auto_map": {
            "AutoConfig": f"{_CODE}.{config_class.__name__}",
            "AutoModelForImageTextToText": f"{_CODE}.{model_class.__name__}",
        },
    }
    return _as_read(config_class(**values))


def _as_read(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return a config as it is read back from a folder."""
    return type(config).from_dict(json.loads(config.to_json_string()))


def load_pruned(path: str | Path, **from_pretrained_kwargs: Any) -> PreTrainedModel:
    """Load a pruned folder as a transformers model.

    Args:
        path: a folder that `prune` or `align` made.
        from_pretrained_kwargs: options of `from_pretrained`: `dtype`, `device_map`, `quantization_config`, ...

    Raises:
        UserError: the folder has no valid plan, or it is not a model.
    """
    folder = local(path)
    PruningPlan.load(folder)
    return load_model(Checkpoint(folder), **from_pretrained_kwargs)


def load_model(checkpoint: Checkpoint, **from_pretrained_kwargs: Any) -> PreTrainedModel:
    """Load any model folder, full or pruned; `from_pretrained_kwargs` as for `load_pruned`.

    Of a wrapped model, this loads the text model alone.

    Raises:
        UserError: the family is not supported, or the folder's weights do not fit its config.
    """
    row = family_of(checkpoint.config, checkpoint.name)  # or it refuses the model
    options = {**from_pretrained_kwargs, "output_loading_info": True}
    with _bar_if_slow(checkpoint), _without_report(checkpoint):
        loaded: Any = _load_dense(checkpoint, **options) if checkpoint.packing else _load_folder(checkpoint, **options)
    model, report = cast(tuple[PreTrainedModel, dict[str, Any]], loaded)
    unexpected = set(report["unexpected_keys"]) - checkpoint.beside
    report["unexpected_keys"] = {name for name in unexpected if not row.leaves_unused(name, checkpoint.config)}
    problems = [f"{kind.replace('_', ' ')}: {sorted(map(str, names))[0]}" for kind, names in report.items() if names]
    if problems:
        raise UserError(f"{checkpoint.folder}: the weights do not fit config.json ({'; '.join(problems)})")
    if checkpoint.wrapper is not None:  # `save_pretrained` would undo the renaming of a load
        model.__dict__.pop("_weight_conversions", None)
    keep_layout_(model)
    return model


def _load_folder(checkpoint: Checkpoint, **options: Any) -> Any:
    """Have transformers read a model's files."""
    options = {**options, **_of_the_text(checkpoint)}
    return AutoModelForCausalLM.from_pretrained(checkpoint.folder, use_safetensors=True, **options)


def _load_dense(checkpoint: Checkpoint, **options: Any) -> Any:
    """Have transformers take the weights as the checkpoint shows them; it reads packed ones on some devices alone."""
    config, weights = config_of(checkpoint), {name: checkpoint.tensor(name) for name in checkpoint.names()}
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    return model_class.from_pretrained(None, config=config, state_dict=weights, **options)


def _of_the_text(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the options of `from_pretrained` that load only a wrapped model's text model."""
    if checkpoint.wrapper is None:
        return {}
    names = {rf"^{re.escape(prefix)}": own for prefix, own in checkpoint.wrapper.spellings.items() if prefix != own}
    return {"config": config_of(checkpoint), "key_mapping": names}


@contextlib.contextmanager
def _without_report(checkpoint: Checkpoint) -> Iterator[None]:
    """Keep transformers from listing what is beside the model, such as a wrapped model's towers, as unexpected."""
    level = logging.get_verbosity()
    if checkpoint.beside:
        logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def keep_layout_(model: nn.Module) -> None:
    """Keep bitsandbytes from laying a model's 4-bit weights out anew, as it does on CPUs with AVX512-BF16.

    It does so in the first forward pass in evaluation mode without gradients, for a kernel that only predicts: whatever
    trains after that gets no gradient through these weights, and shapes that are no multiple of 32 are an error there.
    """
    module: Any  # torch declares that a module's attributes are tensors or modules
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # a Linear4bit
            module.support_avx512bf16_for_cpu = False


def open_full(
    plan: PruningPlan, base: str | Path | None = None, *, chat_template: str | Path | None = None
) -> Checkpoint:
    """Open the full model of a plan: at `base`, or else at the name that the plan has; `chat_template` as `open_model`.

    Raises:
        UserError: it is not there, or it is another model.
    """
    try:
        full = open_model(base or plan.base.name, chat_template=chat_template)
    except UserError as error:
        if base is not None:
            raise
        raise UserError(f"{error}; say where the full model is: --base, or base_model_name_or_path") from error
    if full.fingerprint != plan.base.fingerprint:
        raise UserError(
            f"{full.name}: not the full model that the plan was made from, {plan.base.name} "
            f"(fingerprint {full.fingerprint[:12]} instead of {plan.base.fingerprint[:12]}); name that one with --base"
        )
    return full


def empty_model(
    checkpoint: Checkpoint, dtype: torch.dtype, plan: PruningPlan | None = None, *, dense: bool = False
) -> PreTrainedModel:
    """Build a full or pruned model without weights: its parameters are on the meta device, its few buffers are real.

    Args:
        checkpoint: the model's folder.
        dtype: the dtype of the parameters.
        plan: build what this plan makes of the full model in `checkpoint`.
        dense: give a sparse model ordinary linears, for the weights that `checkpoint` shows.

    Raises:
        UserError: the family is not supported, or transformers refuses the config.
    """
    family_of(checkpoint.config, checkpoint.name)  # or it refuses the model
    try:
        config: Any = config_of(checkpoint)
        if plan is not None:
            config = _pruned_config(config, plan)
        if dense and checkpoint.sparse:
            config.sparsity = None
        with init_empty_weights(include_buffers=False):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    except Exception as error:  # the checks of configs, and the families' own code, raise exceptions of many types
        what = "the model" if plan is None else "the pruned model"
        where = checkpoint.folder / "config.json"
        raise UserError(f"{where}: transformers cannot build {what} from it ({in_one_line(error)})") from error
    model.tie_weights()  # each parameter was moved to the meta device by itself
    model.train(False)
    return model


def empty_wrapped(checkpoint: Checkpoint, plan: PruningPlan | None = None) -> PreTrainedModel:
    """Build a wrapped model with its towers, without weights.

    Args:
        checkpoint: the full wrapped model.
        plan: put what this plan makes of the text model in its place.

    Raises:
        UserError: transformers refuses the config.
    """
    try:
        config = config_of(checkpoint.whole) if plan is None else _wrapped_config(checkpoint, plan)
        with init_empty_weights(include_buffers=False):
            model: PreTrainedModel = AutoModelForImageTextToText.from_config(config)
    except Exception as error:  # as for `empty_model`
        where = checkpoint.folder / "config.json"
        raise UserError(f"{where}: transformers cannot build the wrapped model ({in_one_line(error)})") from error
    model.tie_weights()
    return model


def tower_names(checkpoint: Checkpoint) -> dict[str, str]:
    """Return what files call the tensors that a wrapped model has beside its text model, by transformers' own names.

    Tensors that transformers leaves unused are not among them.

    Raises:
        UserError: transformers would put such a tensor together from several, or cut it.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    model, wrapper = empty_wrapped(checkpoint), checkpoint.wrapper
    assert wrapper is not None
    changes, built = get_model_conversion_mapping(model), model.state_dict()
    renamings = [change for change in changes if isinstance(change, WeightRenaming)]
    converters = [change for change in changes if isinstance(change, WeightConverter)]
    names: dict[str, str] = {}
    for stored in checkpoint.whole.names():
        if wrapper.unwrapped(stored) is not None:
            continue
        name, converted = rename_source_key(stored, renamings, converters, model.base_model_prefix, built)
        if converted is not None:
            raise UserError(
                f"{checkpoint.name}: transformers builds {name} from {stored} and other tensors, so it cannot be "
                "copied; leave keep_towers out"
            )
        if name in built:
            names[name] = stored
    return names


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """Return the tokenizer in a model's folder, with the chat template that was chosen for it.

    Raises:
        UserError: there is no tokenizer, it cannot be read, or it names no end-of-sequence token.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint.folder)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{checkpoint.folder}: no usable tokenizer here: {str(error).splitlines()[0]}") from error
    if checkpoint.chat_template is not None:
        tokenizer.chat_template = checkpoint.chat_template
    if tokenizer.eos_token_id is None:
        raise UserError(f"{checkpoint.folder}: the tokenizer names no eos_token; set it in tokenizer_config.json")
    return tokenizer


def _bar_if_slow(checkpoint: Checkpoint) -> contextlib.AbstractContextManager[None]:
    """Show transformers' progress bar only for weights that take a while to load."""
    size = sum((checkpoint.folder / shard).stat().st_size for shard in set(checkpoint.index.values()))
    return contextlib.nullcontext() if size > _SLOW_BYTES else without_library_bars()
