"""Upload a folder of ours to the hub: what its manifest lists and its card, and nothing else that lies there."""

import glob
import logging
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from loram.base.errors import UserError
from loram.base.paths import is_hub_id, local
from loram.disk.adapter import CONFIG_NAME
from loram.disk.artifacts import CARD_NAME, EDITABLE, MANIFEST_NAME, Manifest, find_manifest
from loram.disk.files import read_json
from loram.model.plan import PLAN_NAME, find_plan

logger = logging.getLogger(__name__)

_KEPT_HERE = {"teacher": "the cache of a teacher", "checkpoint": "a checkpoint of a training"}


class Upload(BaseModel):
    """What is uploaded, or would be.

    Args:
        repo: the repository on the hub.
        url: where it is; empty in a dry run.
        files: path in the folder -> size in bytes.
        left_out: the paths of the other files in the folder.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    repo: str
    url: str = ""
    files: dict[str, int]
    left_out: tuple[str, ...]


def push(
    folder: str | Path, repo: str, *, private: bool = False, revision: str | None = None, dry_run: bool = False
) -> Upload:
    """Upload a folder that loram made to a repository of models on the hub.

    Every byte is compared with the manifest first. The files that the manifest lists are uploaded, with the manifest
    and the model card; other files are left out.

    Args:
        folder: a pruned folder, an adapter, or a model.
        repo: the repository, `owner/name`; it is made where it does not exist.
        private: make the repository a private one, and not what is the owner's default; one that exists stays as it is.
        revision: the branch to upload to, which is made where it does not exist; None is the main branch.
        dry_run: upload nothing, and need neither a network nor a token.

    Raises:
        UserError: the folder is none of ours or has changed, `repo` cannot be the name of a repository, there is no
            token, or the hub refuses the upload.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError

    if not is_hub_id(repo):
        raise UserError(f"{repo}: not the name of a repository on the hub, which is owner/name")
    folder = local(folder)
    manifest = _manifest_of(folder)
    upload = _upload(folder, repo, manifest)
    _warn_of_local_base(folder, manifest.kind)
    if dry_run:
        return upload
    if get_token() is None:
        raise UserError("push: there is no token for the hub; log in with `hf auth login`, or set HF_TOKEN")
    api = HfApi()
    try:
        made = api.create_repo(repo, private=private or None, exist_ok=True)
        if revision is not None:
            api.create_branch(made.repo_id, branch=revision, exist_ok=True)
        api.upload_folder(
            repo_id=made.repo_id,
            folder_path=folder,
            revision=revision,
            allow_patterns=[glob.escape(name) for name in upload.files],
            commit_message=f"Upload {folder.name} with LoRAM",
        )
    except HfHubHTTPError as error:
        if error.response.status_code not in (400, 401, 403, 404, 409):
            raise
        raise UserError(f"{repo}: the hub refuses the upload: {' '.join(str(error).split())}") from error
    return upload.model_copy(update={"repo": made.repo_id, "url": str(made)})


def _manifest_of(folder: Path) -> Manifest:
    """Return the manifest of a folder whose every byte is as it was written.

    Raises:
        UserError: the folder cannot be uploaded; the message says which one can.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    manifest = find_manifest(folder, hashed_bytes=None)
    if manifest is None:
        inside = sorted(path.parent.name for path in folder.glob(f"*/{MANIFEST_NAME}"))
        remedy = f"push one of the folders in it: {', '.join(inside)}" if inside else "upload it with `hf upload`"
        raise UserError(f"{folder}: no {MANIFEST_NAME} here, so loram did not make this folder; {remedy}")
    if (what := _KEPT_HERE.get(manifest.kind)) is not None:
        raise UserError(f"{folder}: is {what}, which nobody can load; push the folder that was made with it")
    return manifest


def _upload(folder: Path, repo: str, manifest: Manifest) -> Upload:
    beside = [name for name in (MANIFEST_NAME, CARD_NAME, *EDITABLE) if (folder / name).is_file()]
    names = sorted({*manifest.files, *beside})
    present = (str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    return Upload(
        repo=repo,
        files={name: (folder / name).stat().st_size for name in names},
        left_out=tuple(sorted(set(present) - set(names))),
    )


def _warn_of_local_base(folder: Path, kind: str) -> None:
    """Say so where a folder names its model by a path on this disk, and what to do about it."""
    plan, config = find_plan(folder), folder / CONFIG_NAME
    if config.is_file():
        file, name = CONFIG_NAME, str(read_json(config).get("base_model_name_or_path"))
    elif plan is not None:
        file, name = PLAN_NAME, plan.base.name
    else:
        return
    remedy = "others have to say where that model is"
    if kind == "recovered":
        remedy = "`loram recover ADAPTER OUT --base OWNER/NAME` makes the same adapter for a model on the hub"
    if Path(name).is_absolute():
        logger.warning("%s names %s, a path that only this machine has; %s", file, name, remedy)
