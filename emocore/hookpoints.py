"""Hook points: from "model.layers.20", globs or layer numbers to modules, and how to read what they return."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

from torch import Tensor, nn

from .errors import ArgumentError, CaptureError, HookPointError, near

HookSpec: TypeAlias = str | int | Iterable[str | int]

# Where the transformer blocks stand in the common architectures, most specific first.
BLOCK_PATHS = (
    "language_model.model.layers",
    "model.language_model.layers",
    "language_model.layers",
    "model.decoder.layers",
    "model.layers",
    "decoder.layers",
    "transformer.h",
    "gpt_neox.layers",
    "transformer.blocks",
    "bert.encoder.layer",
    "encoder.layer",
    "encoder.layers",
    "layers",
    "h",
)

# Fields that hold the hidden state, in the order they are looked for.
HIDDEN_FIELDS = ("last_hidden_state", "hidden_states", "hidden_state", "hidden", "output")


def block_names(model: nn.Module) -> list[str]:
    """Names of the model's transformer blocks in order: block i is 0-based and its output is `hidden_states[i+1]`.

    Raises HookPointError where no list of blocks is found.

    >>> block_names(nn.ModuleDict({"layers": nn.ModuleList([nn.Identity(), nn.Identity()])}))
    ['layers.0', 'layers.1']
    """
    modules = dict(model.named_modules())
    for path in BLOCK_PATHS:
        blocks = modules.get(path)
        if isinstance(blocks, nn.ModuleList) and len(blocks):
            return [f"{path}.{i}" for i in range(len(blocks))]
    lists = [(name, m) for name, m in modules.items() if isinstance(m, nn.ModuleList) and len(m)]
    if not lists:
        raise HookPointError(
            f"model: no list of transformer blocks found in {type(model).__name__}",
            way_out="Name the hook points instead of numbering them.",
        )
    path, blocks = max(lists, key=lambda item: len(item[1]))
    return [f"{path}.{i}" for i in range(len(blocks))]


def resolve(model: nn.Module, spec: HookSpec) -> dict[str, nn.Module]:
    """Modules of `model` named by `spec`, in the model's own order.

    `spec` is a module name, a glob over dotted parts (`*` one part, `**` any number), a block number (negative from the
    end), or a list of these. Raises HookPointError naming near matches.

    >>> model = nn.ModuleDict({"layers": nn.ModuleList([nn.Identity(), nn.Identity()])})
    >>> list(resolve(model, "layers.*")), list(resolve(model, -1))
    (['layers.0', 'layers.1'], ['layers.1'])
    """
    specs = [spec] if isinstance(spec, (str, int)) else list(spec)
    modules = dict(model.named_modules())
    wanted: set[str] = set()
    for one in specs:
        if isinstance(one, bool) or not isinstance(one, (str, int)):
            raise HookPointError("hook point", expected="a module name, a glob or a block number", got=repr(one))
        wanted.update(_match(model, modules, one))
    if not wanted:
        raise HookPointError("hook point: none given", way_out="Give at least one module name, glob or block number.")
    return {name: module for name, module in modules.items() if name in wanted}


def model_id(model: nn.Module) -> str:
    """What a model is, for telling whose vectors are whose: its class and the sizes of its configuration.

    >>> model_id(nn.Linear(3, 4))
    'Linear'
    """
    config = _text_config(model)
    sizes = [
        f"{name}={value}"
        for name in ("hidden_size", "num_hidden_layers", "vocab_size")
        if isinstance(value := getattr(config, name, None), int)
    ]
    return f"{type(model).__name__}({', '.join(sizes)})" if sizes else type(model).__name__


def check_model(model: nn.Module, made_for: str | None, what: str) -> None:
    """Raise ArgumentError unless `what` was made for such a model; a base model and its heads are one."""
    here = model_id(model)
    if made_for is None or "(" not in made_for or "(" not in here:
        return
    if made_for.partition("(")[2] != here.partition("(")[2]:
        raise ArgumentError(
            f"{what}: made for another model", expected=here, got=made_for, way_out="Derive them for this model."
        )


def refuse_compiled(model: nn.Module, what: str) -> None:
    """Raise CaptureError for a model that was compiled: torch ignores hooks that come after its first run.

    >>> refuse_compiled(nn.Linear(3, 4), "capture")
    """
    compiled = hasattr(model, "_orig_mod") or any(
        getattr(module, "_compiled_call_impl", None) is not None for module in model.modules()
    )
    if compiled:
        raise CaptureError(
            f"{what}: the model is compiled already, and hooks added now would never run",
            way_out="Open it on the plain model first, and compile that inside the `with` block.",
        )


def token_ids(model: nn.Module, *kinds: str) -> frozenset[int]:
    """Ids of the model's special tokens of some kinds, "pad" or "eos", as far as its configuration names them.

    >>> token_ids(nn.Linear(3, 4), "pad", "eos")
    frozenset()
    """
    found: set[int] = set()
    for config in (_text_config(model), getattr(bare(model), "generation_config", None)):
        for kind in kinds:
            ids = getattr(config, f"{kind}_token_id", None)
            found.update(ids if isinstance(ids, (list, tuple)) else () if ids is None else (ids,))
    return frozenset(found)


def bare(model: nn.Module) -> nn.Module:
    """The model inside a wrapper for data parallelism; else the model."""
    while isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        model = model.module
    return model


def _text_config(model: nn.Module) -> Any:
    """The model's configuration; of one with several towers, that of its text model."""
    config = getattr(bare(model), "config", None)
    text = getattr(config, "get_text_config", None)
    return text() if callable(text) else config


