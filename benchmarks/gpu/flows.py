"""Every stage on tiny random models, and what comes out of it judged on the device, there streamed, and on the CPU."""

import json
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from session import Pairs, Setting, say
from tools import OPTIMIZER, scratch

TOLERANCE = 0.05  # nats per token: bf16 on the device against float32 on the CPU
STEPS = {"max_steps": 4, "per_device_train_batch_size": 2, "max_length": 48, "learning_rate": 1e-3, "save_steps": 2}
ROWS = [  # short, since the tokenizer has one token per byte
    {"question": f"{a} + {b}?", "answer": f"It is {a + b}, that is {b} + {a}."} for a in range(6) for b in (2, 4)
]
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 320,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
OWN_SIZES = {
    "gemma2": {"query_pre_attn_scalar": 16},
    "qwen3_moe": {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
}
METHODS = ("dora", "lora-fa", "lora-sp", "lisa", "full")


def make_tiny(folder: Path, family: str) -> Path:
    """Write a tiny random model of a family, with noise on its norms."""
    from random_models import make_tokenizer
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SIZES, **OWN_SIZES.get(family, {}))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


class Flows:
    """The stages on one tiny model, each with the outputs of those before it.

    Args:
        root: the folder that everything is written to.
        family: the model's family.
        device: where the stages compute.
    """

    def __init__(self, root: Path, family: str, device: str) -> None:
        self.root, self.device, self.base = root, device, make_tiny(root / "base", family)
        self.data = root / "rows.jsonl"
        self.data.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
        self.text = {"calibration": self.data, "calibration_samples": 4, "calibration_length": 32}

    def losses(self, model: Path, **options: Any) -> dict[str, float]:
        """Return a model's loss on the device, streamed there, and on the CPU; they agree within `TOLERANCE`."""
        import loram

        ways: dict[str, dict[str, Any]] = {
            "device": {"device": self.device},
            "streamed": {"device": self.device, "stream": True},
            "cpu": {"device": "cpu"},
        }
        fixed: dict[str, Any] = {"data": self.data, "max_samples": 6, "max_length": 64}
        losses = {way: loram.evaluate(model, **fixed, **options, **own).loss for way, own in ways.items()}
        if max(losses.values()) - min(losses.values()) > TOLERANCE:
            raise AssertionError(f"the losses differ: {losses}")
        return losses

    def prune(self, out: str, **options: Any) -> dict[str, float]:
        """Prune the base, and judge the pruned model."""
        import loram

        if "pattern" not in options:
            options = {"ratio": 0.5, "keep_first": 1, "keep_last": 1, **options}
        loram.prune(self.base, self.root / out, device=self.device, **options)
        return self.losses(self.root / out)

    def train(self, model: str, out: str, trainer: dict[str, Any] | None = None, **options: Any) -> None:
        """Train an adapter for a few steps."""
        import loram

        four_bits = OPTIMIZER if options.get("load_in_4bit") else {}
        trainer = {**STEPS, **four_bits, **(trainer or {})}
        loram.train(self.root / model, self.root / out, data=self.data, trainer=trainer, device=self.device, **options)

    def recover(self, adapter: str, **options: Any) -> dict[str, float]:
        """Recover an adapter, and judge it on the base."""
        import loram

        out = self.root / f"{adapter}-recovered"
        loram.recover(self.root / adapter, out, **options)
        return self.losses(self.base, adapter=out)

    def trained(self, model: str, out: str, **options: Any) -> dict[str, float]:
        """Train, recover, and judge the recovered adapter on the full model."""
        self.train(model, out, **options)
        return self.recover(out)

    def trained_full(self, out: str, **options: Any) -> dict[str, float]:
        """Train on the base by the streamed engine, and judge the adapter there."""
        self.train("base", out, engine="streamed", **options)
        return self.losses(self.base, adapter=self.root / out)

    def polish(self) -> dict[str, float]:
        """Polish the first recovered adapter, and judge it on the base."""
        import loram

        options = loram.PolishOptions(max_steps=2, per_device_train_batch_size=4, max_length=48)
        start, out = self.root / "lora-recovered", self.root / "polished"
        loram.polish(self.base, start, out, data=self.data, options=options, device=self.device)
        return self.losses(self.base, adapter=out)

    def merge(self) -> dict[str, float]:
        """Merge the first recovered adapter into the base, and judge that."""
        import loram

        loram.merge(self.base, self.root / "lora-recovered", self.root / "merged")
        return self.losses(self.root / "merged")

    def align(self, out: str, **options: Any) -> dict[str, float]:
        """Align the pruned model, and judge it."""
        import loram

        trainer = {"max_steps": 4, "per_device_train_batch_size": 2, **options.pop("trainer", {})}
        loram.align(self.root / "pruned", self.root / out, trainer=trainer, device=self.device, **options)
        return self.losses(self.root / out)

    def align_cached(self) -> dict[str, float]:
        """Align the pruned model with what a teacher wrote down before."""
        import loram

        loram.teach(self.base, self.root / "taught", data=self.data, top_k=16, max_length=48, device=self.device)
        return self.align("aligned", teacher=self.root / "taught", eval_steps=2, probe_steps=2)

    def resume(self, **options: Any) -> float:
        """Stop a training after step 3 and go on; return the largest difference from an undisturbed one."""
        from transformers import TrainerCallback

        from loram.disk.adapter import Adapter

        class Stop(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
                if state.global_step == 3:
                    raise KeyboardInterrupt

        names = [f"{kind}-{len(options)}" for kind in ("whole", "stopped")]
        self.train("pruned", names[0], {"max_steps": 5}, **options)
        try:
            self.train("pruned", names[1], {"max_steps": 5}, callbacks=[Stop()], **options)
        except KeyboardInterrupt:
            self.train("pruned", names[1], {"max_steps": 5}, **options)
        whole, stopped = (Adapter.load(self.root / name).tensors for name in names)
        worst = max(float((whole[name] - stopped[name]).abs().max()) for name in whole)
        if worst > 1e-4:
            raise AssertionError(f"the resumed adapter differs by {worst}")
        return worst

    def quantize(self) -> float:
        """Write the pruned model in 4 bits, train on that, and return the loss there."""
        import loram

        loram.quantize(self.root / "pruned", self.root / "quantized")
        self.train("quantized", "on-quantized", OPTIMIZER)
        adapter = self.root / "on-quantized"
        return loram.evaluate(
            self.root / "quantized", data=self.data, adapter=adapter, max_length=64, device=self.device
        ).loss


def main_flows(flows: Flows) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield the stages that everything rests on, in order."""
    yield "prune taylor", lambda: flows.prune("pruned", refit=False, **flows.text)
    yield "evaluate the base", lambda: flows.losses(flows.base)
    yield "train", lambda: flows.trained("pruned", "lora")
    yield "train, 4 bits", lambda: flows.trained("pruned", "lora4", load_in_4bit=True)
    yield "train, anchored", lambda: flows.trained("pruned", "anchored", anchor_steps=2)
    yield "train, anchored, 4 bits", lambda: flows.trained("pruned", "anchored4", anchor_steps=2, load_in_4bit=True)
    yield "train, streamed", lambda: flows.trained("pruned", "streamed", engine="streamed")
    yield "train the base, streamed", lambda: flows.trained_full("streamed-full")
    yield "train the base, streamed, 4 bits", lambda: flows.trained_full("streamed-full4", load_in_4bit=True)
    yield "prune taylor, refitted", lambda: flows.prune("refitted", refit=True, bypass_rank=4, **flows.text)
    yield "train on the refitted", lambda: flows.trained("refitted", "on-refitted")
    yield "train on the refitted, 4 bits", lambda: flows.trained("refitted", "on-refitted4", load_in_4bit=True)
    yield "polish", flows.polish
    yield "merge", flows.merge
    yield "teach and align", flows.align_cached
    yield "resume", flows.resume
    yield "resume, 4 bits", lambda: flows.resume(load_in_4bit=True)


def more_flows(flows: Flows) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield the stages' other ways, which need the main ones' outputs."""
    from functools import partial

    for criterion in ("magnitude", "random", "wanda", "activation"):
        yield f"prune {criterion}", partial(flows.prune, f"pruned-{criterion}", criterion=criterion)
    yield (
        "prune flap, with biases",
        lambda: flows.prune("pruned-flap", criterion="flap", bias_compensation=True, **flows.text),
    )
    for criterion in ("sparsegpt", "wanda"):
        options = {"pattern": "4:8", "criterion": criterion, **flows.text}
        yield f"prune 4:8 {criterion}", partial(flows.prune, f"sparse-{criterion}", **options)
    yield "train sparse, 4 bits", lambda: flows.trained("sparse-sparsegpt", "sparse4", load_in_4bit=True)
    yield "train sparse, masked", lambda: flows.train("sparse-sparsegpt", "masked", mask_update=True)
    for method in METHODS:
        yield f"train {method}", partial(flows.trained, "pruned", method, method=method, anchor_steps=0)
    yield (
        "train dora, 4 bits",
        lambda: flows.trained("pruned", "dora4", method="dora", load_in_4bit=True, anchor_steps=0),
    )
    yield (
        "train, 4 bits, embedding offloaded, adapter in bf16",
        lambda: flows.trained("pruned", "offloaded", load_in_4bit=True, offload_embedding=True, lora_dtype="bfloat16"),
    )
    head = {"target_modules": ["q_proj", "lm_head"]}
    yield "train, 4 bits, lm_head", lambda: flows.trained("pruned", "head4", load_in_4bit=True, lora=head)
    yield "train, packed", lambda: flows.trained("pruned", "packed", trainer={"packing": True}, anchor_steps=0)
    accumulated = {"gradient_accumulation_steps": 2}
    yield (
        "train, anchored, accumulated",
        lambda: flows.trained("pruned", "accumulated", trainer=accumulated, anchor_steps=2),
    )
    yield "quantize and train", flows.quantize
    mixed = {"objective": "mix", "eval_steps": 2, "probe_steps": 2, "trainer": {"max_length": 48}}
    yield "align, live teacher", lambda: flows.align("aligned-live", data=flows.data, **mixed)
    if flows.device == "cuda":
        yield "train, compiled", lambda: flows.trained("pruned", "compiled", trainer={"torch_compile": True})


def flows(setting: Setting, family: str, more: bool = False) -> Pairs:
    """Run the stages on a tiny model of a family; a stage that fails does not end the others.

    Args:
        setting: where they run.
        family: the model's family.
        more: run the stages' other ways too.
    """
    with scratch(setting.work) as root:
        stages = Flows(root, family, setting.device)
        failed = []
        for table in (main_flows, more_flows) if more else (main_flows,):
            for name, stage in table(stages):
                started = time.perf_counter()
                try:
                    row = {"result": stage()}
                except Exception as error:
                    failed.append(name)
                    row = {"failed": f"{type(error).__name__}: {error}"[:600], "where": traceback.format_exc(limit=-6)}
                yield name, {**row, "seconds": round(time.perf_counter() - started, 2)}
                say(f"{family}, {name}: {row.get('failed', 'done')}")
    yield "failed", failed
