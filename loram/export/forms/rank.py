"""Adapters whose update has a smaller rank, and adapters of one rank and one scaling."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from loram.disk.adapter import Adapter


def reduced(adapter: Adapter, max_rank: int) -> tuple[Adapter, float, dict[str, float]]:
    """Replace each module's update by the nearest one of a rank of at most `max_rank` (Eckart and Young).

    That is the update's largest singular values with their vectors. They are those of the small matrix R_B·R_Aᵀ, where
    B = Q_B·R_B and Aᵀ = Q_A·R_A, so B·A is never formed. A module of no higher rank keeps its factors as they are.

    Returns:
        The adapter, the share of the squared norm of the whole update that it keeps, and this share by module.
    """
    factors, energies, kept = dict[str, tuple[Tensor, Tensor]](), dict[str, float](), dict[str, float]()
    for module, pair in adapter.modules.items():
        a, b = pair["A"], pair["B"]
        q_b, r_b = torch.linalg.qr(b.double())
        q_a, r_a = torch.linalg.qr(a.double().T)
        left, values, right = torch.linalg.svd(r_b @ r_a.T)  # (r, r), (r,), (r, r)
        squares = values.square()
        energies[module] = float(squares.sum()) * adapter.scaling(module) ** 2
        kept[module] = float(squares[:max_rank].sum() / squares.sum()) if squares.sum() > 0 else 1.0
        if adapter.rank(module) > max_rank:
            roots = values[:max_rank].sqrt()
            a = (roots[:, None] * right[:max_rank] @ q_a.T).to(a.dtype)
            b = (q_b @ left[:, :max_rank] * roots).to(b.dtype)
        factors[module] = a, b
    whole = sum(energies.values())
    overall = sum(kept[module] * energies[module] for module in kept) / whole if whole > 0 else 1.0
    scalings = {module: adapter.scaling(module) for module in factors}
    return _with_factors(adapter, factors, scalings), overall, kept


def uniform(adapter: Adapter) -> Adapter:
    """Return an adapter with the same updates, all of one rank and one scaling alpha / r, without patterns or rsLoRA.

    Smaller ranks are filled up with zeros, and where scalings differ, the difference goes into lora_B. A plain adapter
    keeps its factors as they are.
    """
    modules = adapter.modules
    rank = max(adapter.rank(module) for module in modules)
    scaling = adapter.scaling(next(iter(modules)))
    factors = {}
    for module, pair in modules.items():
        missing = rank - adapter.rank(module)
        a = torch.nn.functional.pad(pair["A"], (0, 0, 0, missing))
        b = torch.nn.functional.pad(pair["B"], (0, missing)) * (adapter.scaling(module) / scaling)
        factors[module] = a, b
    return _with_factors(adapter, factors, dict.fromkeys(modules, scaling))


def _with_factors(
    adapter: Adapter, factors: Mapping[str, tuple[Tensor, Tensor]], scalings: Mapping[str, float]
) -> Adapter:
    """Return an adapter with other factors and scalings; its config says their ranks and alphas, without rsLoRA."""
    ranks = {module: len(a) for module, (a, _) in factors.items()}
    alphas = {module: _whole(scalings[module] * rank) for module, rank in ranks.items()}
    rank = max(ranks.values())
    alpha = alphas[next(module for module in ranks if ranks[module] == rank)]
    config: dict[str, Any] = {
        **adapter.config,
        **{"r": rank, "lora_alpha": alpha, "use_rslora": False},
        "rank_pattern": {module: own for module, own in ranks.items() if own != rank},
        "alpha_pattern": {module: own for module, own in alphas.items() if own != alpha},
    }
    tensors = {
        f"base_model.model.{module}.lora_{part}.weight": tensor
        for module, (a, b) in factors.items()
        for part, tensor in (("A", a), ("B", b))
    }
    return dataclasses.replace(adapter, config=config, tensors={**adapter.tensors, **tensors})


def _whole(alpha: float) -> float:
    """Return an alpha as an integer where it is one: some tools read it as such."""
    return round(alpha) if abs(alpha - round(alpha)) < 1e-9 else alpha
