"""Which files an argument means: what lies in a folder, and what a pattern finds. No file is opened here.

Hidden files and folders are left out without a word. A link is read where it leads to a file of the same folder (mounted
configuration is made of such links); links to folders are not followed, so there are no loops: what such a link leads to is
found under its own path, or lies outside.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from glob import glob as expand
from pathlib import Path
from typing import Final

from tierkv.errors import InputError

_MAGIC: Final = re.compile(r"[*?[]")
_ANY_DEPTH: Final = "**"


@dataclass(frozen=True, slots=True)
class Found:
    """A file in a folder. relative: its path from there, POSIX. reason: why it cannot be used, if that is known already."""

    relative: str
    reason: str | None = None


def walk(folder: Path, *, glob: str) -> list[Found]:
    """Files under a folder whose relative path matches, sorted. Raises InputError if the folder cannot be listed.

    glob: "**" is any number of folders, "*" stays within a name; without a slash it is matched against names at any depth.
    """
    pattern = glob.split("/") if "/" in glob else [_ANY_DEPTH, glob]
    found: list[Found] = []
    pending: list[tuple[str, ...]] = [()]
    root = folder.resolve()
    while pending:
        parts = pending.pop()
        try:
            with os.scandir(folder.joinpath(*parts)) as listing:
                entries = [entry for entry in listing if not entry.name.startswith(".")]
        except OSError as error:
            if not parts:
                raise InputError(f"{folder}: {error.strerror}; give a folder that can be listed") from None
            found.append(Found("/".join(parts), f"a folder that cannot be listed: {error.strerror}"))
            continue
        for entry in entries:
            path = (*parts, entry.name)
            if entry.is_dir(follow_symlinks=False):
                pending.append(path)
            elif _matches(path, pattern):
                found.append(Found("/".join(path), _reason(entry, root)))
    return sorted(found, key=lambda each: each.relative.split("/"))


def has_pattern(given: str) -> bool:
    """Whether there is something to expand in it, which the shell left alone."""
    return bool(_MAGIC.search(given))


def split_depth(given: str) -> tuple[Path, str] | None:
    """Folder and glob of a pattern with `**`; None if there is none, and the pattern is one for `matching`."""
    parts = Path(given).parts
    if _ANY_DEPTH not in parts:
        return None
    first = next(number for number, part in enumerate(parts) if _MAGIC.search(part))
    return Path(*parts[:first]), "/".join(parts[first:])


def matching(pattern: str) -> list[str]:
    """What a shell makes of a pattern without `**`, sorted."""
    return sorted(expand(pattern))  # noqa: PTH207  # pathlib's finds hidden files, a shell does not


def _matches(path: Sequence[str], pattern: Sequence[str]) -> bool:
    if not pattern:
        return not path
    if pattern[0] == _ANY_DEPTH:
        if len(pattern) == 1:
            return True
        return any(_matches(path[skip:], pattern[1:]) for skip in range(len(path)))
    return bool(path) and fnmatchcase(path[0], pattern[0]) and _matches(path[1:], pattern[1:])


def _reason(entry: "os.DirEntry[str]", root: Path) -> str | None:
    if not entry.is_symlink():
        return None if entry.is_file(follow_symlinks=False) else "not a regular file"
    try:
        target = Path(entry.path).resolve(strict=True)
    except (OSError, RuntimeError):  # RuntimeError: a loop, before Python 3.13
        return "a link that leads nowhere"
    if not target.is_relative_to(root):
        return "a link that leaves the folder"
    if target.is_dir():
        return "a link to a folder, which is not followed"
    return None if target.is_file() else "not a regular file"
