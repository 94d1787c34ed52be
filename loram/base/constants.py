"""Sizes that the planner and the code that it plans for must agree on. This module imports nothing."""

# Tokens. The loss holds the logits of this many tokens at a time (`loram.compute.loss`).
CHUNK_TOKENS = 512

# Tokens, padding included. A micro-batch that is streamed through a model's layers has at most this many.
BATCH_TOKENS = 2048

# Tokens, padding included. A micro-batch that is measured for anchors has at most this many (`loram.training.anchors`).
MEASURED_TOKENS = 512

# Tokens. A refit holds out about this many calibration tokens at most, to choose its damping (`loram.pruning.refit`).
HELD_TOKENS = 1024

# Bytes. Streaming keeps this much of the hidden states in memory and the rest in a scratch file.
HIDDEN_BYTES = 1 << 28

# Bytes. A large tensor is read, copied and merged in blocks of about this size (`loram.disk.tensorfile`).
BLOCK_BYTES = 1 << 26

# Weights. In NF4 this many neighbouring weights share one quantisation constant (QLoRA, arXiv 2305.14314, section 3).
NF4_BLOCK = 64

# Constants. In NF4 this many quantisation constants are quantised together and share one float32 constant.
NF4_NESTED_BLOCK = 256

# Bytes. A file of weights that we write has at most this size, unless a single tensor is larger.
SHARD_BYTES = 4 << 30
