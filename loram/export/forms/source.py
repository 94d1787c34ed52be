"""An adapter to export, with what has to be known of its base; the base's weights are not read."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loram.base.errors import UserError
from loram.base.paths import is_hub_id, local
from loram.disk.adapter import CONFIG_NAME, WEIGHTS_NAME, Adapter
from loram.disk.artifacts import find_manifest
from loram.disk.files import read_json
from loram.disk.opening import download_config, open_model
from loram.disk.renamed import in_text
from loram.model.architecture import Architecture
from loram.model.families import architecture_of, is_pruned
from loram.model.geometry import Geometry
from loram.model.plan import find_plan
from loram.model.wrappers import WRAPPERS, Wrapper, wrapper_of


@dataclass(frozen=True, kw_only=True)
class Source:
    """An adapter that fits its full model.

    Args:
        adapter: the adapter, under the names of the text model if the base is wrapped.
        architecture, geometry: the base's family and sizes; those of its text model if it is wrapped.
        base: the base's hub id, folder or GGUF file.
        wrapper: the base's wrapper, if it has one.
        made_from: the fingerprints in the adapter's manifest, and its own.
    """

    adapter: Adapter
    architecture: Architecture
    geometry: Geometry
    base: str
    wrapper: Wrapper | None
    made_from: dict[str, str]

    @property
    def folder(self) -> Path:
        """The adapter's folder."""
        return self.adapter.folder


def read_source(folder: Path) -> Source:
    """Read an adapter, and make sure that it is one for a full model.

    Its base's sizes are in the plan beside it, or else in the config.json of `base_model_name_or_path`.

    Raises:
        UserError: the folder is no LoRA adapter, it does not fit its base, or its base is not known.
    """
    adapter, manifest, plan = Adapter.load(folder), find_manifest(folder), find_plan(folder)
    made_from = {} if manifest is None else manifest.made_from
    if adapter.masks:
        raise UserError(
            f"{folder}: was trained with mask_update, and a masked update has no factors; `loram merge` adds it to the "
            "full model exactly"
        )
    base = adapter.config.get("base_model_name_or_path")
    if adapter.base_weights:
        key = next(iter(adapter.base_weights.values()))
        raise UserError(
            f"{folder / WEIGHTS_NAME}: {key} repeats a weight of the base; save the adapter again with "
            "save_embedding_layers=False"
        )
    if plan is not None:
        geometry, architecture, wrapper = plan.geometry, plan.architecture, WRAPPERS.get(plan.base.wrapper or "")
        if "pruned" in made_from:
            raise _unrecovered(folder)
        base = base or plan.base.name
    elif isinstance(base, str) and base:
        config, where = _config_of(base)
        wrapper = wrapper_of(config)
        config = config if wrapper is None else wrapper.text_config(config, where)
        if is_pruned(config):
            raise _unrecovered(folder)
        geometry = Geometry.from_config(config, where)
        architecture = architecture_of(config, where)
    else:
        raise UserError(f"{folder / CONFIG_NAME}: has no base_model_name_or_path; say there which model it is for")
    shapes = {**geometry.linear_shapes(architecture), **geometry.expert_shapes(architecture)}
    if wrapper is not None:
        adapter = in_text(adapter, wrapper, shapes, base)
    else:
        adapter.check_fits(shapes, base, full=True)
    return Source(
        adapter=adapter,
        architecture=architecture,
        geometry=geometry,
        base=base,
        wrapper=wrapper,
        made_from={**made_from, "adapter": adapter.fingerprint},
    )


def _config_of(base: str) -> tuple[dict[str, Any], str]:
    """Return the content of a model's config.json, and what errors call that file."""
    path = local(base)
    if path.is_file():  # a GGUF file, which is converted once
        path = open_model(base).folder
    file = path / "config.json" if path.is_dir() or not is_hub_id(base) else download_config(base)
    if not file.is_file():
        raise UserError(
            f"{file}: not there, and the adapter's base_model_name_or_path says that its base is; write in "
            f"{CONFIG_NAME} where the base is"
        )
    return read_json(file), str(file)


def _unrecovered(folder: Path) -> UserError:
    return UserError(f"{folder}: this adapter was trained on a pruned model: run `loram recover` on it first")
