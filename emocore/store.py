"""Store: save and load Moments and Directions, one or a mapping by hook point, as safetensors or HDF5.

Both formats hold named tensors and one JSON text under the key "emocore": format version, kind, and per object its settings.
A mapping's tensors are named `<hook point>/<tensor>`, so names may hold spaces and hyphens only inside the JSON.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import h5py
import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from .directions import STREAM_TENSORS, Calibration, Directions, StreamReference
from .errors import ArgumentError, EmocoreError, StoreError
from .moments import Moments
from .publishing import publish
from .tokens import Tokens

FORMAT = 1
MAX_BYTES = 1 << 36  # of a file, before it is read
MAX_HEADER = 100 << 20

Stored: TypeAlias = Moments | Directions
Parts: TypeAlias = tuple[dict[str, Any], dict[str, Tensor]]


def save(obj: Stored | Mapping[str, Stored], path: str | os.PathLike[str]) -> None:
    """Save Moments or Directions, or a mapping of one of them by hook point, to `.safetensors` or `.h5`, durably.

    Raises StoreError naming path and errno when it cannot be written, and ArgumentError for other types or suffixes; a file
    saved there before survives both.

    >>> import tempfile; folder = Path(tempfile.mkdtemp())
    >>> m = Moments(); m.update(torch.ones(2, 3)); save(m, folder / "m.safetensors")
    >>> load(folder / "m.safetensors").mean.tolist()
    [1.0, 1.0, 1.0]
    """
    path = Path(path)
    pack = _format(path)[0]
    header: dict[str, Any] = {"format": FORMAT}
    tensors: dict[str, Tensor] = {}
    if isinstance(obj, (Moments, Directions)):
        header["kind"] = type(obj).__name__
        header["object"], tensors = _parts(obj)
    elif isinstance(obj, Mapping) and obj:
        kinds = {type(one).__name__ for one in obj.values()}
        if len(kinds) != 1 or not kinds <= {"Moments", "Directions"}:
            raise ArgumentError("obj: a mapping to save", expected="Moments or Directions, of one type", got=sorted(kinds))
        header["kind"], header["objects"] = kinds.pop(), {}
        for name, one in obj.items():
            if not name or "/" in name or "\0" in name or name in (".", ".."):
                raise ArgumentError("obj: hook point", expected="a name without '/' or NUL", got=repr(name))
            settings, parts = _parts(one)
            header["objects"][name] = settings
            tensors |= {f"{name}/{key}": t for key, t in parts.items()}
    else:
        raise ArgumentError(
            "obj: cannot be saved", expected="Moments, Directions, or a mapping of them", got=type(obj).__name__
        )
    publish(path, pack({k: t.detach().cpu().contiguous() for k, t in tensors.items()}, json.dumps(header)))


def load(path: str | os.PathLike[str]) -> Any:
    """Load what `save` wrote: Moments, Directions, or {hook point: one of them}.

    Raises StoreError, naming the file and what is wrong, for a missing, corrupt, foreign or newer file.
    """
    path = Path(path)
    unpack = _format(path)[1]
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise StoreError(f"{path}: too large to load whole", expected=f"at most {MAX_BYTES} bytes", got=size)
        data = path.read_bytes()
    except OSError as error:
        if isinstance(error, StoreError):
            raise
        raise StoreError(f"{path}: could not be read", got=error.strerror) from error
    try:
        text, tensors = unpack(data)
        header = json.loads(text)
        if header["format"] > FORMAT:
            raise StoreError(
                f"{path}: written by a newer emocore",
                expected=f"format {FORMAT} or older",
                got=header["format"],
                way_out="Upgrade emocore.",
            )
        build = {"Moments": _moments, "Directions": _directions}[header["kind"]]
        if "object" in header:
            return build(header["object"], tensors)
        return {
            name: build(settings, {k.partition("/")[2]: t for k, t in tensors.items() if k.startswith(f"{name}/")})
            for name, settings in header["objects"].items()
        }
    except EmocoreError:
        raise
    except Exception as error:
        raise StoreError(
            f"{path}: not a file that emocore saved, or damaged",
            got=f"{type(error).__name__}: {error}",
            way_out="Save it again from its source.",
        ) from error


# --- objects to tensors and settings, and back


def _parts(obj: Stored) -> Parts:
    if isinstance(obj, Moments):
        state = obj.state_dict()
        settings = state.pop("settings")
        return settings, {k: (t.reshape(1) if t.dim() == 0 else t) for k, t in state.items()}
    settings = {
        "names": list(obj.names),
        "mean_norm": obj.mean_norm,
        "hook_point": obj.hook_point,
        "tokens": _rule(obj.tokens),
        "provenance": dict(obj.provenance),
    }
    tensors = {n: getattr(obj, n) for n in ("patterns", "readers", "centre", "residual")}
    if (c := obj.calibration) is not None:
        settings["calibration"] = {"count": c.count, "tokens": _rule(c.tokens)}
        tensors |= {"calibration_mean": c.mean, "calibration_std": c.std}
        if c.stream is not None:
            settings["stream"] = {"alpha": c.stream.alpha, "window": c.stream.window}
            tensors |= {f"stream_{n}": getattr(c.stream, n) for n in STREAM_TENSORS}
    return settings, tensors


def _rule(tokens: Tokens | None) -> dict[str, Any] | None:
    return None if tokens is None else tokens.as_dict()


def _tokens(rule: Mapping[str, Any] | None) -> Tokens | None:
    return None if rule is None else Tokens(**rule)


def _moments(settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Moments:
    moments = Moments()
    scalars = {k: tensors[k].reshape(()) for k in ("count", "weight") if k in tensors}
    moments.load_state_dict({"settings": settings, **tensors, **scalars})
    return moments


def _directions(settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Directions:
    calibration = None
    if "calibration" in settings:
        stream = None
        if "stream" in settings:
            parts = {n: tensors[f"stream_{n}"] for n in STREAM_TENSORS}
            stream = StreamReference(settings["stream"]["alpha"], settings["stream"]["window"], **parts)
        calibration = Calibration(
            tensors["calibration_mean"],
            tensors["calibration_std"],
            settings["calibration"]["count"],
            _tokens(settings["calibration"]["tokens"]),
            stream,
        )
    return Directions(
        names=tuple(settings["names"]),
        patterns=tensors["patterns"],
        readers=tensors["readers"],
        centre=tensors["centre"],
        mean_norm=settings["mean_norm"],
        residual=tensors["residual"],
        hook_point=settings["hook_point"],
        tokens=_tokens(settings["tokens"]),
        calibration=calibration,
        provenance=settings["provenance"],
    )


# --- the two formats: tensors and a JSON text to bytes, and back


def _format(path: Path) -> tuple[Any, Any]:
    formats = {".safetensors": (_to_safetensors, _from_safetensors), ".h5": (_to_hdf5, _from_hdf5)}
    formats[".hdf5"] = formats[".h5"]
    if path.suffix not in formats:
        raise ArgumentError("path: suffix", expected=" or ".join(formats), got=repr(path.suffix))
    return formats[path.suffix]


def _to_safetensors(tensors: dict[str, Tensor], text: str) -> bytes:
    return safetensors.torch.save(tensors, metadata={"emocore": text})


def _from_safetensors(data: bytes) -> tuple[str, dict[str, Tensor]]:
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > min(MAX_HEADER, len(data) - 8):
        raise ValueError("the header is cut off")
    header = json.loads(data[8 : 8 + length], object_pairs_hook=_no_doubles)
    return header["__metadata__"]["emocore"], safetensors.torch.load(data)


def _no_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({k for k, _ in pairs}) != len(pairs):
        raise ValueError("the header holds a key twice")
    return dict(pairs)


def _to_hdf5(tensors: dict[str, Tensor], text: str) -> bytes:
    # built in memory, because h5py on a live disk loses data when the disk fills
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        file.attrs["emocore_format"] = FORMAT
        file.create_dataset("emocore", data=np.frombuffer(text.encode(), dtype=np.uint8))
        for name, t in tensors.items():
            file.create_dataset(f"tensors/{name}", data=t.numpy())
    return buffer.getvalue()


def _from_hdf5(data: bytes) -> tuple[str, dict[str, Tensor]]:
    tensors: dict[str, Tensor] = {}
    with h5py.File(io.BytesIO(data), "r") as file:
        budget = len(data)
        for name in _datasets(file):
            dataset = file[name]
            plain = dataset.id.get_create_plist()
            if plain.get_external_count() or dataset.is_virtual or dataset.nbytes > budget:
                raise ValueError(f"dataset {name!r} does not hold its own data")
            budget -= dataset.nbytes
            if name.startswith("tensors/"):
                tensors[name.removeprefix("tensors/")] = torch.from_numpy(dataset[()])
        text = bytes(file["emocore"][()]).decode()
    return text, tensors


def _datasets(group: h5py.Group, prefix: str = "") -> list[str]:
    """Names of every dataset below `group`, refusing soft and external links."""
    names: list[str] = []
    for key in group:
        if not isinstance(group.get(key, getlink=True), h5py.HardLink):
            raise ValueError(f"{prefix}{key} is a link")
        item = group[key]
        names += _datasets(item, f"{prefix}{key}/") if isinstance(item, h5py.Group) else [prefix + key]
    return names
