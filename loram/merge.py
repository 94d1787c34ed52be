"""The merge stage: base weights + adapter -> a plain model folder, one tensor at a time."""

import json
from pathlib import Path

from torch import Tensor

from loram.artifacts import check_output, publish
from loram.errors import UserError
from loram.model.adapter import load_for
from loram.model.checkpoint import open_model, rewrite
from loram.progress import track

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


def merge(base: str | Path, adapter: str | Path, out: str | Path) -> Path:
    """Add an adapter's update scaling·B·A to a model's weights and write the result as a plain model folder.

    Sums are in float32 and stored in the base's dtype. Where lm_head is tied to the embedding and the adapter updates
    it, the merged model has its own lm_head (`tie_word_embeddings` false), since the embedding must stay as it was.

    Args:
        base: hub id, folder or GGUF file of the model the adapter is for; a pruned folder with an adapter of it works.
        adapter: a PEFT LoRA folder; for a full base a recovered one.
        out: the folder to make; plain transformers loads it.

    Returns:
        `out`.

    Raises:
        UserError: the adapter does not fit the base, or `out` exists.
    """
    out = Path(out)
    check_output(out)
    checkpoint = open_model(base)
    update = load_for(checkpoint, Path(adapter))
    untied = checkpoint.tied and "lm_head" in update.modules

    def merged(name: str, tensor: Tensor) -> Tensor:
        module = name.removesuffix(".weight")
        if name == module or module not in update.modules:
            return tensor
        if not tensor.is_floating_point():
            raise UserError(f"{checkpoint.name}: {name} is quantised ({tensor.dtype}); merge into the original weights")
        return (tensor.float() + update.delta(module)).to(tensor.dtype)

    made_from = {"base": checkpoint.fingerprint, "adapter": update.fingerprint}
    with publish(out, kind="merged", made_from=made_from) as staging:
        extra = {_HEAD: _EMBEDDING} if untied else {}
        rewrite(checkpoint, staging, merged, extra=extra, progress=lambda names: track(names, "Merging"))
        config = {**checkpoint.config, **({"tie_word_embeddings": False} if untied else {})}
        (staging / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return out
