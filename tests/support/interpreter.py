"""Triton's interpreter without what it does over and over: kernels take half the time in it and give the same.

At a launch the interpreter replaces the functions of `triton.language` by its own, and restores them after it. Each
call of a device function within the launch searches the whole language again for functions to replace and finds none.
And at every operation the interpreter builds anew the table of numpy dtypes by Triton dtype. Both are done once here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class _NothingToRestore:
    def restore(self) -> None:
        pass


def do_once() -> None:
    """Change the interpreter of this process. Where Triton is missing or arranged in another way, it stays as it is."""
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    if not all(
        hasattr(interpreter, name)
        for name in ("GridExecutor", "_patch_lang", "_LangPatchScope", "_get_np_dtype")
    ):
        return
    _replace_the_language_once_a_launch(interpreter)
    interpreter._get_np_dtype = _remembered_by_name(interpreter)


def _replace_the_language_once_a_launch(interpreter: Any) -> None:
    launch, replace = interpreter.GridExecutor.__call__, interpreter._patch_lang
    languages = {"tl": interpreter.tl, "tl.core": interpreter.tl.core}
    needs: dict[Any, set[str]] = {}  # which of the two a kernel's module has
    replaced: set[str] | None = None  # which of them the launch under way has replaced; None between launches

    def launch_once(self: Any, *arguments: Any, **options: Any) -> None:
        nonlocal replaced
        outer, replaced = replaced, set()
        try:
            launch(self, *arguments, **options)
        finally:
            replaced = outer

    def replace_once(function: Any) -> Any:
        if replaced is None:
            return replace(function)
        if function not in needs:
            values = function.__globals__.values()
            needs[function] = {
                name for name, language in languages.items() if any(value is language for value in values)
            }
        needed = needs[function]
        if needed <= replaced:
            return _NothingToRestore()
        replaced.update(needed)
        return replace(function)

    interpreter.GridExecutor.__call__, interpreter._patch_lang = launch_once, replace_once


def _remembered_by_name(interpreter: Any) -> Callable[[Any], Any]:
    find, pointer, known = interpreter._get_np_dtype, interpreter.tl.pointer_type, {}

    def dtype(of: Any) -> Any:
        scalar = of.scalar
        if isinstance(scalar, pointer):
            return find(scalar)
        if scalar.name not in known:
            known[scalar.name] = find(scalar)
        return known[scalar.name]

    return dtype
