"""Pruned causal language models: the code that travels inside every pruned folder.

This file is self-contained (it needs torch and transformers, not loram), because every pruned folder carries a copy of
it: `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` then works in any tool. Importing loram
registers the same classes, so that no remote code is needed there.

A structurally pruned model is an ordinary model of its family, except that some decoder layers have fewer key-value
groups (each with its query heads) and fewer MLP channels. transformers' own code builds the layers. Here the linears of
narrowed layers are replaced by smaller ones, whose paths and shapes are in `config.narrow_linears`, and every layer's
modules get a view of the config with that layer's own number of heads and channels, from `config.per_layer_config`.
Norms over all heads, which few families have, get the widths in `config.narrow_norms`:
{layer: {path: [width, width in the full model]}}. Modules with experts get the shapes and numbers in
`config.narrow_parameters`: {layer: {path: {"shapes": {tensor: shape}, "numbers": {attribute: value}}}}.

A block (attention or MLP) of a narrowed layer may have a bypass beside it: two factors that add bypass_out bypass_in x
to what the block makes of its input x. `config.bypasses` has their ranks: {layer: {path of the block: rank}}.

In a family whose layers differ in size themselves, `config.full_per_layer_config` has the full model's widths.

Layers may also be gone as a whole. The other layers keep their numbers, and an `Identity` stands in the place of each
layer in `config.dropped_layers`.

A wrapped model may also have its towers beside its pruned text model. Then `text_config` is the config of the pruned
text model, and transformers' own class of the wrapped model builds that from it (`wrapped_classes`).

A sparse model has the shapes of the full one, but its linears hold only the weights that are not zero, and one bit per
place that says which these are (`SparseLinear`). `config.sparsity` says in which layers and how many.
"""

import copy
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.nn import functional

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_OLDEST_TRANSFORMERS = (5, 14)  # the first version that knows `per_layer_config`
NarrowLinears = Mapping[str, tuple[int, int, bool]]  # path -> (out_features, in_features, whether it has a bias)
NarrowNorms = Mapping[str, tuple[int, int]]  # path -> (width, width in the full model)
NarrowParameters = Mapping[str, Mapping[str, Mapping[str, Any]]]  # path -> "shapes" or "numbers" -> name -> value


class Identity(nn.Module):
    """What stands in the place of a decoder layer that was dropped: it returns the hidden states as they are."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the hidden states, (rows, width, hidden); all else that decoder layers get is ignored."""
        return hidden_states


def resize_layer_(layer: nn.Module, linears: NarrowLinears) -> None:
    """Replace the linears of a decoder layer that have another shape than they should, in place.

    The new linears have the old ones' dtype and device, and values that are not initialised.

    Args:
        layer: a decoder layer.
        linears: the shapes that the linears should have, by their paths inside the layer.
    """
    for path, (rows, columns, bias) in linears.items():
        linear = cast(nn.Linear, layer.get_submodule(path))
        if (linear.out_features, linear.in_features, linear.bias is not None) != (rows, columns, bias):
            new = nn.Linear(columns, rows, bias, device=linear.weight.device, dtype=linear.weight.dtype)
            layer.set_submodule(path, new)


def resize_norms_(layer: nn.Module, norms: NarrowNorms) -> None:
    """Replace the weights of a decoder layer's RMS norms over all heads, some of which are gone, in place.

    The new weights have values that are not initialised. What is gone counts as zeros. So the n values x that stay of N
    give w x / sqrt(S / N + e), where S is the sum of their squares; the family's own code would give
    w x / sqrt(S / n + e). The first is the second times sqrt(N / n), with e N / n for e.

    Args:
        layer: a decoder layer.
        norms: the widths that the norms should have and had, by their paths inside the layer.
    """
    for path, (width, full) in norms.items():
        norm: Any = layer.get_submodule(path)  # Any: nn.Module declares every attribute to be a tensor or module
        norm.weight = nn.Parameter(torch.empty(width, dtype=norm.weight.dtype, device=norm.weight.device))
        norm.variance_epsilon *= full / width
        norm.register_forward_hook(functools.partial(_times, (full / width) ** 0.5))


