"""Make a mixture of experts out of a dense LLaMA: the channels of its MLPs become experts, and a router is fitted.

What comes out is an ordinary checkpoint of the family glm4_moe. In each layer but the first ones, some channels are a
shared expert that every token passes. The others are experts of equal width, and a token goes to those with the highest
sigmoids of the router's logits. The gate values of that family need not be normalised, so a token's experts add up as
the channels of the dense MLP do. There are two steps:

1. `split`, layer by layer, in closed form: channels that act together on text become an expert, the router predicts by
   ridge regression how far the norm of each expert's output is above the threshold of being chosen, and the down
   projection is fitted anew. It reads what the mixture's own earlier layers give, and is fitted to the dense model's
   hidden states.
2. `distill`, end to end: some steps on the divergence of the next token's probabilities from the dense model's, which
   train the experts, routers and shared experts alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, Glm4MoeConfig, Glm4MoeForCausalLM

from loram.data.spec import DataSpec
from loram.data.tokens import load_tokens

LENGTH = 256  # tokens of a piece of text
KEPT_KEYS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim"),
    *("num_key_value_heads", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps"),
    *("tie_word_embeddings", "attention_bias", "bos_token_id", "eos_token_id", "pad_token_id"),
)


@dataclass(frozen=True, kw_only=True)
class Shape:
    """How the channels of an MLP are divided.

    Args:
        experts: how many experts a layer has.
        chosen: how many of them a token goes to.
        width: the channels of one expert; what is left of the MLP's channels is the shared expert.
        dense: the first layers, which keep their MLP.
        scale: what the outputs of experts are multiplied by, beside their gate values.
    """

    experts: int = 32
    chosen: int = 8
    width: int = 32
    dense: int = 4
    scale: float = 2.0

    def gates(self, logits: Tensor) -> Tensor:
        """Return what the output of each expert is multiplied by, (tokens, experts); 0 where it is not chosen."""
        values, places = logits.sigmoid().topk(self.chosen)
        return torch.zeros_like(logits).scatter(1, places, self.scale * values)


@dataclass(frozen=True, kw_only=True)
class Split:
    """What a layer's MLP is divided into.

    Args:
        shared: the channels of the shared expert, (channels,).
        experts: the channels of each expert, (experts, width).
        router: the router's weight, (experts, hidden).
        down: the refitted down projection, (hidden, channels), with the channels in the order of the dense model.
    """

    shared: Tensor
    experts: Tensor
    router: Tensor
    down: Tensor

    def gated(self, acts: Tensor, gates: Tensor) -> Tensor:
        """Return activations (tokens, channels) times the gate values (tokens, experts) of the channels' experts."""
        factors = torch.ones_like(acts)
        for expert, channels in enumerate(self.experts):
            factors[:, channels] = gates[:, expert, None]
        return acts * factors


