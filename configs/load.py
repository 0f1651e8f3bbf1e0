"""Settings from a YAML file and the command line.

    trfpp train configs/my_run.yaml optim.lr=2e-4 lora.rank=32
    trfpp train my_recipe --optim.lr 2e-4 --lora.rank 32

Both spellings of an override are the same. A bare name is a shipped recipe, `configs/<command>/<name>.yaml`. The
file is checked by pydantic, overrides and help are tyro's.
"""

from __future__ import annotations

import difflib
import json
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, TypeAdapter, ValidationError

from .schema import Settings

S = TypeVar("S", bound=Settings)

HERE = Path(__file__).parent


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 1e-4 as a string; people mean a number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


class SettingsError(ValueError):
    """A setting that is unknown, missing or wrong; the message is one sentence a line."""


def recipes(command: str) -> dict[str, Path]:
    """The shipped recipes of a command, by name."""
    return {path.stem: path for path in sorted((HERE / command).glob("*.yaml"))}


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file's settings as a dictionary.

    Raises:
        SettingsError: if it cannot be read or is no mapping.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        raise SettingsError(f"{path}: cannot be read: {error.strerror}.") from None
    except yaml.YAMLError as error:
        raise SettingsError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise SettingsError(f"{path}: must hold `key: value` lines, holds a {type(content).__name__}.")
    return content


def command_line(model: type[S], command: str, argv: Sequence[str]) -> S:
    """Settings of one command from its arguments: `[CONFIG] [key=value | --key value ...]`.

    Raises:
        SettingsError: for a bad file. A bad argument ends the program with a message, as does `--help`.
    """
    import tyro

    names = recipes(command)
    words = list(argv)
    file: Path | None = None
    if words and not words[0].startswith("-") and "=" not in words[0]:
        word = words.pop(0)
        file = names.get(word, Path(word))
        if word not in names and not file.is_file():
            near = difflib.get_close_matches(word, names, 1)
            hint = (
                f"did you mean the recipe {near[0]!r}?" if near else f"shipped recipes: {', '.join(names) or 'none'}."
            )
            raise SettingsError(f"{word}: no such file; {hint}")
    default: Any = tyro.MISSING_NONPROP if file is None else _from_file(model, read_yaml(file), str(file))
    settings: S = tyro.cli(
        model,
        args=[token for word in words for token in _as_flags(model, word)],
        default=default,
        prog=f"trfpp {command}",
        description=_description(model, command, names),
        config=(tyro.conf.AvoidSubcommands,),
        use_underscores=True,
    )
    return settings


def _description(model: type[Settings], command: str, names: Mapping[str, Path]) -> str:
    lines = [model.__doc__ or "", "", f"usage: trfpp {command} [CONFIG] [key=value ...]"]
    lines += ["CONFIG is a YAML file" + (f" or a recipe: {', '.join(names)}." if names else ".")]
    return "\n".join(lines)


def _as_flags(model: type[Settings], word: str) -> list[str]:
    """`a.b=1` as `--a.b=1`; a YAML list becomes several words, and a switch `--a.b` or `--a.no-b`."""
    match = re.fullmatch(r"([A-Za-z_][\w.]*)=(.*)", word, flags=re.DOTALL)
    if not match:
        return [word]
    key, text = match.groups()
    if text.startswith("["):
        return [f"--{key}", *(str(item) for item in yaml.load(text, Loader=_Loader))]
    if text.lower() in ("true", "false") and dict(_fields(model)).get(key) is bool:
        path, _, leaf = key.rpartition(".")
        return [f"--{path}{'.' if path else ''}{'' if text.lower() == 'true' else 'no-'}{leaf}"]
    return [f"--{key}={'None' if text == 'null' else text}"]


def _from_file(model: type[S], values: Mapping[str, Any], where: str) -> Any:
    """`model` holding a file's values, not validated as a whole: the command line may still add to it.

    Required fields that the file leaves out carry tyro's mark for a missing value.

    Raises:
        SettingsError: one sentence for each wrong key, with the nearest valid one.
    """
    import tyro

    content: dict[str, Any] = {}
    errors: list[str] = []
    for name, value in values.items():
        field = model.model_fields.get(name)
        if field is None:
            errors.append(_sentence(model, {"loc": (name,), "type": "extra_forbidden"}, where))
            continue
        annotation: Any = typing.Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation
        try:
            # JSON mode is strict about types, yet takes a list for a tuple and a string for a path, as YAML has them.
            content[name] = TypeAdapter(annotation).validate_json(json.dumps(value, default=str), strict=True)
        except ValidationError as error:
            errors += [_sentence(model, {**e, "loc": (name, *e["loc"])}, where) for e in error.errors()]
    if errors:
        raise SettingsError("\n".join(errors))
    for name, field in model.model_fields.items():
        if name not in content and field.is_required():
            content[name] = tyro.MISSING_NONPROP
    return model.model_construct(**content)


def _sentence(model: type[BaseModel], error: Mapping[str, Any], where: str) -> str:
    path = [str(part) for part in error["loc"]]
    key = ".".join(path)
    if error["type"] == "extra_forbidden":
        valid = [name for name, _ in _fields(model)]
        leaf = [name for name in valid if name.split(".")[-1] == path[-1]]
        near = leaf or difflib.get_close_matches(key, valid, 1, 0.4) or [", ".join(_children(model, path[:-1]))]
        return f"{where}: unknown setting {key!r}; did you mean {near[0]!r}?"
    return f"{where}: {key}={error['input']!r}: {error['msg'].removeprefix('Value error, ')}."


def _fields(model: type[BaseModel], prefix: str = "") -> typing.Iterator[tuple[str, Any]]:
    """Dotted names of all settings and their types."""
    for name, field in model.model_fields.items():
        yield prefix + name, field.annotation
        inner = _model_of(field.annotation)
        if inner:
            yield from _fields(inner, f"{prefix}{name}.")


def _children(model: type[BaseModel], path: Sequence[str]) -> list[str]:
    for part in path:
        model = _model_of(model.model_fields[part].annotation) or model
    return list(model.model_fields)


def _model_of(annotation: Any) -> type[BaseModel] | None:
    options = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    return next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), None)