def resize_parameters_(layer: nn.Module, modules: NarrowParameters) -> None:
    """Replace the tensors of a decoder layer's modules that are neither linears nor norms, in place.

    The new tensors have the old ones' dtype and device, and values that are not initialised. Where a module keeps the
    number of its experts or of their channels, it gets the new number.

    Args:
        layer: a decoder layer.
        modules: the shapes and numbers that the modules should have, by their paths inside the layer.
    """
    for path, own in modules.items():
        module: Any = layer.get_submodule(path)  # Any: nn.Module declares every attribute to be a tensor or module
        for name, shape in own["shapes"].items():
            old = getattr(module, name)
            new = torch.empty(tuple(shape), dtype=old.dtype, device=old.device)
            setattr(module, name, nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new)
        for name in own["numbers"].keys() & vars(module).keys():
            setattr(module, name, own["numbers"][name])


def add_bypasses_(layer: nn.Module, ranks: Mapping[str, int], hidden: int) -> None:
    """Put a linear bypass beside blocks of a decoder layer, in place.

    Its factors, `bypass_in` (rank, hidden) and `bypass_out` (hidden, rank), are parameters of the block, not linears.
    So nothing that looks for linears finds them: no adapter is put on them, and they stay in 16 bits. They begin as
    zeros.

    Args:
        layer: a decoder layer.
        ranks: the rank of the bypass beside each block, by the block's path inside the layer.
        hidden: the hidden size.
    """
    for path, rank in ranks.items():
        block: Any = layer.get_submodule(path)  # Any: nn.Module declares every attribute to be a tensor or module
        like = next(block.parameters())
        for name, shape in (("bypass_in", (rank, hidden)), ("bypass_out", (hidden, rank))):
            setattr(block, name, nn.Parameter(torch.zeros(shape, dtype=like.dtype, device=like.device)))
        block.register_forward_hook(_add_bypass, with_kwargs=True)