def text_pieces(model: Path, path: Path, pieces: int, skip: int = 0) -> list[Tensor]:
    """Return pieces of `LENGTH` tokens of a file's rows, one row after the other, without its first `skip` rows."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    spec = DataSpec(path=str(path), max_samples=skip + 4 * pieces if path.suffix == ".jsonl" else None)
    rows = load_tokens(spec, tokenizer, LENGTH, vocabulary=len(tokenizer)).rows
    ids = torch.tensor([token for row in rows["input_ids"][skip:] for token in row])
    return list(ids[: pieces * LENGTH].split(LENGTH))


def activations(mlp: Any, hidden: Tensor) -> Tensor:
    """Return what the down projection of a dense MLP reads, (tokens, channels)."""
    acts: Tensor = F.silu(mlp.gate_proj(hidden)) * mlp.up_proj(hidden)
    return acts


def balanced_clusters(points: Tensor, clusters: int, rounds: int = 8) -> Tensor:
    """Divide points into clusters of equal size by their cosines, (clusters, points per cluster).

    In each round, pairs of a point and a cluster are taken from the nearest to the farthest, and clusters that are full
    take no more.
    """
    size = len(points) // clusters
    points = F.normalize(points, dim=1)
    centres = points[torch.linspace(0, len(points) - 1, clusters).long()]
    for _ in range(rounds):
        order = (points @ centres.T).flatten().argsort(descending=True).tolist()
        members: list[list[int]] = [[] for _ in range(clusters)]
        placed = [False] * len(points)
        for pair in order:
            point, cluster = divmod(pair, clusters)
            if not placed[point] and len(members[cluster]) < size:
                placed[point] = True
                members[cluster].append(point)
        centres = F.normalize(torch.stack([points[own].mean(0) for own in members]), dim=1)
    return torch.tensor(members)


def ridge(inputs: Tensor, targets: Tensor, strength: float, start: Tensor | None = None) -> Tensor:
    """Return the weight (outputs, inputs) of a linear that fits targets, drawn to `start` (default: to zero).

    `strength` of the pull is relative to the mean square of the inputs.
    """
    rest = targets if start is None else targets - inputs @ start.T
    gram, cross = (inputs.T @ inputs).double(), (inputs.T @ rest).double()
    gram.diagonal().add_(strength * gram.diagonal().mean())
    fitted: Tensor = torch.linalg.solve(gram, cross).T.float()
    return fitted if start is None else start + fitted


def split_mlp(mlp: Any, hidden: Tensor, targets: Tensor, shape: Shape) -> Split:
    """Divide the channels of a dense MLP by how they act together, and fit a router and the down projection.

    Args:
        mlp: the dense MLP of a LLaMA.
        hidden: what it reads on some text, (tokens, hidden).
        targets: what its mixture is to return, (tokens, hidden).
        shape: how the channels are divided.
    """
    weight, acts = mlp.down_proj.weight, activations(mlp, hidden)
    strength = acts.abs() * weight.norm(dim=0)  # (tokens, channels): the norm of what a channel adds
    order = strength.square().mean(0).argsort()
    routed = order[: shape.experts * shape.width].sort().values
    experts = routed[balanced_clusters(strength[::4, routed].T, shape.experts)]
    outputs = torch.stack([(acts[:, channels] @ weight[:, channels].T).norm(dim=1) for channels in experts], dim=1)
    margins = outputs - outputs.topk(shape.chosen).values[:, -1:]  # not below zero where an expert is to be chosen
    split = Split(
        shared=order[len(routed) :].sort().values,
        experts=experts,
        router=ridge(hidden, margins / outputs.std(), 1e-3),
        down=weight,
    )
    inputs = split.gated(acts, shape.gates(hidden @ split.router.T))
    return replace(split, down=ridge(inputs, targets, 1e-2, start=weight))


def attend(layer: Any, hidden: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Return the hidden states (pieces, tokens, hidden) between a decoder layer's attention and its MLP."""
    attention = [
        layer.self_attn(layer.input_layernorm(piece[None]), position_embeddings=rotary, attention_mask=None)[0]
        for piece in hidden
    ]
    return hidden + torch.cat(attention)


@torch.no_grad()
def split(model: Any, pieces: Sequence[Tensor], shape: Shape) -> dict[int, Split]:
    """Divide the MLPs of a dense LLaMA from the first to the last layer, on pieces of text of equal length.

    Prints how far the mixture's hidden states are from the dense model's after each layer.
    """
    splits: dict[int, Split] = {}
    exact = drifted = model.model.embed_tokens(torch.stack(list(pieces)))
    rotary = model.model.rotary_emb(exact, torch.arange(exact.shape[1])[None])
    for number, layer in enumerate(model.model.layers):
        exact = attend(layer, exact, rotary)
        exact = exact + layer.mlp(layer.post_attention_layernorm(exact))
        if number < shape.dense:
            drifted = exact
            continue
        drifted = attend(layer, drifted, rotary)
        hidden = layer.post_attention_layernorm(drifted).flatten(0, 1)
        splits[number] = split_mlp(layer.mlp, hidden, (exact - drifted).flatten(0, 1), shape)
        own = splits[number]
        inputs = own.gated(activations(layer.mlp, hidden), shape.gates(hidden @ own.router.T))
        drifted = drifted + (inputs @ own.down.T).view_as(drifted)
        error = (exact - drifted).square().sum() / (exact - exact.mean((0, 1))).square().sum()
        print(f"layer {number}: hidden states differ by {error:.4f} of their variance", flush=True)
    return splits


