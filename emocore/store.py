"""Store: save and load Moments and Directions, one or a mapping by hook point, as safetensors or HDF5.

Both formats hold named tensors, `<hook point>/<tensor>` for a mapping, and one JSON text: format version, kind, and the
settings of every object. Labels stand only in the JSON, so they may hold any character.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .auditing import Audit, verify
from .calibration import Calibration, StreamReference
from .directions import ByHookPoint, Directions
from .errors import ArgumentError, StoreError, said
from .exporting import to_hdf5
from .formats import FORMATS, MAX_TEXT, Format, parse
from .importing import from_hdf5
from .joining import join
from .moments import Moments
from .precision import FLOATS
from .publishing import previous_of, publish
from .replaying import activations
from .sums import Sums
from .tokens import Tokens

__all__ = ["Audit", "from_hdf5", "join", "load", "save", "to_hdf5", "verify"]

FORMAT = 1
MAX_BYTES = 1 << 36  # of a file, before it is read

Stored: TypeAlias = Moments | Directions
Parts: TypeAlias = tuple[dict[str, Any], dict[str, Tensor]]

STREAM = ("mean", "std", "largest")
ROW_DTYPES = [str(dtype).removeprefix("torch.") for dtype in FLOATS]


def save(obj: Stored | Mapping[str, Stored], path: str | os.PathLike[str]) -> None:
    """Save Moments or Directions, or a mapping of one of them by hook point, to `.safetensors` or `.h5`, durably.

    Whatever file was at `v.safetensors` is kept as `v.previous.safetensors`, in the place of the one kept before; a
    file that cannot be kept is not replaced. Raises StoreError naming path and errno when it cannot be written, and
    ArgumentError for other types or suffixes; a file saved there before survives both.

    >>> import tempfile; folder = Path(tempfile.mkdtemp())
    >>> m = Moments(); m.update(torch.ones(2, 3)); save(m, folder / "m.safetensors")
    >>> load(folder / "m.safetensors").mean.tolist()
    [1.0, 1.0, 1.0]
    """
    path = Path(path)
    form = _format(path)
    header: dict[str, Any]
    if isinstance(obj, (Moments, Directions)):
        settings, tensors = _parts(obj)
        header = {"format": FORMAT, "kind": _kind(obj), "object": settings}
    else:
        header, tensors = {"format": FORMAT, "kind": _kind_of_all(obj), "objects": {}}, {}
        for name, one in obj.items():
            header["objects"][name], parts = _parts(one)
            tensors |= {f"{name}/{key}": t for key, t in parts.items()}
    data = form.pack({k: t.detach().cpu().contiguous() for k, t in tensors.items()}, _text(header))
    publish(path, data, previous_of(path))


def load(path: str | os.PathLike[str]) -> Any:
    """Load what `save` wrote: Moments, Directions, or {hook point: one of them}; of a folder, its `activations`.

    Raises StoreError, naming the file and what is wrong, for a missing, corrupt, foreign or newer file; of one that is
    damaged it names the file that `save` has kept from before, where that is whole.
    """
    path = Path(path)
    if path.suffix not in FORMATS and path.is_dir():
        return activations(path)
    form = _format(path)
    try:
        return _loaded(path, form)
    except StoreError:
        raise
    except Exception as error:
        raise StoreError(
            f"{path}: not a file that emocore saved, or damaged",
            got=f"{type(error).__name__}: {error}",
            way_out=_way_back(previous_of(path), form),
        ) from error


def _loaded(path: Path, form: Format) -> Any:
    """Raises StoreError where it can say what is wrong, and anything else for what is not whole."""
    text, tensors = form.unpack(_read(path))
    return _built(path, parse(text), tensors)


def _way_back(previous: Path, form: Format) -> str:
    try:
        _loaded(previous, form)
    except Exception:
        return "Save it again from its source."
    return f"Save it again from its source, or load {previous}, which is what was saved there before."


def _format(path: Path) -> Format:
    if path.suffix not in FORMATS:
        raise ArgumentError("path: suffix", expected=" or ".join(FORMATS), got=repr(path.suffix))
    return FORMATS[path.suffix]


def _kind(obj: Any) -> str:
    for kind in (Moments, Directions):
        if isinstance(obj, kind):
            return kind.__name__
    raise ArgumentError(
        "obj: cannot be saved", expected="Moments, Directions, or a mapping of them", got=type(obj).__name__
    )


def _kind_of_all(several: Any) -> str:
    """The one kind of a mapping's values, whose keys can name tensors; raises ArgumentError."""
    if not isinstance(several, Mapping) or not several:
        _kind(several)
    kinds = {_kind(one) for one in several.values()}
    if len(kinds) > 1:
        raise ArgumentError("obj: a mapping to save", expected="objects of one type", got=sorted(kinds))
    for name in several:
        if not isinstance(name, str) or not name or "/" in name or "\0" in name or name == ".":
            raise ArgumentError("obj: hook point", expected="a name without '/' or NUL", got=repr(name))
    return kinds.pop()


def _text(header: dict[str, Any]) -> str:
    try:
        text = json.dumps(header)
    except (TypeError, ValueError) as error:
        raise ArgumentError("obj: its provenance must be JSON", got=str(error)) from error
    if len(text) > MAX_TEXT // 2:  # safetensors quotes it once more
        raise ArgumentError("obj: names and provenance", expected=f"at most {MAX_TEXT // 2} bytes", got=len(text))
    return text