def _add_bypass(block: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Any:
    states = args[0] if args else kwargs["hidden_states"]  # (rows, width, hidden), as what is added
    added = functional.linear(functional.linear(states, block.bypass_in), block.bypass_out)
    return (output[0] + added, *output[1:]) if isinstance(output, tuple) else output + added


def _times(factor: float, _: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output * factor


class LayerConfig:
    """A model's config as one layer sees it: with the layer's own widths, and everything else from the model.

    transformers' own `config.per_layer_config[index]` is a copy. This is a view, so that a later change of the model's
    config (of its attention implementation, say) reaches the layer too.

    Args:
        config: the model's config.
        widths: the layer's own values, by their keys in the config.
    """

    def __init__(self, config: "PreTrainedConfig", widths: Mapping[str, Any]) -> None:
        self.__dict__.update(widths)
        self.__dict__["_model_config"] = config

    def __getattr__(self, name: str) -> Any:
        """Called for all that is not a width."""
        if name.startswith("__"):  # copying and pickling ask for these before there is anything here
            raise AttributeError(name)
        return getattr(self.__dict__["_model_config"], name)


def show_widths_(part: nn.Module, config: "PreTrainedConfig", widths: Mapping[str, Any]) -> None:
    """Make all modules in a part of a model see some widths, in place.

    Some families' modules read a width from the config in each forward pass, and some keep it as an attribute. Models
    in the part, which have to have a real config, are left alone.

    Args:
        part: a decoder layer, or the whole model.
        config: the model's config.
        widths: the part's own values, by their keys in the config.
    """
    from transformers import PreTrainedModel

    view = LayerConfig(config, widths)
    for module in part.modules():
        if isinstance(module, PreTrainedModel):
            continue
        for key in widths.keys() & vars(module).keys():
            setattr(module, key, widths[key])
        if "config" in vars(module):
            setattr(module, "config", view)  # noqa: B010  nn.Module declares every attribute to be a tensor or module


def _narrow_linears(config: Any, layers: nn.ModuleList) -> Mapping[int, NarrowLinears]:
    """Return the linears of every narrowed layer, by the layer's index.

    A folder that was made before config.json had `narrow_linears` has only the layers' widths; all families of that
    time had the linears below.

    Args:
        config: the model's config.
        layers: the decoder layers of the full model.
    """
    if config.narrow_linears is not None:
        return {int(index): linears for index, linears in config.narrow_linears.items()}
    narrow: dict[int, NarrowLinears] = {}
    for index in map(int, config.to_dict().get("per_layer_config", {})):
        own = config.per_layer_config[index]
        hidden, channels = own.hidden_size, own.intermediate_size
        queries, keys = own.num_attention_heads * own.head_dim, own.num_key_value_heads * own.head_dim
        shapes = {
            "self_attn.q_proj": (queries, hidden),
            "self_attn.k_proj": (keys, hidden),
            "self_attn.v_proj": (keys, hidden),
            "self_attn.o_proj": (hidden, queries),
            "mlp.gate_proj": (channels, hidden),
            "mlp.up_proj": (channels, hidden),
            "mlp.down_proj": (hidden, channels),
        }
        compensated = ("self_attn.o_proj", "mlp.down_proj") if config.bias_compensation else ()
        narrow[index] = {
            path: (*shape, path in compensated or layers[index].get_submodule(path).bias is not None)
            for path, shape in shapes.items()
        }
    return narrow


def pack(kept: Tensor) -> Tensor:
    """Pack a mask into bits: (rows, columns) bool -> (rows, columns / 8) uint8. This is the inverse of `unpack`.

    Bit j of byte i is column 8 * i + j. The number of columns has to be a multiple of 8.
    """
    bits = kept.view(len(kept), -1, 8).to(torch.uint8)  # (rows, columns / 8, 8), each 0 or 1
    places = torch.arange(8, dtype=torch.uint8, device=kept.device)
    return (bits << places).sum(-1, dtype=torch.uint8)


def unpack(mask: Tensor) -> Tensor:
    """Unpack the bits of a mask: (rows, columns / 8) uint8 -> (rows, columns) bool. This is the inverse of `pack`."""
    bits = 1 << torch.arange(8, dtype=torch.uint8, device=mask.device)
    return (mask[..., None] & bits).ne(0).flatten(1)


def dense(values: Tensor, mask: Tensor) -> Tensor:
    """Make a dense weight, (rows, columns), of the values where the mask has a 1, row by row; it is zero elsewhere.

    Args:
        values: (count,), with as many values as the mask has ones.
        mask: (rows, columns / 8) uint8.
    """
    kept = unpack(mask)  # (rows, columns) bool
    return torch.zeros(kept.shape, dtype=values.dtype, device=values.device).masked_scatter_(kept, values)


class _SparseProduct(torch.autograd.Function):
    """x W^T, where the dense W is made from its values when it is needed, and never kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, linear: "SparseLinear") -> Tensor:
        # x: (..., in_features); weight: (count,)
        ctx.linear = linear
        ctx.save_for_backward(*([x] if ctx.needs_input_grad[1] else []))
        return functional.linear(x, dense(linear.values(), linear.mask))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (gradient,), linear = gradients, ctx.linear  # gradient: (..., out_features)
        by_x = by_values = None
        if ctx.needs_input_grad[0]:
            by_x = gradient @ dense(linear.values(), linear.mask).to(gradient.dtype)
        if ctx.needs_input_grad[1]:
            (x,) = ctx.saved_tensors
            by_weight = gradient.flatten(0, -2).T @ x.flatten(0, -2).to(gradient.dtype)  # (out_features, in_features)
            by_values = by_weight[unpack(linear.mask)].to(linear.weight.dtype)
        return by_x, by_values, None


class SparseLinear(nn.Linear):
    """A linear that holds only those of its weights that are not zero. PEFT only calls it, and takes it for a Linear.

    `weight` is (count,): the weights, row by row. `mask` is (out_features, in_features / 8) uint8, with one bit per
    place. Only the weights that are held get gradients.

    Args:
        like: the linear whose place it takes; it gets this one's sizes, bias, dtype and device.
        count: how many weights it holds.
    """

    mask: Tensor

    def __init__(self, like: nn.Linear, count: int) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = like.in_features, like.out_features
        place = like.weight.device
        self.weight = nn.Parameter(torch.zeros(count, dtype=like.weight.dtype, device=place))
        self.register_parameter("bias", like.bias)
        empty = torch.zeros(self.out_features, self.in_features // 8, dtype=torch.uint8, device=place)
        self.register_buffer("mask", empty)

    def values(self) -> Tensor:
        """Return the weights, (count,), in the dtype that the model computes in."""
        return self.weight

    def forward(self, x: Tensor) -> Tensor:
        """Return x W^T + bias: (..., in_features) -> (..., out_features)."""
        apply = cast(Callable[..., Tensor], _SparseProduct.apply)
        product = apply(x, self.weight, self)
        return product if self.bias is None else product + self.bias


def sparsify_layer_(layer: nn.Module, counts: Mapping[str, int]) -> None:
    """Replace linears of a decoder layer by sparse ones, in place.

    Args:
        layer: a decoder layer.
        counts: how many weights a linear holds, by its path inside the layer; what the layer lacks does not count.
    """
    for path in counts.keys() & dict(layer.named_modules()).keys():
        layer.set_submodule(path, SparseLinear(cast(nn.Linear, layer.get_submodule(path)), counts[path]))


def _of_the_full_model(validate: Callable[[Any], None]) -> Callable[[Any], None]:
    """Let one of transformers' checks of a config see the full model's widths, which divide each other."""

    @functools.wraps(validate)
    def check(self: Any) -> None:
        widths = self.__dict__.pop("_heterogeneity_spec", None)  # what `per_layer_config` sets
        try:
            validate(self)
        finally:
            if widths is not None:
                self.__dict__["_heterogeneity_spec"] = widths

    return check


def _pruned_config_class(base: Any, name: str) -> Any:
    checks = {check: _of_the_full_model(getattr(base, check)) for check in dir(base) if check.startswith("validate_")}
    body = {
        "__module__": __name__,
        "__doc__": f"{base.__name__} of a pruned model: see `modeling_loram` for the keys that it adds.",
        "__annotations__": {"bias_compensation": bool, "sparsity": dict | None, "narrow_linears": dict | None},
        "bias_compensation": False,  # whether the linears of narrowed layers that lost inputs have a bias for that
        "narrow_linears": None,  # {layer: {path of a linear: [out_features, in_features, whether it has a bias]}}
        "sparsity": None,  # {"layers": [first, one past the last], "values": {path of a linear: how many it holds}}
        "model_type": f"loram_{base.model_type}",
        **checks,
    }
    return strict(type(base)(name, (base,), body))


def _pruned_model_class(base: Any, config_class: Any, name: str) -> Any:
    def __init__(self: Any, config: Any) -> None:
        # The family's own constructor reads the global widths, which a config with per-layer widths refuses to tell.
        # So it first sees the config without them, or with those of the full model.
        full = config.to_dict()
        widths = full.pop("per_layer_config", {})
        config.per_layer_config = getattr(config, "full_per_layer_config", None)  # few families have the key
        own_widths = copy.copy(config).per_layer_config
        try:
            base.__init__(self, config)
        finally:
            config.per_layer_config = widths
        layers = self.get_decoder().layers
        for index in getattr(config, "dropped_layers", ()):  # the others' files do not have the key
            layers[index] = Identity()
        for index, linears in _narrow_linears(config, layers).items():
            resize_layer_(layers[index], linears)
        for index, norms in getattr(config, "narrow_norms", {}).items():  # only some families have the key
            resize_norms_(layers[int(index)], norms)
        for index, modules in getattr(config, "narrow_parameters", {}).items():  # here too
            resize_parameters_(layers[int(index)], modules)
        for index, ranks in getattr(config, "bypasses", {}).items():  # only some folders have the key
            add_bypasses_(layers[int(index)], ranks, config.hidden_size)
        if keys := config.per_layer_attributes:
            outside = {"per_layer_config": own_widths, **{key: full[key] for key in keys}}
            show_widths_(self, config, outside)  # for what is in no layer: rotary tables
            for own, layer in zip(config.per_layer_config, layers, strict=True):
                show_widths_(layer, config, {key: getattr(own, key) for key in keys})
        for index in range(*config.sparsity["layers"]) if config.sparsity else ():
            sparsify_layer_(layers[index], config.sparsity["values"])

    def from_pretrained(cls: Any, *arguments: Any, **options: Any) -> Any:
        teach_peft(base.config_class.model_type)
        return base.from_pretrained.__func__(cls, *arguments, **options)

    body = {
        "__module__": __name__,
        "__qualname__": name,
        "__doc__": f"{base.__name__} whose layers may differ in width, be sparse, or be gone, as `config` says.",
        "__init__": __init__,
        "from_pretrained": classmethod(from_pretrained),
        "config_class": config_class,
        "__annotations__": {"config": config_class},
    }
    return type(base)(name, (base,), body)


def teach_peft(family: str) -> None:
    """Let PEFT, where it is installed, choose the same default targets in pruned models as in full ones.

    PEFT looks them up by `model_type`, one table per kind of adapter, when the user names no `target_modules`.

    Args:
        family: the `model_type` of the full models.
    """
    try:
        from peft.utils import constants
    except ImportError:
        return
    for targets in vars(constants).values():
        if isinstance(targets, dict) and family in targets:
            targets[f"loram_{family}"] = targets[family]


def older_rope_keys(rope_parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return what transformers 4 reads rotary embeddings from, where transformers 5 has `rope_parameters` alone.

    transformers 4 passes over that key, in silence, and takes its default angles. transformers 5 reads these keys too.

    Args:
        rope_parameters: the value of that key: parameters, or parameters by the kind of attention.
    """
    shared = rope_parameters.get("full_attention", rope_parameters)
    keys = {key: shared[key] for key in ("rope_theta", "partial_rotary_factor") if key in shared}
    if shared.get("rope_type", "default") != "default":
        keys["rope_scaling"] = {key: value for key, value in shared.items() if key not in keys}
    if "rope_theta" in (local := rope_parameters.get("sliding_attention") or {}):
        keys["rope_local_base_freq"] = local["rope_theta"]
    return keys


def pruned_classes(model_class: str) -> "tuple[type[PreTrainedConfig], type[PreTrainedModel]]":
    """Return the (config class, model class) of the pruned models of a family; the same two at every call.

    Args:
        model_class: the name of transformers' class of full models: `LlamaForCausalLM`.

    Raises:
        ImportError: transformers is too old for a config with widths of its own per layer.
    """
    import transformers

    if tuple(map(int, transformers.__version__.split(".")[:2])) < _OLDEST_TRANSFORMERS:
        oldest = ".".join(map(str, _OLDEST_TRANSFORMERS))
        raise ImportError(f"pruned models need transformers >= {oldest}, and {transformers.__version__} is installed")
    config_name, model_name = f"Loram{model_class.partition('For')[0]}Config", f"Loram{model_class}"
    if model_name not in _classes:
        base = getattr(transformers, model_class)
        _classes[config_name] = _pruned_config_class(base.config_class, config_name)
        _classes[model_name] = _pruned_model_class(base, _classes[config_name], model_name)
    return _classes[config_name], _classes[model_name]


def wrapped_classes(wrapped_class: str) -> "tuple[type[PreTrainedConfig], type[PreTrainedModel]]":
    """Return the (config class, model class) of wrapped models with a pruned text model; the same two at every call.

    Args:
        wrapped_class: the name of transformers' class of full wrapped models: `Gemma3ForConditionalGeneration`.
    """
    import transformers

    model_name = f"Loram{wrapped_class}"
    config_name = f"{model_name}Config"
    if model_name not in _classes:
        base = getattr(transformers, wrapped_class)
        _classes[config_name] = _wrapped_config_class(base.config_class, config_name)
        body = {
            "__module__": __name__,
            "__qualname__": model_name,
            "__doc__": f"{base.__name__} around a pruned text model.",
            "config_class": _classes[config_name],
            "__annotations__": {"config": _classes[config_name]},
        }
        _classes[model_name] = type(base)(model_name, (base,), body)
    return _classes[config_name], _classes[model_name]


def _wrapped_config_class(base: Any, name: str) -> Any:
    def __post_init__(self: Any, **values: Any) -> None:
        if isinstance(self.text_config, dict):
            self.text_config = _text_config_class(self.text_config["architectures"][0])(**self.text_config)
        base.__post_init__(self, **values)

    body = {
        "__module__": __name__,
        "__doc__": f"{base.__name__} whose `text_config` is that of a pruned model.",
        "__annotations__": {},
        "__post_init__": __post_init__,
        "model_type": f"loram_{base.model_type}",
    }
    return strict(type(base)(name, (base,), body))


def _text_config_class(architecture: str) -> Any:
    """Return the config class of a pruned text model, of which AutoModel then knows the decoder.

    Args:
        architecture: the name of the class of the pruned text model: `LoramLlamaForCausalLM`.
    """
    from transformers import MODEL_MAPPING, AutoModel

    config_class: Any = pruned_classes(architecture.removeprefix("Loram"))[0]
    name = f"{architecture.partition('For')[0]}Decoder"
    if name not in _classes:
        full: Any = config_class.__base__
        decoder: Any = MODEL_MAPPING[full]
        _classes[name] = _pruned_model_class(decoder, config_class, name)
        AutoModel.register(config_class, _classes[name])
    return config_class


def register(model_classes: Iterable[str], wrapped: Iterable[str] = ()) -> None:
    """Make transformers' Auto classes know the pruned models of some families, so that they need no remote code.

    Args:
        model_classes: the names of transformers' classes of full models: `LlamaForCausalLM`, ...
        wrapped: those of its classes of full wrapped models: `Gemma3ForConditionalGeneration`, ...
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    for name in model_classes:
        _register(*pruned_classes(name), AutoModelForCausalLM)
    for name in wrapped:
        _register(*wrapped_classes(name), AutoModelForImageTextToText)


def _register(config_class: Any, model_class: Any, auto_class: Any) -> None:
    """Make the Auto classes know one pruned model."""
    from transformers import AutoConfig

    AutoConfig.register(config_class.model_type, config_class)
    auto_class.register(config_class, model_class)
    # so that `save_pretrained` of a loaded model writes this code beside the weights again
    config_class.register_for_auto_class()
    model_class.register_for_auto_class(auto_class.__name__)


_classes: dict[str, Any] = {}


def __getattr__(name: str) -> type:
    """Make a family's classes on first use (PEP 562): `LoramLlamaConfig`, `LoramLlamaForCausalLM`, ..."""
    wrapped = name.removeprefix("Loram").removesuffix("Config")
    if name != wrapped and wrapped.endswith("ForConditionalGeneration"):
        return {cls.__name__: cls for cls in wrapped_classes(wrapped)}[name]
    family = name.removeprefix("Loram").removesuffix("Config").removesuffix("ForCausalLM")
    if name in (f"Loram{family}Config", f"Loram{family}ForCausalLM"):
        return {cls.__name__: cls for cls in pruned_classes(f"{family}ForCausalLM")}[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
