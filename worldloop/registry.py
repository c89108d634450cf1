"""Lazy tables: a name stands for "module:Class" and is imported on first use::

BACKENDS = Table("backend", {"eager": "worldloop.engine.backends.eager:Eager"})
resolve(BACKENDS, "eager")              # imports and returns the class
resolve(BACKENDS, "my_pkg.trt:Fast")    # out of tree: no entry needed
"""

import importlib
from collections.abc import Mapping
from typing import Any

from worldloop.errors import UserError


class Table(dict[str, str]):
    """A table name -> "module:attribute" that knows what its entries are called."""

    def __init__(self, kind: str, entries: Mapping[str, str]) -> None:
        super().__init__(entries)
        self.kind = kind


def load(target: str) -> Any:
    """Import `"pkg.mod:attr"` and return the attribute."""
    module_name, separator, attribute = target.partition(":")
    if not (module_name and separator and attribute):
        raise UserError(f"{target!r} is not of the form 'package.module:Name'")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not (module_name + ".").startswith(error.name + "."):
            raise  # a dependency of that module is missing: its own message says which
        raise UserError(f"{target!r}: no module named {error.name!r}") from error
    try:
        value: Any = module
        for part in attribute.split("."):
            value = getattr(value, part)
    except AttributeError as error:
        raise UserError(f"{target!r}: module {module_name} has no {attribute!r}") from error
    return value


def resolve(table: Mapping[str, str], name: str) -> Any:
    """The object that `name` stands for: a key of `table`, or any "pkg.mod:Class"."""
    if name in table:
        return load(table[name])
    if ":" in name:
        return load(name)
    kind = table.kind if isinstance(table, Table) else "name"
    known = ", ".join(sorted(table)) or "none"
    raise UserError(
        f"unknown {kind} {name!r}; known: {known}; or give your own as 'package.module:Name'"
    )
