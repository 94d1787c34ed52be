"""How to align: what recipes and `loram align` say of it, without reading data or models."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, field_validator, model_validator

from loram.base.errors import UserError, first_problem
from loram.data.spec import CacheSpec, WeightedSpec


class AlignSpec(BaseModel):
    """Options of `loram.align`; see there.

    Args:
        dataset: data sets with an optional `weight`; none samples text from the full model.
        teacher: folders that `loram teach` made, likewise; none asks the full model in memory.
        objective: what is learnt: the full model's predictions, the text, or both.
        clm_weight: share of the text's cross entropy in `mix`; a half where none is given.
        train_embeddings: whether embedding and lm_head are trained too.
        probe: whether weights are chosen by the recovered probe.
        probe_dataset: its rows; none holds some of the data out.
        probe_steps: steps of its LoRA run.
        eval_steps: alignment steps from probe to probe.
        patience: stop after so many probes without a new best one.
        stream: read the full model layer by layer in probes even where it fits in memory.
        trainer: options of transformers' TrainingArguments under their own names, and `max_length`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    dataset: tuple[WeightedSpec, ...] = ()
    teacher: tuple[CacheSpec, ...] = ()
    objective: Literal["distill", "clm", "mix"] = "distill"
    clm_weight: float | None = Field(default=None, gt=0, lt=1)
    train_embeddings: bool = False
    probe: bool = True
    probe_dataset: WeightedSpec | None = None
    probe_steps: PositiveInt = 16
    eval_steps: PositiveInt = 50
    patience: PositiveInt = 3
    stream: bool = False
    trainer: dict[str, Any] = Field(default_factory=dict)

    @field_validator("dataset", "teacher", mode="before")
    @classmethod
    def _several(cls, value: Any) -> Any:
        values = value if isinstance(value, list | tuple) else [] if value is None else [value]
        return [cls._named(one) for one in values]

    @field_validator("probe_dataset", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        if isinstance(value, BaseModel):
            return value.model_dump()
        return value if value is None or isinstance(value, dict) else {"path": str(value)}

    @model_validator(mode="after")
    def _go_together(self) -> "AlignSpec":
        if self.teacher and self.dataset:
            raise ValueError("teacher and dataset: the rows come from the teacher's folder; drop one of them")
        if self.teacher and self.objective == "clm":
            raise ValueError("teacher: clm learns from the text alone and asks no teacher; drop one of them")
        if self.clm_weight is not None and self.objective != "mix":
            raise ValueError(f"clm_weight: is of the objective mix, and this is {self.objective}; drop one of them")
        if self.probe_dataset is not None and not self.probe:
            raise ValueError("probe_dataset: given, but there is to be no probe; drop one of them")
        if "max_length" in self.trainer and self.teacher and self.probe_dataset is None:
            raise ValueError("trainer: max_length is that of the teacher's rows; leave it out")
        for name in ("dataset", "teacher"):
            weights = [one.weight for one in getattr(self, name)]
            if None in weights and any(weights):
                raise ValueError(f"{name}: give every one a weight, or none")
        return self

    @property
    def text_share(self) -> float:
        """Share of the text's cross entropy in the loss; the teacher has the rest."""
        shares = {"distill": 0.0, "clm": 1.0, "mix": 0.5 if self.clm_weight is None else self.clm_weight}
        return shares[self.objective]

    @property
    def live(self) -> bool:
        """Whether the full model is asked while the student learns."""
        return not self.teacher and self.objective != "clm"

    @property
    def sampled(self) -> bool:
        """Whether there is no text but what the full model writes."""
        return not self.teacher and not self.dataset

    @classmethod
    def of(cls, **options: Any) -> "AlignSpec":
        """Options as `loram.align` takes them.

        Raises:
            UserError: an option is out of range, or two do not go together.
        """
        try:
            return cls.model_validate(options)
        except ValidationError as error:
            raise UserError(f"align: {first_problem(error).removeprefix('Value error, ')}") from error
