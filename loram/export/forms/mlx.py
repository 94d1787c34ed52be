"""The form mlx: an adapter folder as mlx-lm loads it."""

import shlex
from pathlib import Path

from safetensors.torch import save_file

from loram.base.errors import UserError
from loram.disk.adapter import CONFIG_NAME
from loram.disk.files import write_json
from loram.export.forms.form import Form
from loram.export.forms.rank import uniform
from loram.export.forms.source import Source
from loram.export.options import ExportOptions

WEIGHTS_NAME = "adapters.safetensors"


def _write(source: Source, staging: Path, out: Path, options: ExportOptions) -> str:
    """Write both factors transposed: mlx-lm computes scale · (x·lora_a)·lora_b.

    Its config has the paths of the adapted modules inside a layer. It gives them factors in every layer, and those that
    the file does not have stay zero.
    """
    if source.wrapper is not None:
        raise UserError(
            f"{source.folder}: its base is a {source.wrapper.model_type}, whose modules mlx-lm names otherwise; merge "
            f"it: `loram merge {source.base} {source.folder} OUT`"
        )
    adapter = uniform(source.adapter)
    places = {module: source.architecture.split(module) for module in adapter.modules}
    rank = int(adapter.config["r"])
    config = {
        "fine_tune_type": "lora",
        "num_layers": source.geometry.num_hidden_layers,
        "lora_parameters": {
            "rank": rank,
            "scale": adapter.config["lora_alpha"] / rank,
            "dropout": 0.0,
            "keys": sorted({module if place is None else place[1] for module, place in places.items()}),
        },
    }
    factors = {
        f"{module}.lora_{factor.lower()}": tensor.T.contiguous()
        for module, pair in sorted(adapter.modules.items())
        for factor, tensor in sorted(pair.items())
    }
    write_json(staging / CONFIG_NAME, config)
    save_file(factors, staging / WEIGHTS_NAME, {"format": "mlx"})
    return shlex.join(["mlx_lm.generate", "--model", source.base, "--adapter-path", str(out), "--prompt", "Hello"])


MLX = Form(
    result="adapter for mlx-lm",
    write=_write,
    takes="mlx-lm takes it without an adapter: mlx_lm.generate --model {model}",
)
