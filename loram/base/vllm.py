"""What vLLM takes of an adapter, and the command that serves one."""

import shlex

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # for --max-lora-rank


def serve_command(base: str, *, name: str, folder: str, rank: int) -> str | None:
    """Return the command that serves an adapter with vLLM; None where its rank is above all that vLLM takes.

    Args:
        base: the model that the adapter is for.
        name: what requests call the adapter.
        folder: where the adapter is.
        rank: the largest rank of a module.
    """
    limit = next((limit for limit in RANKS if limit >= rank), None)
    if limit is None:
        return None
    served = ["vllm", "serve", base, "--enable-lora", "--max-lora-rank", str(limit)]
    return shlex.join([*served, "--lora-modules", f"{name}={folder}"])
