"""Models with random weights in the shapes of real ones, in bf16 or 4 bits, full or pruned, written block by block."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, PreTrainedTokenizerFast

from loram.base.progress import track
from loram.compute.loading import write_config
from loram.compute.nf4 import packed_specs, packed_tensors
from loram.disk.artifacts import publish
from loram.disk.tensorfile import TensorSpec
from loram.disk.writer import ShardedWriter
from loram.export.quantize import quantization_config
from loram.model.families import ARCHITECTURES
from loram.model.geometry import Geometry
from loram.model.plan import BaseReference, PruningPlan
from loram.model.resize import narrow
from loram.pruning.choose import choose
from loram.pruning.options import PruneOptions

# (hidden, intermediate, layers, heads, key-value heads, vocabulary)
SHAPES = {
    "llama-3.1-70b": (8192, 28672, 80, 64, 8, 128256),
    "70b": (8192, 28672, 80, 64, 8, 32000),
    "13b": (5120, 13824, 40, 40, 40, 32000),
    "7b": (4096, 11008, 32, 32, 32, 32000),
    "1b": (2048, 5632, 22, 32, 4, 32000),
    "160m": (768, 2048, 16, 12, 4, 32000),
    "nano": (128, 384, 8, 4, 2, 500),
    "tiny": (512, 1536, 12, 8, 4, 8000),
}
LAYERS = ARCHITECTURES["llama"]
_ROWS = 4096  # how many rows of a matrix are made at a time


def config_of(shape: str) -> dict[str, Any]:
    """Return the config.json of a LLaMA of this shape."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **dict(zip((*names, "vocab_size"), SHAPES[shape], strict=True)),
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }


def plan_of(config: dict[str, Any], ratio: float, keep_first: int = 4, keep_last: int = 2) -> PruningPlan:
    """Return a plan that keeps as many units as `prune` would; which units it keeps makes no difference here."""
    geometry = Geometry.from_config(config)
    options = PruneOptions(criterion="random", ratio=ratio, keep_first=keep_first, keep_last=keep_last).resolved()
    blank = {space.name: torch.zeros(geometry.units(space)) for space in LAYERS.spaces}
    return choose(
        dict.fromkeys(options.layers(geometry), blank),
        geometry=geometry,
        model_type="llama",
        base=BaseReference(name="a random model", fingerprint="0" * 64),
        options=options,
        seed=0,
    )


def make_model(folder: Path, config: dict[str, Any], *, ratio: float | None = None, in_4bit: bool = False) -> Path:
    """Write a model with normally distributed weights (deviation 0.02), norms of 1 and a byte-level tokenizer.

    Args:
        folder: the folder to make.
        config: the config.json of the full model.
        ratio: the ratio to prune the model by (default: write the full model).
        in_4bit: write the model as `loram quantize` would. All weights then repeat the same random block.

    Returns:
        `folder`.
    """
    plan = None if ratio is None else plan_of(config, ratio)
    shapes, specs = shapes_of(config, plan), {}
    for name, shape in shapes.items():
        plain = {name: TensorSpec(dtype=torch.bfloat16, shape=shape)}
        specs.update(packed_specs(name, shape) if in_4bit and _is_linear(name, shape) else plain)
    print(f"{folder}: writing {sum(spec.nbytes for spec in specs.values()) / 1e9:.1f} GB", file=sys.stderr)
    with publish(folder, kind="base" if plan is None else "pruned", made_from={}) as staging:
        write_all_but_weights(staging, config, plan)
        if in_4bit:
            written = json.loads((staging / "config.json").read_text())
            written["quantization_config"] = quantization_config([])
            (staging / "config.json").write_text(json.dumps(written, indent=2))
        with ShardedWriter(staging, specs) as writer:
            pieces = _pieces() if in_4bit else {}
            generator = torch.Generator().manual_seed(0)
            for name, shape in track(list(shapes.items()), "Writing the model"):
                if in_4bit and _is_linear(name, shape):
                    for part, spec in packed_specs(name, shape).items():
                        writer.write(part, _tiled(part, pieces[part.removeprefix(name)], spec, shape))
                    continue
                for start, rows in _blocks(shape):
                    block = torch.ones(rows, *shape[1:])
                    if len(shape) == 2:
                        block.normal_(0, 0.02, generator=generator)
                    writer.write(name, block.bfloat16(), start)
    return folder


def shapes_of(config: dict[str, Any], plan: PruningPlan | None) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a model's tensors, or of those of the pruned model that a plan makes of it."""
    shapes = Geometry.from_config(config).tensor_shapes(LAYERS)
    if plan is None:
        return shapes
    blanks = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    return {name: tuple(narrow(name, blank, plan).shape) for name, blank in blanks.items()}


def write_all_but_weights(folder: Path, config: dict[str, Any], plan: PruningPlan | None) -> None:
    """Write a tokenizer, the config.json of the full model or of the pruned one, and the plan into a folder."""
    make_tokenizer().save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    if plan is not None:
        write_config(AutoConfig.from_pretrained(folder), plan, folder)
        plan.save(folder)


def _is_linear(name: str, shape: tuple[int, ...]) -> bool:
    return len(shape) == 2 and name != LAYERS.embedding_weight


def _pieces() -> dict[str, torch.Tensor]:
    """Quantise one block of random weights; returns the end of a tensor's name, after the weight's -> the tensor."""
    block = 0.02 * torch.randn(_ROWS, 4096, generator=torch.Generator().manual_seed(0))
    return {name.removeprefix("weight"): tensor for name, tensor in packed_tensors("weight", block.bfloat16()).items()}


def _tiled(part: str, piece: torch.Tensor, spec: TensorSpec, shape: tuple[int, ...]) -> torch.Tensor:
    """Fill a tensor of a quantised weight by repeating the block's; the state, which is JSON, gets the real shape."""
    if ".quant_state." in part:
        state = {**json.loads(bytes(piece.tolist())), "shape": list(shape)}
        return torch.frombuffer(bytearray(json.dumps(state).encode().ljust(len(piece))), dtype=torch.uint8)
    flat = piece.flatten()
    size = spec.nbytes // flat.element_size()
    return flat.repeat(-(-size // len(flat)))[:size].view(spec.shape)


def _blocks(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Yield (index of the first row, number of rows) of the blocks that a tensor is written in."""
    for start in range(0, shape[0], _ROWS):
        yield start, min(_ROWS, shape[0] - start)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer with one token per byte."""
    alphabet = {letter: number for number, letter in enumerate(["<s>", "</s>", *pre_tokenizers.ByteLevel.alphabet()])}
    inner = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")
