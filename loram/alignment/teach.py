"""The teach stage: stream a text through the full model once, and cache its predictions for alignment."""

import contextlib
import json
import logging
import os
import shutil
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from loram.alignment.options import TeachOptions
from loram.alignment.teacher import INFO_NAME, TeacherInfo, part_name, write_part
from loram.base import processes
from loram.base.constants import BATCH_TOKENS
from loram.base.errors import UserError
from loram.compute.device import compute_dtype, join_processes
from loram.compute.head import TopK
from loram.compute.loading import load_tokenizer
from loram.compute.streaming import Stream
from loram.data.batches import Batch, make_batches, share
from loram.data.spec import DataSpec, as_spec
from loram.data.tokens import load_tokens
from loram.disk.artifacts import check_output, difference, digest, lock, publish, sync
from loram.disk.checkpoint import Checkpoint
from loram.disk.opening import open_model
from loram.disk.template import as_setting
from loram.model.plan import BaseReference
from loram.trainer.resume import STARTED

logger = logging.getLogger(__name__)

_REQUEST_NAME = "request.json"


def teach(
    model: str | Path,
    out: str | Path,
    *,
    data: DataSpec | str | Path | Mapping[str, Any],
    options: TeachOptions | None = None,
    device: str | None = None,
    fresh: bool = False,
    chat_template: str | Path | None = None,
    **fields: Any,
) -> Path:
    """Cache the predictions of a full model on a text.

    For each position whose next token is in the loss, the cache has the `top_k` likeliest next tokens, their
    log-probabilities, and the log of the remaining probability. The model is streamed from disk, one decoder layer at a
    time, once for each part of about `part_tokens` tokens. Finished parts are kept in the folder `OUT-parts`, so that
    the same call continues after an interruption. Several processes of a launcher share the rows of each part: each of
    them reads the layers, and the first one writes.

    Args:
        model: the hub id, folder or GGUF file of the full model.
        out: the cache folder to write; `loram.alignment.teacher` describes its content.
        data: the text (see `loram.data.tokens`). If a row has a prompt, only its completion is in the loss.
        options: how to do it; single options may be given by name instead: `top_k=8`. A larger `part_tokens` needs
            fewer passes over the model, but holds the hidden states of a whole part in memory or in a scratch file.
        device: `cpu`, `cuda`, ... (default: the first GPU, or the CPU if there is none).
        fresh: start from the beginning even if `OUT-parts` has finished parts.
        chat_template: a .jinja file, or a model whose tokenizer has a template, in place of the model's own template.
        fields: single options by name, over `options`; see `TeachOptions`.

    Returns:
        `out`.

    Raises:
        UserError: the model or the data cannot be used, a setting is out of range, `out` exists already, or
            `OUT-parts` belongs to a call with other settings.
    """
    spec, settings = as_spec(data), TeachOptions.of(options, **fields)
    out = check_output(out, model)
    checkpoint, compute_device = open_model(model, chat_template=chat_template), join_processes(device)
    work = out.with_name(f"{out.name}-parts")
    started = processes.broadcast(lambda: datetime.now() if fresh else _first_start(work))
    tokens = load_tokens(
        spec, load_tokenizer(checkpoint), settings.max_length, vocabulary=checkpoint.vocabulary, now=started
    )
    input_ids, labels = tokens.rows["input_ids"][:], tokens.rows["labels"][:]
    vocab_size = checkpoint.shape(checkpoint.head)[0]
    if not 0 < settings.top_k <= vocab_size:
        raise UserError(f"top_k {settings.top_k}: must lie between 1 and the vocabulary's {vocab_size} tokens")
    parts = _parts(input_ids, settings.part_tokens)
    fingerprint = processes.broadcast(lambda: checkpoint.fingerprint)
    info = TeacherInfo(
        base=BaseReference(name=checkpoint.name, fingerprint=fingerprint),
        rows_digest=digest([input_ids, labels]),
        top_k=settings.top_k,
        vocab_size=vocab_size,
        part_rows=tuple(map(len, parts)),
    )
    dtype = compute_dtype(compute_device)
    request = {**info.model_dump(mode="json"), "dtype": str(dtype), STARTED: started.isoformat()}
    with _kept_parts(work, out) if processes.first() else contextlib.nullcontext():
        for number in processes.broadcast(lambda: _begin(work, request, spec.path, len(parts), fresh=fresh)):
            rows = parts[number]
            logger.info("part %d of %d: %d rows", number + 1, len(parts), len(rows))
            part = input_ids[rows.start : rows.stop], labels[rows.start : rows.stop]
            _teach_part(work / part_name(number), checkpoint, *part, info=info, device=compute_device)
        _publish(work, out, info, {"data": spec.model_dump(mode="json"), **as_setting(checkpoint.chat_template)})
    return out


