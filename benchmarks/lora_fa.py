"""How many bytes of activations does LoRA-FA save compared with LoRA at equal settings?

Each configuration takes two training steps on a random LLaMA in float32, in a process of its own. The script measures
the bytes that autograd keeps between the forward and the backward pass (each storage once, without the weights), and
the growth of resident memory during the steps, with the allocator set for little memory. The planner's prediction is
shown beside them.

    python benchmarks/lora_fa.py --shape 160m --tokens 512 --rows 2

It prints a table and writes lora_fa.json beside itself. A second call only does what is missing there.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from random_models import SHAPES, config_of

RESULTS = Path(__file__).with_suffix(".json")
RANK = 8
# name -> (method, dropout)
CONFIGURATIONS: dict[str, tuple[str, float]] = {
    "LoRA, dropout 0.05": ("lora", 0.05),
    "LoRA, no dropout": ("lora", 0.0),
    "LoRA-FA, dropout 0.05": ("lora-fa", 0.05),
    "LoRA-FA, no dropout": ("lora-fa", 0.0),
}


def measure(shape: str, rows: int, tokens: int, method: str, dropout: float) -> dict[str, int]:
    """Take two steps; returns the bytes that autograd kept (`kept`) and the growth of resident memory (`peak`)."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    from loram.compute.device import peak_rss, reset_peak_rss, return_freed_memory_, rss
    from loram.compute.loss import use_chunked_loss_
    from loram.model.families import LINEARS
    from loram.training.methods.table import METHODS

    return_freed_memory_()
    torch.manual_seed(0)
    config = {key: value for key, value in config_of(shape).items() if key not in ("dtype", "architectures")}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.float32)
    use_chunked_loss_(model)
    options = LoraConfig(r=RANK, lora_dropout=dropout, target_modules=list(LINEARS), task_type="CAUSAL_LM")
    adapted = get_peft_model(model, options).train()
    METHODS[method].specialise_(adapted, None, pruned=False)
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], fused=True)
    ids = torch.randint(0, config["vocab_size"], (rows, tokens))
    weights = {tensor.untyped_storage().data_ptr() for tensor in [*adapted.parameters(), *adapted.buffers()]}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    reset_peak_rss()
    before = rss()
    for step in range(2):
        hooks = torch.autograd.graph.saved_tensors_hooks(keep if step else lambda tensor: tensor, lambda tensor: tensor)
        with hooks:
            loss = adapted(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {"kept": sum(kept.values()), "peak": peak_rss() - before}


def predict(shape: str, rows: int, tokens: int, method: str, dropout: float) -> int:
    """Predict the bytes of activations with the planner."""
    from loram.planner import estimate

    result = estimate(
        config_of(shape),
        device="cpu",
        method=method,
        lora_r=RANK,
        lora_dropout=dropout,
        max_length=tokens,
        per_device_train_batch_size=rows,
    )
    return result.training.activations


def show(settings: dict[str, int], rows: dict[str, dict[str, int]]) -> None:
    """Print the table."""
    print(", ".join(f"{key} {value}" for key, value in settings.items()))
    print(f"{'':<24}{'kept for backward':>20}{'planned':>12}{'peak of a step':>18}")
    for name, row in rows.items():
        kept, planned, peak = (f"{row[key] / 1e6:,.0f} MB" for key in ("kept", "planned", "peak"))
        print(f"{name:<24}{kept:>20}{planned:>12}{peak:>18}")


def main() -> None:
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measure(**json.loads(sys.argv[2]))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="160m", choices=SHAPES)
    parser.add_argument("--tokens", type=int, default=512, help="tokens per row")
    parser.add_argument("--rows", type=int, default=2, help="rows per batch")
    args = parser.parse_args()
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    rows = results.setdefault(f"{args.shape}, {args.rows} x {args.tokens} tokens, r {RANK}", {})
    for name, (method, dropout) in CONFIGURATIONS.items():
        setting = {**vars(args), "method": method, "dropout": dropout}
        if name not in rows:
            command = [sys.executable, __file__, "--measure", json.dumps(setting)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            rows[name] = json.loads(done.stdout.splitlines()[-1])
        rows[name]["planned"] = predict(**setting)
        RESULTS.write_text(json.dumps(results, indent=2) + "\n")
    show({"rows": args.rows, "tokens": args.tokens, "rank": RANK}, rows)


if __name__ == "__main__":
    main()