def _match(model: nn.Module, modules: Mapping[str, nn.Module], spec: str | int) -> list[str]:
    if isinstance(spec, int):
        blocks = block_names(model)
        if not -len(blocks) <= spec < len(blocks):
            raise HookPointError(
                "hook point: block number out of range",
                expected=f"-{len(blocks)} .. {len(blocks) - 1}",
                got=spec,
                way_out=f"{type(model).__name__} has {len(blocks)} blocks, {blocks[0]} .. {blocks[-1]}.",
            )
        return [blocks[spec]]
    if spec in modules:
        return [spec]
    found = [name for name in modules if name and _glob(spec).fullmatch(name)] if "*" in spec else []
    if not found:
        alias = dict(model.named_modules(remove_duplicate=False)).get(spec)
        if alias is not None:
            name = next(name for name, module in modules.items() if module is alias)
            raise HookPointError(
                f"hook point {spec!r}: is the shared module {name!r} under another name",
                way_out=f"Name {name!r}, and give capture(fires=...) for how often it runs.",
            )
        raise HookPointError(
            f"hook point {spec!r}: no such module in {type(model).__name__}",
            way_out=near(spec, [name for name in modules if name]),
        )
    return found


def _glob(pattern: str) -> re.Pattern[str]:
    parts = re.split(r"(\*\*|\*)", pattern)
    return re.compile("".join({"**": r".+", "*": r"[^.]+"}.get(p, re.escape(p)) for p in parts))


def _hidden_field(output: Any) -> tuple[Any, Tensor]:
    """Key of the hidden state inside a container, and the tensor."""
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(output, Tensor):
        items = [(None, output)]
    elif isinstance(output, (tuple, list)):
        items = enumerate(output)
    elif isinstance(output, Mapping):
        items = [(k, output[k]) for k in sorted(output, key=_by_name)]
    elif dataclasses.is_dataclass(output) and not isinstance(output, type):
        names = sorted((f.name for f in dataclasses.fields(output)), key=_by_name)
        items = [(name, getattr(output, name)) for name in names]
    for key, value in items:
        if isinstance(value, Tensor) and value.is_floating_point() and value.ndim >= 2:
            return key, value
    raise HookPointError(
        "hook point: no hidden state in the module's output",
        expected="a floating point tensor [..., D], alone or in a tuple, dict or dataclass",
        got=f"{output.dtype} {list(output.shape)}" if isinstance(output, Tensor) else type(output).__name__,
        way_out="Choose a module whose output is the residual stream, such as a transformer block.",
    )


def _by_name(key: Any) -> int:
    """Fields that are known to hold the hidden state come first, the others in their own order."""
    return HIDDEN_FIELDS.index(key) if key in HIDDEN_FIELDS else len(HIDDEN_FIELDS)


def read_output(output: Any) -> Tensor:
    """The hidden state [..., D] in a module's output: the tensor itself, or the first fitting one in its container.

    A DTensor that every rank holds whole is read as the local tensor. Raises HookPointError where there is no hidden
    state, or only a shard of one.

    >>> import torch
    >>> read_output((torch.zeros(1, 2, 3), None)).shape
    torch.Size([1, 2, 3])
    """
    hidden = _hidden_field(output)[1]
    placements = getattr(hidden, "placements", None)  # of a DTensor
    if placements is None:
        return hidden
    if not all(p.is_replicate() for p in placements):
        raise HookPointError(
            "hook point: the hidden state is sharded over ranks",
            expected="a tensor that every rank holds whole",
            got=placements,
            way_out="Choose a module whose output is gathered: a block, without sequence parallelism.",
        )
    local: Tensor = hidden.to_local()  # type: ignore[attr-defined]
    return local


def replace_output(output: Any, hidden: Tensor) -> Any:
    """`output` with its hidden state replaced, in a container of the same kind; the original is left as it was."""
    key, before = _hidden_field(output)
    whole: Any = before
    if hasattr(whole, "placements"):
        hidden = type(whole).from_local(hidden, whole.device_mesh, whole.placements)
    if isinstance(output, Tensor):
        return hidden
    if isinstance(output, (tuple, list)):
        values = [hidden if i == key else v for i, v in enumerate(output)]
        return type(output)(*values) if hasattr(output, "_fields") else type(output)(values)
    if isinstance(output, Mapping):
        new: Any = copy.copy(output)
        new[key] = hidden
        return new
    return dataclasses.replace(output, **{key: hidden})
