"""Libraries are kept quiet where nothing is wrong. This module imports nothing heavy."""

import logging
import os
import warnings

# Loggers whose warnings tell a user of loram nothing. On CPUs with AVX512-BF16 that of bitsandbytes misses a package
# for a kernel that loram switches off (`loram.compute.loading.keep_layout_`).
_NOISY = ("httpx", "httpx2", "huggingface_hub", "urllib3", "filelock", "fsspec", "bitsandbytes.backends.cpu.ops")


def quieten_libraries() -> None:
    """Show no warnings and no progress bars of libraries, in this process and in those that it starts."""
    warnings.simplefilter("ignore")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