def config_of(dense: Any, shape: Shape) -> Glm4MoeConfig:
    """Return the config of the mixture of a dense LLaMA with this config."""
    shared = dense.intermediate_size - shape.experts * shape.width
    return Glm4MoeConfig(
        **{name: getattr(dense, name) for name in KEPT_KEYS},
        rope_parameters={**dense.rope_parameters, "partial_rotary_factor": 1.0},
        use_qk_norm=False,
        n_routed_experts=shape.experts,
        num_experts_per_tok=shape.chosen,
        moe_intermediate_size=shape.width,
        n_shared_experts=shared // shape.width,
        first_k_dense_replace=shape.dense,
        routed_scaling_factor=shape.scale,
        norm_topk_prob=False,
        n_group=1,
        topk_group=1,
    )


@torch.no_grad()
def assemble(dense: Any, splits: dict[int, Split], shape: Shape) -> Any:
    """Return the mixture as transformers' own model."""
    model = Glm4MoeForCausalLM(config_of(dense.config, shape))
    weights = dense.state_dict()
    for number, own in splits.items():
        prefix = f"model.layers.{number}.mlp"
        gate, up, _ = (weights.pop(f"{prefix}.{name}_proj.weight") for name in ("gate", "up", "down"))
        weights[f"{prefix}.gate.weight"] = own.router
        weights[f"{prefix}.gate.e_score_correction_bias"] = torch.zeros(shape.experts)
        weights[f"{prefix}.experts.gate_up_proj"] = torch.cat([gate[own.experts], up[own.experts]], dim=1)
        weights[f"{prefix}.experts.down_proj"] = own.down[:, own.experts].movedim(1, 0)
        for name, weight in (("gate", gate[own.shared]), ("up", up[own.shared]), ("down", own.down[:, own.shared])):
            weights[f"{prefix}.shared_experts.{name}_proj.weight"] = weight
    model.load_state_dict(weights)
    return model


def distill(dense: Any, model: Any, pieces: Sequence[Tensor], learning_rate: float, batch: int = 2) -> None:
    """Train the experts, routers and shared experts of a mixture towards the dense model's probabilities.

    The loss is the Kullback-Leibler divergence per token. The learning rate falls to zero in a straight line, and each
    piece of text is used once, in the given order.
    """
    model.requires_grad_(False)
    for layer in model.model.layers[model.config.first_k_dense_replace :]:
        layer.mlp.requires_grad_(True)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    batches = [torch.stack(list(pieces[start : start + batch])) for start in range(0, len(pieces), batch)]
    for step, ids in enumerate(batches):
        optimizer.param_groups[0]["lr"] = learning_rate * (1 - step / len(batches))
        with torch.no_grad():
            targets = dense(ids).logits.log_softmax(-1).flatten(0, 1)
        logits = model(ids).logits.log_softmax(-1).flatten(0, 1)
        loss = F.kl_div(logits, targets, reduction="batchmean", log_target=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step + 1} of {len(batches)}: divergence {loss.item():.4f}", flush=True)


def make_mixture(base: Path, data: Path, out: Path, shape: Shape, pieces: int, steps: int, rate: float) -> None:
    """Write the mixture of a dense LLaMA to `out`, and what it is before the distillation to `out`-split.

    The text is half WikiText-2 validation text, half GSM8K training rows from the 1,000th on.

    Args:
        base, data: the dense model's folder, and the folder of wikitext2_valid.txt and gsm8k_train.jsonl.
        pieces: how many pieces of text `split` reads.
        steps: the steps of the distillation, of two other pieces each.
        rate: its learning rate.
    """
    each = pieces // 2 + steps
    sources = (
        text_pieces(base, data / "wikitext2_valid.txt", each),
        text_pieces(base, data / "gsm8k_train.jsonl", each, 1000),
    )
    text = [piece for pair in zip(*sources, strict=True) for piece in pair]
    dense, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    first = out.with_name(f"{out.name}-split")
    if not first.exists():
        model = assemble(dense, split(dense, text[:pieces], shape), shape)
        model.save_pretrained(first)
        tokenizer.save_pretrained(first)
    model = Glm4MoeForCausalLM.from_pretrained(first)
    distill(dense, model, text[pieces:], rate)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