def _read(path: Path) -> bytes:
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise StoreError(f"{path}: not a regular file")
        if found.st_size > MAX_BYTES:
            raise StoreError(f"{path}: too large", expected=f"at most {MAX_BYTES} bytes", got=found.st_size)
        return path.read_bytes()
    except StoreError:
        raise
    except OSError as error:
        raise StoreError(f"{path}: could not be read", got=said(error)) from error


def _built(path: Path, header: dict[str, Any], tensors: dict[str, Tensor]) -> Any:
    version = _whole(header["format"])
    if version > FORMAT:
        raise StoreError(
            f"{path}: written by a newer emocore",
            expected=f"format {FORMAT} or older",
            got=version,
            way_out="Upgrade emocore.",
        )
    build: Any = {"Moments": _moments, "Directions": _directions}[header["kind"]]
    if "object" in header:
        return build(header["object"], tensors)
    parts: dict[str, dict[str, Tensor]] = {name: {} for name in header["objects"]}
    for key, t in tensors.items():
        name, _, part = key.partition("/")
        parts[name][part] = t
    found = {name: build(settings, parts[name]) for name, settings in header["objects"].items()}
    return ByHookPoint(found) if header["kind"] == "Directions" else found


# --- objects to settings and tensors


def _parts(obj: Stored) -> Parts:
    if isinstance(obj, Moments):
        state = obj.state_dict()
        return state.pop("settings"), state
    settings: dict[str, Any] = {
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
        if (s := c.stream) is not None:
            settings["stream"] = {"alpha": s.alpha, "window": s.window, "count": s.count}
            tensors |= {f"stream_{n}": getattr(s, n) for n in STREAM}
    return settings, tensors


def _rule(tokens: Tokens | None) -> dict[str, Any] | None:
    return None if tokens is None else tokens.as_dict()


# --- and back, trusting nothing


def _moments(settings: dict[str, Any], tensors: dict[str, Tensor]) -> Moments:
    if settings["dtype"] not in (None, *ROW_DTYPES):
        raise ValueError(f"rows of {settings['dtype']!r}")
    moments = Moments(
        [_word(label) for label in settings["labels"]] or None,
        _switch(settings["covariance"]),
        block_rows=_whole(settings["block_rows"]),
    )
    _whole(settings["norm_count"])
    _switch(settings["frozen"])
    _check_counts(settings["ledger"])
    shapes: dict[str, Tensor] = {"norm_sum": torch.zeros(1, dtype=torch.float64)}
    if "shift" in tensors:
        (dim,) = tensors["shift"].shape
        shapes |= Sums.zeros(dim, len(moments.labels), moments.keeps_covariance, "meta").tensors()
    _check_like(tensors, shapes)
    moments.load_state_dict({"settings": settings, **tensors})
    return moments


def _check_like(tensors: Mapping[str, Tensor], shapes: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless exactly these tensors are there, of these shapes and dtypes."""
    if tensors.keys() != shapes.keys():
        raise ValueError(f"tensors {sorted(tensors.keys() ^ shapes.keys())} are missing or unknown")
    for name, t in tensors.items():
        like = shapes[name]
        if t.shape != like.shape or t.dtype != like.dtype:
            raise ValueError(f"{name} is {t.dtype} {list(t.shape)}, not {like.dtype} {list(like.shape)}")


def _check_counts(counts: Mapping[str, Any]) -> None:
    for value in counts.values():
        if isinstance(value, Mapping):
            _check_counts(value)
        else:
            _whole(value)


def _directions(settings: dict[str, Any], tensors: dict[str, Tensor]) -> Directions:
    tensors, calibration = dict(tensors), None
    if "calibration" in settings:
        calibration = _calibration(settings, tensors)
    vectors = {n: tensors.pop(n) for n in ("patterns", "readers", "centre", "residual")}
    if tensors:
        raise ValueError(f"tensors {sorted(tensors)} are unknown")
    hook_point = settings["hook_point"]
    return Directions(
        names=tuple(_word(name) for name in settings["names"]),
        **vectors,
        mean_norm=float(settings["mean_norm"]),
        hook_point=None if hook_point is None else _word(hook_point),
        tokens=_tokens(settings["tokens"]),
        calibration=calibration,
        provenance=dict(settings["provenance"]),
    )


def _calibration(settings: dict[str, Any], tensors: dict[str, Tensor]) -> Calibration:
    """The calibration, taken out of `tensors`."""
    stream = None
    if "stream" in settings:
        given = settings["stream"]
        parts = {n: tensors.pop(f"stream_{n}") for n in STREAM}
        stream = StreamReference(float(given["alpha"]), _whole(given["window"]), _whole(given["count"]), **parts)
    mean, std = tensors.pop("calibration_mean"), tensors.pop("calibration_std")
    given = settings["calibration"]
    return Calibration(mean, std, _whole(given["count"]), _tokens(given["tokens"]), stream)


def _tokens(rule: Mapping[str, Any] | None) -> Tokens | None:
    return None if rule is None else Tokens(**rule)


def _whole(value: Any) -> int:
    if type(value) is not int:
        raise ValueError(f"{value!r} is not a whole number")
    return value


def _switch(value: Any) -> bool:
    if type(value) is not bool:
        raise ValueError(f"{value!r} is not true or false")
    return value


def _word(value: Any) -> str:
    if type(value) is not str:
        raise ValueError(f"{value!r} is not a name")
    return value
