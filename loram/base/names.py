"""Names that other tools give to what stands in our recipes: axolotl, LLaMA-Factory, Unsloth, TRL, transformers."""

from collections.abc import Collection

_LORA, _TRAINER = "train.lora", "train.trainer"
# What TRL and we call the same, so that it is also found where it was written on another level of the recipe.
_SAME = {
    "": "model_name_or_path base_model_name_or_path output_dir dataset eval_dataset seed device",
    "prune": "ratio criterion pattern calibration calibration_samples calibration_length keep_first keep_last "
    "bias_compensation",
    "train": "method lora trainer load_in_4bit offload_embedding lora_dtype mask_update anchor_steps "
    "anchor_gradients lisa lora_sp",
    "train.lisa": "active_layers interval_steps train_embeddings",
    "train.lora_sp": "share",
    "evaluate": "full_lora stream",
    _LORA: "r lora_alpha lora_dropout target_modules use_rslora rank_pattern alpha_pattern init_lora_weights",
    _TRAINER: "per_device_train_batch_size gradient_accumulation_steps learning_rate lr_scheduler_type warmup_steps "
    "num_train_epochs max_steps max_length max_grad_norm weight_decay optim adam_beta1 adam_beta2 adam_epsilon "
    "gradient_checkpointing activation_checkpointing packing bf16 fp16 logging_steps report_to run_name save_strategy "
    "save_steps save_total_limit neftune_noise_alpha",
}
_OTHERS = {
    "model_name_or_path": "base_model model model_id model_name pretrained_model_name_or_path",
    "output_dir": "output",
    "dataset": "datasets dataset_name train_dataset train_file data_path",
    "eval_dataset": "test_datasets val_dataset validation_dataset validation_file",
    "prune.ratio": "sparsity pruning_ratio prune_ratio",
    "train.method": "finetuning_type adapter peft_method peft_type use_dora",
    "train.load_in_4bit": "quantization_bit",
    "train.lisa.active_layers": "lisa_n_layers lisa_activated_layers",
    "train.lisa.interval_steps": "lisa_step_interval",
    "train.lora.r": "lora_r lora_rank lora_dim rank",
    "train.lora.lora_alpha": "alpha",
    "train.lora.lora_dropout": "dropout",
    "train.lora.target_modules": "lora_target_modules lora_target",
    "train.trainer.per_device_train_batch_size": "micro_batch_size batch_size train_batch_size",
    "train.trainer.max_length": "sequence_len cutoff_len max_seq_length max_seq_len model_max_length",
    "train.trainer.num_train_epochs": "num_epochs epochs",
    "train.trainer.learning_rate": "lr",
    "train.trainer.optim": "optimizer",
    "train.trainer.lr_scheduler_type": "lr_scheduler",
    "train.trainer.warmup_steps": "warmup_ratio",
    "train.trainer.packing": "sample_packing",
    "train.trainer.gradient_checkpointing": "use_gradient_checkpointing",
}
_PLACES = {
    **{name: f"{section}.{name}".lstrip(".") for section, names in _SAME.items() for name in names.split()},
    **{name: place for place, names in _OTHERS.items() for name in names.split()},
}
_NOTES = {
    "use_dora": ": dora",
    "quantization_bit": ": true for 4 bits",
    "warmup_ratio": "; a value below 1 is a share of all steps",
}
_FLAGS = {  # where it is not -- and the key's last part
    "eval_dataset": "--dataset",
    "train.lisa.active_layers": "--lisa-layers",
    "train.lisa.interval_steps": "--lisa-interval-steps",
    "train.lisa.train_embeddings": "--lisa-train-embeddings",
    "train.lora_sp.share": "--lora-sp-share",
    "train.lora.r": "--lora-r",
    "train.lora.target_modules": "--lora-target-modules",
}
_ARGUMENTS = {"model_name_or_path": "model", "output_dir": "out"}


def in_recipe(name: str, section: str = "", known: Collection[str] = ()) -> str | None:
    """What a name is called in a recipe, with what there is to know about it; None where nobody calls it so.

    Args:
        name: a key as another tool has it, or one of ours on another level.
        section: where it stands; a place inside it is named by its last part alone.
        known: the keys of that section, which win over the same key elsewhere.

    Examples: `lora_rank` is `train.lora.r`; in the section `train.lora` it is `r`.
    """
    place = _PLACES.get(name)
    if place is not None and section.split(".")[0] == "align":  # the same options stand there too
        place = place.replace(_TRAINER, "align.trainer")
    if place is None or section == place or section.startswith(f"{place}."):
        return None
    parent, _, last = place.rpartition(".")
    return (last if last in known or (section and parent == section) else place) + _NOTES.get(name, "")


def on_the_line(flag: str, flags: Collection[str], arguments: Collection[str]) -> str | None:
    """What a flag that a subcommand does not know is called there; None where nothing of it corresponds.

    Args:
        flag: as the user wrote it: `--lora-rank`.
        flags: those of the subcommand.
        arguments: names of its arguments.

    Examples: `--lora-rank` of `loram train` is `--lora-r`; of `loram run` it is `train.lora.r=VALUE`.
    """
    name = flag.removeprefix("--").replace("-", "_")
    place, note = _PLACES.get(name), _NOTES.get(name, "")
    if place is None or flag in flags:
        return None
    if "overrides" in arguments:
        return f"{place}=VALUE, without dashes{note}"
    if _ARGUMENTS.get(place) in arguments:
        return f"{_ARGUMENTS[place].upper()}, an argument without a flag"
    section, _, last = place.rpartition(".")
    ours = _FLAGS.get(place, f"--{last.replace('_', '-')}")
    if ours in flags:
        return ours + note
    passed_on = f"--{section.rpartition('.')[2]}"
    return f"{passed_on} {last}=VALUE{note}" if section in (_LORA, _TRAINER) and passed_on in flags else None
