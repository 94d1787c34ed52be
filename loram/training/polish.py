"""The polish stage: a few exact LoRA steps on the full model, with one of its decoder layers in memory at a time.

An adapter cannot learn on the pruned model what the pruned heads and channels would have learnt, and it learns there to
make up for them. Both are mended here. This is `train` by the streamed engine, with settings for few steps.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loram.data.spec import Datasets
from loram.training.engine import STREAMED
from loram.training.options import PolishOptions, StreamOptions, TrainOptions
from loram.training.train import train

_EVERY_STEP: Mapping[str, Any] = {"logging_steps": 1, "save_steps": 1, "save_total_limit": 1}


def polish(
    base: str | Path,
    adapter: str | Path,
    out: str | Path,
    *,
    data: Datasets,
    options: PolishOptions | None = None,
    seed: int = 42,
    device: str | None = None,
    fresh: bool = False,
    chat_template: str | Path | None = None,
    **fields: Any,
) -> Path:
    """Go on training a recovered adapter on the full model, which is read from disk layer by layer.

    The same as `train` with the streamed engine and this adapter, with AdamW without weight decay, a learning rate that
    falls to 0 along a cosine, and a checkpoint and a log line after every step.

    Args:
        base: the hub id, folder or GGUF file of the full model.
        adapter: the recovered adapter, or any LoRA adapter of `base`.
        out: the adapter folder to make; its tensors have the same shapes and dtypes.
        data: the training rows, as for `train`.
        options: how to polish; single options may be given by name instead: `max_steps=4`.
        seed, device, fresh, chat_template: as for `train`.
        fields: single options by name, over `options`; see `PolishOptions`.

    Returns:
        `out`.

    Raises:
        UserError, FloatingPointError, MissingGradientError: as for `train`.
    """
    chosen = PolishOptions.of(options, **fields)
    trainer = {**chosen.model_dump(exclude={*StreamOptions.model_fields}), **_EVERY_STEP}
    streaming = chosen.model_dump(include={*StreamOptions.model_fields})
    return train(
        base,
        out,
        adapter=adapter,
        data=data,
        options=TrainOptions(engine=STREAMED, trainer=trainer, **streaming),
        seed=seed,
        device=device,
        fresh=fresh,
        chat_template=chat_template,
    )
