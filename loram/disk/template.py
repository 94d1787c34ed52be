"""A chat template that takes the place of a tokenizer's own: a file, or the one of another tokenizer."""

from pathlib import Path

from jinja2 import TemplateSyntaxError

from loram.base.errors import UserError
from loram.base.paths import named
from loram.disk.artifacts import digest

_SUFFIXES = (".jinja", ".j2")  # as for TRL's option chat_template_path


def read_template(source: str | Path) -> str:
    """Return the text of a chat template.

    Args:
        source: a .jinja or .j2 file, or the folder or hub id of a model, whose tokenizer has the template.

    Raises:
        UserError: there is no such file or tokenizer, the tokenizer has no template, or the template is not valid Jinja
            (names file and line).
    """
    path = Path(named(source))
    if not path.is_file():
        return _template_of_tokenizer(str(path))
    if path.suffix not in _SUFFIXES:
        raise UserError(f"{path}: a chat template is a file {' or '.join(_SUFFIXES)}, or a model's folder or hub id")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}; a chat template is text in UTF-8") from error
    if not text.strip():
        raise UserError(f"{path}: the chat template is empty")
    try:
        _compile(text)
    except TemplateSyntaxError as error:
        raise UserError(f"{path}:{error.lineno}: not valid Jinja: {error.message}") from error
    return text


def _compile(text: str) -> None:
    """Compile a template as transformers does, whose tags Jinja alone does not know."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    _compile_jinja_template(text)


def _template_of_tokenizer(source: str) -> str:
    from transformers import AutoTokenizer

    try:
        template: str = AutoTokenizer.from_pretrained(source).get_chat_template()
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{source}: no chat template file, and no tokenizer that has a template: {reason}") from error
    return template


def as_setting(template: str | None) -> dict[str, str]:
    """Return a chosen template as the settings of a stage have it: by its SHA-256, since a file's name says nothing."""
    return {} if template is None else {"chat_template": digest(template)}