@contextlib.contextmanager
def _kept_parts(work: Path, out: Path) -> Iterator[None]:
    """Make the folder of finished parts, keep other processes out of it, and remove it when it is of no more use."""
    work.mkdir(parents=True, exist_ok=True)
    with lock(work):
        try:
            yield
        except (KeyboardInterrupt, SystemExit) as stop:
            if (work / part_name(0)).exists():
                stop.add_note("the same command continues after the finished parts")
            raise
        finally:
            if out.exists() or not (work / part_name(0)).exists():  # there is nothing to continue from
                shutil.rmtree(work)


def _begin(work: Path, request: Mapping[str, Any], rows: str, parts: int, *, fresh: bool) -> list[int]:
    """Return which parts are still to be made; `fresh` deletes those that are there.

    Raises:
        UserError: those that are there were made for another request.
    """
    if fresh:
        for path in work.iterdir():
            path.unlink()
    _check_request(work, request, rows)
    left = [number for number in range(parts) if not (work / part_name(number)).exists()]
    for number in sorted(set(range(parts)).difference(left)):
        logger.info("part %d of %d: finished before", number + 1, parts)
    return left


def _teach_part(
    path: Path,
    checkpoint: Checkpoint,
    input_ids: Sequence[list[int]],
    labels: Sequence[list[int]],
    *,
    info: TeacherInfo,
    device: torch.device,
) -> None:
    """Stream some rows through the model and write the predictions to a file that appears whole or not at all."""
    batches = make_batches(input_ids, labels, max_tokens=BATCH_TOKENS, rows=share(input_ids))
    own: list[tuple[Batch, TopK]] = []
    if batches:
        stream = Stream(checkpoint, batches, device=device, dtype=compute_dtype(device), scratch=path.parent)
        deque(stream.forward(), maxlen=0)
        own = list(zip(batches, stream.top_k(info.top_k), strict=True))
    predictions = [pair for pairs in processes.send_to_first(own) for pair in pairs]
    if processes.first():
        partial = path.with_suffix(".partial")
        partial.unlink(missing_ok=True)
        write_part(partial, input_ids, labels, predictions, info.vocab_size)
        sync(partial)
        partial.rename(path)


def _parts(input_ids: Sequence[list[int]], part_tokens: int) -> list[range]:
    """Group consecutive rows into parts of at most `part_tokens` tokens; a longer row is a part of its own."""
    starts, room = [0], part_tokens
    for row, ids in enumerate(input_ids):
        if len(ids) > room and row > starts[-1]:
            starts.append(row)
            room = part_tokens
        room -= len(ids)
    return [range(start, stop) for start, stop in zip(starts, [*starts[1:], len(input_ids)], strict=True)]


def _check_request(work: Path, request: Mapping[str, Any], rows: str) -> None:
    path = work / _REQUEST_NAME
    if not path.is_file():
        path.write_text(json.dumps(request, indent=2) + "\n", encoding="utf-8")
        return
    before = _request(work)
    changed = difference(before, request, ignored={"rows_digest", "part_rows", "name", STARTED})
    if changed is None and any(before.get(key) != request[key] for key in ("rows_digest", "part_rows")):
        changed = f"the rows of {rows}, or how they are cut into parts, are not those that it began with"
    if changed:
        raise UserError(f"{work}: was begun with other settings ({changed}); give --fresh to start over")


def _request(work: Path) -> dict[str, Any]:
    """Return what the parts in a folder were made for; nothing if there are none, or if that file is damaged."""
    try:
        request: dict[str, Any] = json.loads((work / _REQUEST_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return request


def _first_start(work: Path) -> datetime:
    """Return when the first of the parts in a folder was begun; that is now if there are none."""
    started = _request(work).get(STARTED)
    return datetime.now() if started is None else datetime.fromisoformat(started)


def _publish(work: Path, out: Path, info: TeacherInfo, settings: Mapping[str, Any]) -> None:
    made_from, settings = {"base": info.base.fingerprint, "rows": info.rows_digest}, {**settings, "top_k": info.top_k}
    with publish(out, kind="teacher", made_from=made_from, settings=settings) as staging:
        if not processes.first():
            return
        for number in range(len(info.part_rows)):
            source, target = work / part_name(number), staging / part_name(number)
            try:
                os.link(source, target)  # avoids a second copy of what may be many gigabytes
            except OSError:
                shutil.copyfile(source, target)
        (staging / INFO_NAME).write_text(info.model_dump_json(indent=2) + "\n", encoding="utf-8")
