"""The align stage: a pruned model trained until it says what the full model says."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft import LoraConfig, PeftModel
from torch import nn
from transformers import PreTrainedModel, TrainerState, set_seed

from loram.alignment.arguments import build_arguments
from loram.alignment.distill import AlignTrainer
from loram.alignment.inputs import Inputs, load_on, open_inputs
from loram.alignment.judge import Judge, best_step, stale_probes
from loram.alignment.mixture import collate
from loram.alignment.options import AlignOptions, resolve_trainer
from loram.alignment.probe import Probe
from loram.base import processes
from loram.base.errors import UserError
from loram.compute.device import join_processes
from loram.compute.loading import load_model
from loram.disk.adapter import Adapter
from loram.disk.artifacts import check_output
from loram.disk.card import Making, shown, write_card
from loram.disk.merged import write_merged
from loram.disk.opening import open_model
from loram.disk.template import as_setting
from loram.disk.writer import write_trained
from loram.trainer.adapted import add_adapter, frozen_model
from loram.trainer.arguments import check_batches, duration
from loram.trainer.checkpoints import Checkpoints
from loram.trainer.fit import fit_model_, is_over, losses, read_state
from loram.trainer.frame import Job, Outcome, run_job
from loram.trainer.resume import first_start
from loram.trainer.sharding import sharding

logger = logging.getLogger(__name__)

LOG_NAME = "align_log.jsonl"


def align(
    pruned: str | Path,
    out: str | Path,
    *,
    options: AlignOptions | None = None,
    base: str | Path | None = None,
    seed: int = 42,
    device: str | None = None,
    fresh: bool = False,
    chat_template: str | Path | None = None,
    **fields: Any,
) -> Path:
    """Train all weights of a pruned model, except embedding and lm_head, on what the full model predicts.

    With `lora_r` a LoRA on all linears of the decoder layers trains in their place, and is added to them at the end.
    That takes little more memory than the pruned model itself, which may be in 4 bits meanwhile.

    `distill` minimises the forward KL divergence from the full model at the places in the loss, `clm` minimises plain
    cross entropy, and `mix` their weighted mean. The full model's predictions come from caches that `teach` made, whose
    rows are then the data; without `teacher` they come from the full model itself, in memory.

    Before the first step, every `eval_steps`, and after the last step, a probe is made (see `loram.alignment.probe`): a
    short LoRA training on the student, recovered, and judged on the full model. The weights whose recovered loss is
    least are kept.

    Checkpoints go to `OUT-checkpoints`, as in `train`: after an interruption the same call goes on and ends with the
    same bytes.

    Args:
        pruned: the pruned folder.
        out: the aligned folder to make: like `pruned`, with the losses and the probes in `align_log.jsonl`.
        options: how to align; single options may be given by name instead: `data=`, one data set or several (see
            `loram.data.tokens`) as names, mappings or specs; `teacher=`, folders that `teach` made, and so on.
        base: the full model, if it is not at the name that the plan has.
        seed: the seed of everything that is drawn.
        device: `cpu`, `cuda`, ...; by default the first GPU if there is one.
        fresh: begin anew where `OUT-checkpoints` has an interrupted alignment.
        chat_template: a .jinja file, or a model whose tokenizer has a template, in place of the model's own template.
        fields: single options by name, over `options`; see `AlignOptions`.

    Returns:
        `out`.

    Raises:
        UserError: a folder, data set or option cannot be used, no step would be taken, the teacher is not the plan's
            full model or does not fit in memory, `out` exists, or the interrupted alignment had settings or data with
            another result.
        FloatingPointError: a loss, gradient or weight is not finite; names the step and the tensor.
        MissingGradientError: a parameter that should train gets no gradient; names it.
    """
    spec = AlignOptions.of(options, **fields)
    out = check_output(out, pruned)
    on = join_processes(device)
    if kind := sharding(spec.trainer):
        raise UserError(f"{kind}: align trains whole models, one in each process; leave it out")
    arguments = resolve_trainer(spec.trainer, seed, adapter=spec.lora_r is not None)
    started = first_start(out, fresh=fresh)
    inputs = open_inputs(open_model(pruned, chat_template=chat_template), spec, arguments, base, on, now=started)
    check_batches(len(inputs.rows), build_arguments(arguments, on, out))
    probe_rows = ""
    if inputs.probe is not None:
        probe_rows = f", the probe trains on {len(inputs.probe[0])} and is judged by {len(inputs.probe[1])}"
    logger.info("aligning on %d rows%s", len(inputs.rows), probe_rows)
    return run_job(_job(inputs, spec, arguments, on, started), out, fresh=fresh)


def _job(
    inputs: Inputs, spec: AlignOptions, options: Mapping[str, Any], device: torch.device, started: datetime
) -> "_AlignJob":
    return _AlignJob(
        kind="pruned",
        made_from=inputs.fingerprints(),
        settings={
            **spec.model_dump(mode="json", exclude={"trainer"}),
            "trainer": dict(options),
            "rows": len(inputs.rows),
            "processes": processes.count(),
            **as_setting(inputs.student.chat_template),
        },
        names={
            "rows": " and ".join(one.path for one in spec.dataset or spec.teacher) or "the sampled text",
            "base": inputs.plan.base.name,
            "pruned": inputs.student.name,
        },
        started=started,
        device=device,
        checkpoint_limit=options["save_total_limit"],
        keep_checkpoints=spec.trainer.get("save_strategy", "no") != "no",
        spec=spec,
        options=options,
        inputs=inputs,
    )


@dataclass(frozen=True, kw_only=True)
class Aligned(Outcome):
    """The outcome of an alignment.

    Args:
        weights: the checkpoint whose weights are kept; None for those that the student began with.
    """

    weights: Path | None


@dataclass(frozen=True, kw_only=True)
class _AlignJob(Job[Aligned]):
    """An alignment.

    Args:
        spec: the options of the alignment.
        options: the options of its Trainer, with every default filled in.
        inputs: the models and rows.
    """

    log_name: ClassVar[str] = LOG_NAME

    spec: AlignOptions
    options: Mapping[str, Any]
    inputs: Inputs

    def fit(self, checkpoints: Checkpoints, newest: Path | None) -> Aligned:
        """Train, or go on; an alignment that is over, or out of patience, is not trained again."""
        if newest is not None:
            state = read_state(newest)
            checkpoints.best = best_step(state.log_history)
            if is_over(state) or stale_probes(state.log_history) >= self.spec.patience:
                return _aligned(state, newest, checkpoints)
        trainer = fit_model_(
            AlignTrainer,
            self._student(),
            build_arguments(self.options, self.device, checkpoints.staging),
            device=self.device,
            rows=self.inputs.rows,
            collator=collate,
            checkpoints=checkpoints,
            newest=newest,
            clm_weight=self.spec.text_share,
            teacher=self._teacher(),
            judge=self._judge(checkpoints),
        )
        return _aligned(trainer.state, checkpoints.path(trainer.state.global_step), checkpoints)

    def _student(self) -> PreTrainedModel | PeftModel:
        """Return the pruned model: in float32 with all trainable weights unfrozen, or frozen with a LoRA on it."""
        if (rank := self.spec.lora_r) is not None:
            set_seed(self.options["seed"])  # which draws lora_A
            adapter = LoraConfig(
                r=rank,
                lora_alpha=self.spec.lora_alpha or 2 * rank,
                target_modules=list(self.inputs.student.architecture.adapter_targets),
                task_type="CAUSAL_LM",
            )
            frozen = frozen_model(self.inputs.student, self.device, in_4bit=self.spec.load_in_4bit)
            return add_adapter(frozen, adapter)
        model = load_model(self.inputs.student, dtype=torch.float32)
        if not self.spec.train_embeddings:
            head: nn.Module = model.get_output_embeddings()
            for module in (model.get_input_embeddings(), head):
                module.requires_grad_(False)
        return model

    def _teacher(self) -> PreTrainedModel | None:
        """Return the full model in memory; None where the loss does not need it there."""
        if not self.spec.live or self.inputs.full is None:
            return None
        return load_on(self.inputs.full, self.device).requires_grad_(False)

    def _judge(self, checkpoints: Checkpoints) -> Judge | None:
        """Return what decides which weights are kept; None without a probe."""
        if self.inputs.probe is None or self.inputs.full is None:
            return None
        train, dev = self.inputs.probe
        probe = Probe(
            self.inputs.full,
            self.inputs.plan,
            train=train,
            dev=dev,
            steps=self.spec.probe_steps,
            seed=self.options["seed"],
            device=self.device,
            stream=self.spec.stream,
        )
        return Judge(probe=probe, every=self.spec.eval_steps, patience=self.spec.patience, checkpoints=checkpoints)

    def write(self, out: Path, outcome: Aligned) -> Mapping[str, float]:
        """Write the pruned folder with the weights that are kept."""
        student = self.inputs.student
        if self.spec.lora_r is not None and outcome.weights is not None:
            write_merged(out, student, Adapter.load(outcome.weights))
        else:
            row = student.architecture
            frozen = () if self.spec.train_embeddings else (row.embedding_weight, row.head_weight)
            write_trained(out, student, outcome.weights, frozen=frozen)
        write_card(out, self._making())
        return {}

    def _making(self) -> Making:
        student, spec = self.inputs.student, self.spec
        sources = [*(one.path for one in spec.dataset), *(one.path for one in spec.teacher)]
        text = ", ".join(f"`{shown(source)}`" for source in sources) or "text that the full model wrote"
        rows = f"{len(self.inputs.rows):,} rows of {text}"
        means = "" if spec.lora_r is None else f", by a LoRA of rank {spec.lora_r} that was added to the weights"
        step = (
            f"**Aligned** with the full model (objective {spec.objective}{means}) on {rows}: {duration(self.options)}."
        )
        return Making(
            kind=self.kind,
            step=step,
            model=student.name,
            parents=[student.folder],
            datasets=[one.path for one in spec.dataset],
            wrapped=student.wrapper is not None,
        )


def _aligned(state: TrainerState, last: Path, checkpoints: Checkpoints) -> Aligned:
    """Return the outcome of a Trainer's state: the weights of the best probe, or else those of the last checkpoint.

    Raises:
        UserError: the checkpoint with the best weights is gone.
    """
    step = best_step(state.log_history)
    weights = last if step is None else checkpoints.path(step) if step > 0 else None
    if weights is not None and not weights.is_dir():
        raise UserError(f"{weights}: has the best weights so far, but is gone; give --fresh to start over")
    if step is not None:
        logger.info("kept: the weights of step %d", step)
    return Aligned(log=losses(state, "loss", "recovered_loss"), weights=weights)
