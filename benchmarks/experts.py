"""Take a random mixture of experts through pruning, training in 4 bits, recovery and merging, out of core.

The model has the form of Qwen3-30B-A3B, scaled down, with one tensor per expert as on the hub. The script prints the
peak memory of each command beside what the planner says of it, and `--out` writes the same as JSON.

    python benchmarks/experts.py --out benchmarks/experts.json
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

SHAPES = {
    # hidden, layers, heads, key-value heads, experts, experts per token, width of an expert, vocabulary
    "1b": (1024, 16, 16, 4, 64, 8, 384, 32000),
    "tiny": (128, 4, 4, 2, 16, 4, 64, 1000),
}
ROWS = "".join(
    json.dumps({"question": f"What is {a} plus {b}?", "answer": f"It is {a + b}."}) + "\n"
    for a in range(8)
    for b in (2, 4)
)


def config_of(shape: str) -> dict[str, Any]:
    """Return the config.json of a mixture of this shape."""
    hidden, layers, heads, kv_heads, experts, chosen, width, vocabulary = SHAPES[shape]
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": hidden // heads,
        "num_experts": experts,
        "num_experts_per_tok": chosen,
        "moe_intermediate_size": width,
        "intermediate_size": 4 * hidden,
        "norm_topk_prob": True,
        "vocab_size": vocabulary,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }


def make_model(folder: Path, config: dict[str, Any]) -> int:
    """Write a model with random weights, tensor by tensor; returns the bytes of its weights."""
    import torch
    from random_models import make_tokenizer

    from loram.disk.tensorfile import TensorSpec
    from loram.disk.writer import ShardedWriter
    from loram.model.families import architecture_of
    from loram.model.geometry import Geometry

    geometry, row = Geometry.from_config(config), architecture_of(config)
    assert row.experts is not None
    specs = {}
    for name, shape in geometry.tensor_shapes(row).items():
        place = row.split(name)
        parts = row.experts.in_files.get(place[1]) if place else None
        if place is None or parts is None:
            specs[name] = TensorSpec(dtype=torch.bfloat16, shape=shape)
            continue
        experts, rows, columns = shape
        for expert in range(experts):
            for part in parts:
                inner = f"{row.layer_path(place[0])}.{part.format(expert)}"
                specs[inner] = TensorSpec(dtype=torch.bfloat16, shape=(rows // len(parts), columns))
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    make_tokenizer().save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    with ShardedWriter(folder, specs, 1 << 29) as writer:
        for name, spec in specs.items():
            values = torch.ones(spec.shape) if len(spec.shape) == 1 else torch.randn(spec.shape, generator=generator)
            writer.write(name, (values if len(spec.shape) == 1 else 0.02 * values).bfloat16())
    return sum(spec.nbytes for spec in specs.values())


def run(shape: str, folder: Path) -> dict[str, Any]:
    """Run all commands; returns the figures."""
    from streaming import measure_in_process

    import loram

    config = config_of(shape)
    base, pruned, adapter, recovered, merged = (
        folder / name for name in ("base", "pruned", "adapter", "recovered", "merged")
    )
    weights = make_model(base, config)
    (folder / "rows.jsonl").write_text(ROWS)
    settings: dict[str, Any] = {
        "load_in_4bit": True,
        "device": "cpu",
        "per_device_train_batch_size": 2,
        "max_length": 64,
    }
    planned = loram.estimate(config, experts_ratio=0.5, keep_first=2, keep_last=1, **settings)
    memory = {stage.name: stage.memory for stage in planned.stages}
    rows = f"--dataset {folder / 'rows.jsonl'}"
    commands = {
        "prune": (
            f"prune {base} {pruned} --experts-ratio 0.5 --keep-first 2 --keep-last 1",
            "prune (wanda, flap, activation)",
        ),
        "train": (
            f"train {pruned} {adapter} {rows} --load-in-4bit --max-steps 2 --per-device-train-batch-size 2 "
            "--max-length 64 --anchor-steps 0",
            "train",
        ),
        "recover": (f"recover {adapter} {recovered}", "recover"),
        "merge": (f"merge {base} {recovered} {merged}", "merge"),
        "eval --stream": (f"eval {base} --adapter {recovered} {rows} --stream", "eval --stream"),
    }
    measured = {}
    for name, (line, stage) in commands.items():
        figures = measure_in_process([*line.split(), *(["--device", "cpu"] if name in ("prune", "train") else [])])
        measured[name] = {**figures, "planned": memory[stage]}
        print(
            f"{name:14} {figures['seconds']:7.1f} s   peak {figures['peak_rss'] / 2**30:5.2f} GiB   "
            f"planned {memory[stage] / 2**30:5.2f} GiB",
            file=sys.stderr,
        )
    return {
        "shape": shape,
        "parameters": planned.parameters,
        "active_parameters": planned.active_parameters,
        "pruned_parameters": planned.pruned_parameters,
        "weight_bytes": weights,
        "commands": measured,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = run(options.shape, Path(folder))
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
