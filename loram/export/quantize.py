"""The quantize stage: write a model folder again with its linears in 4 bits, one tensor at a time."""

from collections.abc import Sequence
from pathlib import Path

from loram.base.constants import SHARD_BYTES
from loram.base.errors import UserError
from loram.export.table import Export


def quantize(model: str | Path, out: str | Path, *, shard_bytes: int = SHARD_BYTES) -> Path:
    """Write a model with every linear in NF4 with double quantisation (QLoRA, arXiv 2305.14314).

    The format is transformers' own, and takes a quarter of the 16-bit folder's disk. `train` and `eval` read the folder
    as it is, and compute what they compute with `load_in_4bit` on the original; so does any tool that loads models
    quantised by bitsandbytes. The embedding stays as it was, since that format has no other way, and a tied head with
    it; `train` quantises them when it loads the folder.

    Args:
        model: a pruned folder, or the hub id, folder or GGUF file of a full model.
        out: the folder to make.
        shard_bytes: the largest size of the files that weights are written to.

    Returns:
        `out`.

    Raises:
        UserError: the model cannot be used or is quantised already, or `out` exists.
    """
    from loram.base.progress import track
    from loram.compute.nf4 import packed_specs, packed_tensors
    from loram.disk.artifacts import check_output, publish
    from loram.disk.card import Making, write_card
    from loram.disk.files import copy_side_files, write_json
    from loram.disk.opening import open_model
    from loram.disk.writer import ShardedWriter
    from loram.model.plan import find_plan

    out = check_output(out, model)
    checkpoint = open_model(model)
    if checkpoint.quantized:
        raise UserError(f"{checkpoint.name}: is quantised already")
    if checkpoint.sparse:
        raise UserError(
            f"{checkpoint.name}: transformers' 4-bit format knows no sparse weights; `loram train --load-in-4bit` "
            "quantises them when it loads the folder"
        )
    if checkpoint.wrapper is not None:
        raise UserError(
            f"{checkpoint.name}: a {checkpoint.wrapper.model_type} holds more than a text model, and only text models "
            "are stored in 4 bits; `loram train --load-in-4bit` quantises its text model when it loads the folder"
        )
    architecture = checkpoint.architecture
    if architecture.experts is not None:
        raise UserError(
            f"{checkpoint.name}: transformers' 4-bit format has no place for experts; `loram train --load-in-4bit` "
            "quantises them when it loads the folder"
        )
    whole = {*architecture.embedding_weights, *([architecture.head_weight] if checkpoint.tied else [])}
    weights = [name for name in checkpoint.names() if name.endswith(".weight") and name not in whole]
    linears = [name for name in weights if len(checkpoint.shape(name)) == 2]
    specs = {}
    for name in checkpoint.names():
        spec = checkpoint.spec(name)
        specs.update(packed_specs(name, spec.shape) if name in linears else {name: spec})
    made_from = {"original": checkpoint.fingerprint}
    if plan := find_plan(checkpoint.folder):
        made_from |= {"base": plan.base.fingerprint, "plan": plan.fingerprint}
    with publish(out, kind="quantized", made_from=made_from) as staging:
        with ShardedWriter(staging, specs, shard_bytes) as writer:
            for name in track(checkpoint.names(), "Quantising"):
                if name not in linears:
                    writer.copy(name, checkpoint)
                    continue
                for part, tensor in packed_tensors(name, checkpoint.tensor(name)).items():
                    writer.write(part, tensor)
        copy_side_files(checkpoint.folder, staging)
        tied = [architecture.head] if checkpoint.tied else []
        config = {**checkpoint.config, "quantization_config": quantization_config(tied)}
        write_json(staging / "config.json", config)
        step = "**Quantised**: the linears are in NF4 with double quantisation."
        making = Making(kind="quantized", step=step, model=checkpoint.name, parents=[checkpoint.folder])
        write_card(staging, making)
    return out


def quantization_config(whole: Sequence[str]) -> dict[str, object]:
    """Return the key `quantization_config` of config.json, for transformers.

    Args:
        whole: the paths of linears that stay as they were: a tied head, which shares the embedding's weight.
    """
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_compute_dtype": "bfloat16",
        "llm_int8_skip_modules": list(whole),
    }


EXPORT = Export(
    function=quantize,
    summary="Store a model with its linears in 4 bits (NF4).",
    detail="MODEL is a pruned folder or a full model; OUT is in transformers' own format.",
    result="4-bit model folder",
)
