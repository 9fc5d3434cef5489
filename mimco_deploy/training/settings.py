"""Settings as text and as JSON: `--set section.field=value`, and the `config.json` of a checkpoint."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable, Iterator
from typing import Any, Literal, TypeVar, cast

from mimco_deploy.errors import ConfigError

ConfigT = TypeVar("ConfigT")


def apply_settings(config: ConfigT, settings: Iterable[str]) -> ConfigT:
    """Replace fields by `section.field=value` settings, each value read as the field's own type.

    Raises:
        ConfigError: an unknown key, answered with the nearest one, or a value of another type.
    """
    for setting in settings:
        key, separator, text = setting.partition("=")
        if not separator:
            raise ConfigError(f"--set {setting}", expected="--set section.field=value")
        config = _replace(config, key, key.split("."), text)
    return config


def differences(ours: Any, theirs: Any) -> Iterator[tuple[str, Any, Any]]:
    """Keys at which two configs differ, with both values."""
    a, b = dict(leaves(ours)), dict(leaves(theirs))
    for key in [*a, *(key for key in b if key not in a)]:
        if a.get(key) != b.get(key):
            yield key, a.get(key), b.get(key)


def leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting of a config with its whole key."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", value


def to_document(config: Any) -> dict[str, Any]:
    """A config as plain JSON types."""
    return dataclasses.asdict(config)


def from_document(kind: type[ConfigT], document: dict[str, Any]) -> ConfigT:
    """The inverse of `to_document`.

    Raises:
        ConfigError: a key is missing or unknown.
    """
    hints = typing.get_type_hints(kind)
    if set(document) != set(hints):
        raise ConfigError(f"{kind.__name__} with {sorted(document)}", expected=f"exactly {sorted(hints)}")
    return kind(**{name: _from_json(hint, document[name]) for name, hint in hints.items()})


def _from_json(hint: Any, value: Any) -> Any:
    if isinstance(hint, types.UnionType):
        hint = _named(hint, value.get("name"))
    return from_document(cast(Any, hint), value) if dataclasses.is_dataclass(hint) else _as_tuple(value)


def _named(union: Any, name: Any) -> Any:
    """Of several methods' settings, the class whose `name` it is."""
    kinds = {member.name: member for member in typing.get_args(union)}
    if name not in kinds:
        raise ConfigError(f"method {name}", expected=f"one of {', '.join(sorted(kinds))}")
    return kinds[name]


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _replace(config: Any, whole_key: str, path: list[str], text: str) -> Any:
    hints = typing.get_type_hints(type(config))
    name, *rest = path
    if name not in hints or bool(rest) != dataclasses.is_dataclass(getattr(config, name)):
        prefix = whole_key.removesuffix(".".join(path))
        near = difflib.get_close_matches(whole_key, [key for key, _ in leaves(config, prefix)], n=1, cutoff=0.0)
        raise ConfigError(f"no setting {whole_key}", expected=f"one of the run's settings, nearest {near[0]}")
    value = _replace(getattr(config, name), whole_key, rest, text) if rest else _parse(hints[name], text, whole_key)
    return dataclasses.replace(config, **{name: value})


def _parse(hint: Any, text: str, key: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    try:
        if origin is tuple:
            parts = [_parse(arguments[0], part, key) for part in text.split(",") if part]
            if arguments[-1] is not Ellipsis and len(parts) != len(arguments):
                raise ValueError
            return tuple(parts)
        if origin is Literal:
            if text not in arguments:
                raise ValueError
            return text
        if hint is bool:
            return {"true": True, "false": False}[text.lower()]
        value = hint(text)
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError
        return value
    except (ValueError, KeyError) as error:
        several = "values" if arguments[-1:] == (Ellipsis,) else f"{len(arguments)} values"
        kind = {int: "a whole number", float: "a number", bool: "true or false"}.get(hint, str(hint))
        wanted = {Literal: " or ".join(map(str, arguments)), tuple: f"{several} with commas between"}.get(origin, kind)
        raise ConfigError(f"{key}={text}", expected=wanted) from error
