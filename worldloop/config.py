"""Frozen dataclasses to plain JSON and back, strictly: unknown keys and wrong types raise.

A config is a (nested) dataclass of bool, int, float, str, Path, Literal, Optional, Union,
tuple, list, dict[str, X] and further dataclasses.
"""

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, cast

from worldloop.errors import UserError
from worldloop.files import PathLike

T = TypeVar("T")


def positive(config: Any, *names: str, where: str = "") -> None:
    """Raise UserError naming a field that is below 1 (None is none); ``where`` goes before it."""
    for name in names:
        value = getattr(config, name)
        if value is not None and value < 1:
            raise UserError(f"{where}{name} is {value}; must be at least 1")


def config_to_dict(config: Any) -> dict[str, Any]:
    """A dataclass as plain JSON values (tuples become lists, paths strings)."""
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        raise TypeError(f"config: expected a dataclass instance, got {type(config).__name__}")
    return {f.name: _plain(getattr(config, f.name), f.name) for f in dataclasses.fields(config)}


def _plain(value: Any, where: str) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{where}.{key}") for key, item in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return config_to_dict(value)
    raise TypeError(f"{where}: {type(value).__name__} cannot be written to config.json")


def config_from_dict(cls: type[T], data: Mapping[str, Any], where: str = "config") -> T:
    """Build dataclass `cls` from plain values; every error names the key and the fix."""
    if not isinstance(data, Mapping):
        raise UserError(f"{where}: expected an object, got {data!r}")
    fields = {f.name: f for f in dataclasses.fields(cast(Any, cls)) if f.init}
    for key in data:
        if key not in fields:
            known = ", ".join(fields)
            raise UserError(
                f"{where}.{key}: unknown key of {cls.__name__}; known: {known}; "
                "remove it, or use the worldloop version that wrote it"
            )
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    for name, field in fields.items():
        if name in data:
            values[name] = _build(hints[name], data[name], f"{where}.{name}")
        elif field.default is field.default_factory is dataclasses.MISSING:
            raise UserError(f"{where}.{name}: missing key of {cls.__name__}; add it")
    try:
        return cls(**values)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error


def _build(hint: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        return _build_union(args, value, where)
    if origin is Literal:
        if value in args and any(value == a and type(value) is type(a) for a in args):
            return value
        raise UserError(f"{where}: {value!r} is not one of {', '.join(map(repr, args))}")
    if dataclasses.is_dataclass(hint):
        return config_from_dict(cast(type, hint), value, where)
    container = origin or hint
    if container in (tuple, list) and isinstance(value, list | tuple):
        return _build_sequence(container, args, value, where)
    if container in (dict, Mapping) and isinstance(value, Mapping):
        item = args[1] if args else Any
        return {str(key): _build(item, v, f"{where}.{key}") for key, v in value.items()}
    if hint is float and type(value) in (int, float):
        return float(value)
    if hint is Path and isinstance(value, str):
        return Path(value)
    if hint in (bool, int, str, type(None)) and type(value) is hint:
        return value
    if hint is None and value is None:
        return None
    raise UserError(f"{where}: expected {_name(hint)}, got {value!r}")


def _build_union(args: tuple[Any, ...], value: Any, where: str) -> Any:
    errors: list[UserError] = []
    for arm in args:
        try:
            return _build(arm, value, where)
        except UserError as error:
            errors.append(error)
    nested = [a for a in args if dataclasses.is_dataclass(a)]
    if len(nested) == 1 and isinstance(value, Mapping):
        raise errors[args.index(nested[0])]  # its message names the key inside
    raise UserError(f"{where}: expected {' or '.join(map(_name, args))}, got {value!r}")


def _build_sequence(
    container: type, args: tuple[Any, ...], value: list[Any] | tuple[Any, ...], where: str
) -> Any:
    if not args:
        return container(value)
    if container is list or args[-1] is Ellipsis:
        items = [args[0]] * len(value)
    elif len(args) != len(value):
        raise UserError(f"{where}: expected {len(args)} values, got {len(value)}")
    else:
        items = list(args)
    return container(
        _build(item, v, f"{where}[{i}]") for i, (item, v) in enumerate(zip(items, value))
    )


def _name(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)


def read_json(path: PathLike) -> dict[str, Any]:
    """Read a JSON object; the error names the file."""
    file = Path(path)
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{file}: no such file") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: not valid JSON ({error}); restore the file") from error
    if not isinstance(data, dict):
        raise UserError(f"{file}: expected a JSON object, found {type(data).__name__}")
    return data
