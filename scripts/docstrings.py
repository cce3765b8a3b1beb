"""Docstrings as the API pages need them: an extension of griffe, which `mkdocs.yml` names.

In the sources a reference is a role, :func:`segment_pool`, which `help` shows as it stands; here it becomes a link,
which must lead to something that a page shows. ``a, b: text`` under ``Args`` and the like becomes an entry for each,
and what is under ``Returns`` gets the annotation in front, lest griffe takes what is before its first colon for that.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(func|class|meth|attr|mod):`([\w.]+)`")
SECTION = re.compile(r"^((?:Args|Attributes|Raises):\n)((?: {4}.*\n?|\n)+)", re.MULTILINE)
#: A line of names, and the lines indented further.
ENTRY = re.compile(r"^ {4}(\w+(?:, \w+)+)(:.*(?:\n {5,}.*)*)\n?", re.MULTILINE)
RETURNS = re.compile(r"^(Returns:\n {4})(?=\S)", re.MULTILINE)


class Docstrings(griffe.Extension):
    """Rewrites the docstrings of a package once it is loaded."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        _rewrite(pkg, pkg)


def _rewrite(owner: Any, package: griffe.Module) -> None:
    if owner.docstring:
        text = SECTION.sub(lambda section: section[1] + ENTRY.sub(_one_each, section[2]), owner.docstring.value)
        if owner.is_function and owner.returns is not None:
            text = RETURNS.sub(lambda returns: f"{returns[1]}{owner.returns}: ", text)
        owner.docstring.value = ROLE.sub(lambda role: _link(role[1] == "mod", role[2], owner, package), text)
    for member in owner.members.values():
        if not member.is_alias and not member.is_private:
            _rewrite(member, package)


def _one_each(entry: re.Match[str]) -> str:
    return "".join(f"    {name}{entry[2]}\n" for name in entry[1].split(", "))


def _link(is_module: bool, target: str, owner: Any, package: griffe.Module) -> str:
    """A link to what a role names, looked for from its owner outwards, as Python looks for names."""
    shown = target.removeprefix(f"{package.name}.")
    scope = owner
    while scope is not None:
        found = _find(scope, shown if scope is package else target)
        if found is not None and found.is_module == is_module:
            # An attribute that has no docstring of its own stands in the table of its class.
            return f"[`{shown}`][{found.path}]" if found.has_docstring else f"`{shown}`"
        scope = scope.parent
    raise LookupError(f"{owner.path}: its docstring refers to {target}, which is not there")


def _find(scope: Any, target: str) -> Any:
    try:
        found = scope[target]
    except KeyError:
        return None
    return found.final_target if found.is_alias else found
