"""Settings from a YAML file and the command line.

    trfpp train configs/my_run.yaml optim.lr=2e-4 lora.rank=32
    trfpp train my_recipe --optim.lr 2e-4 --lora.rank 32

Both spellings of an override are the same. A bare name is a shipped recipe, `configs/<command>/<name>.yaml`. Files and
`key=value` are checked by pydantic; `--key value` and help are tyro's.
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

from ..trf.settings import as_recorded
from .schema import Settings

S = TypeVar("S", bound=Settings)

HERE = Path(__file__).parent


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 1e-4 as a string, where people mean a number, and `precision=no` as false."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)
for letter in "yYnNoO":  # leaves true and false
    _Loader.yaml_implicit_resolvers[letter] = [
        (tag, pattern) for tag, pattern in _Loader.yaml_implicit_resolvers[letter] if tag != "tag:yaml.org,2002:bool"
    ]


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
    if path.name == "generation.json" and isinstance(content, dict):
        content = content.get("config")  # the record of a result holds the settings that repeat it
        if isinstance(content, dict) and isinstance(content.get("sampler"), dict):
            content["sampler"] = as_recorded() | content["sampler"]
    if not isinstance(content, dict):
        raise SettingsError(f"{path}: must hold `key: value` lines, holds a {type(content).__name__}.")
    return content


def command_line(model: type[S], command: str, argv: Sequence[str]) -> S:
    """Settings of one command from its arguments: `[CONFIG] [key=value | --key value ...]`.

    Raises:
        SettingsError: one sentence for each mistake in the file or in a `key=value`. A mistake in a `--key value` ends
            the program with tyro's message, as `--help` does with its text.
    """
    names = recipes(command)
    words = list(argv)
    values: dict[str, Any] = {}
    where = f"trfpp {command}"
    if words and not words[0].startswith("-") and "=" not in words[0]:
        word = words.pop(0)
        file = names.get(word, Path(word))
        if word not in names and not file.is_file():
            near = difflib.get_close_matches(word, names, 1)
            hint = (
                f"did you mean the recipe {near[0]!r}?" if near else f"shipped recipes: {', '.join(names) or 'none'}."
            )
            raise SettingsError(f"{word}: no such file; {hint}")
        values, where = read_yaml(file), str(file)
    _checked(model, values, where)  # on its own, so that a mistake is laid to where it was made

    overrides: dict[str, Any] = {}
    flags = []
    for word in words:
        match = re.fullmatch(r"([A-Za-z_][\w.]*)=(.*)", word, flags=re.DOTALL)
        if match:
            _put(overrides, match[1].split("."), _value(match[2], dict(_fields(model)).get(match[1])))
        else:
            flags.append(word)
    _checked(model, overrides, "")
    content = _checked(model, _merged(values, overrides), where)
    return _by_tyro(model, content, flags, command) if flags else _whole(model, content)


def _by_tyro(model: type[S], content: dict[str, Any], flags: Sequence[str], command: str) -> S:
    """The rest of the command line, `--key value` and `--help`, over the settings so far."""
    import tyro

    absent = {name for name, field in model.model_fields.items() if field.is_required() and name not in content}
    settings = tyro.cli(
        model,
        args=flags,
        default=model.model_construct(**content, **dict.fromkeys(absent, tyro.MISSING_NONPROP)),
        prog=f"trfpp {command}",
        description=_description(model, command, recipes(command)),
        config=(tyro.conf.AvoidSubcommands,),
        use_underscores=True,
    )
    return typing.cast("S", settings)


def _whole(model: type[S], content: Mapping[str, Any]) -> S:
    """The settings as a whole: nothing required may be missing, and they must go together."""
    try:
        return model(**content)
    except ValidationError as error:
        sentences = [
            f"{'.'.join(map(str, e['loc']))} is not set; give {e['loc'][0]}=..."
            if e["type"] == "missing"
            else f"{e['msg'].removeprefix('Value error, ')}."
            for e in error.errors()
        ]
        raise SettingsError("\n".join(sentences)) from None


def _description(model: type[Settings], command: str, names: Mapping[str, Path]) -> str:
    recipe = f" or a recipe: {', '.join(names)}." if names else "."
    words = "Words are [CONFIG] [key=value ...], or --key value as below. CONFIG is a YAML file"
    return f"{model.__doc__ or ''}\n\n{words}{recipe}"


def _value(text: str, annotation: Any) -> Any:
    """The value a word on the command line stands for: text where text is wanted, else what YAML reads."""
    options = (annotation,) if typing.get_origin(annotation) in (None, list, tuple) else typing.get_args(annotation)
    if text in ("null", "None") and type(None) in options:
        return None
    if str in options or Path in options:
        return text
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError:
        return text


def _put(values: dict[str, Any], path: Sequence[str], value: Any) -> None:
    for part in path[:-1]:
        values = values.setdefault(part, {})
        if not isinstance(values, dict):
            raise SettingsError(f"{'.'.join(path)}: {part} was given a value of its own before; give one of the two.")
    values[path[-1]] = value


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Both, `above` going first, down to the leaves."""
    merged = dict(below)
    for key, value in above.items():
        earlier = merged.get(key)
        merged[key] = _merged(earlier, value) if isinstance(earlier, dict) and isinstance(value, dict) else value
    return merged


def _checked(model: type[S], values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Each given setting as `model` holds it, checked on its own: what is missing may still come.

    Raises:
        SettingsError: one sentence for each wrong key, with the nearest valid one.
    """
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
    return content


def _sentence(model: type[BaseModel], error: Mapping[str, Any], where: str) -> str:
    path = [str(part) for part in error["loc"]]
    key = ".".join(path)
    prefix = f"{where}: " if where else ""
    if error["type"] == "extra_forbidden":
        valid = [name for name, _ in _fields(model)]
        leaf = [name for name in valid if name.split(".")[-1] == path[-1]]
        near = leaf or difflib.get_close_matches(key, valid, 1, 0.4)
        hint = f"did you mean {near[0]!r}?" if near else f"valid here: {', '.join(_children(model, path[:-1]))}."
        return f"{prefix}unknown setting {key!r}; {hint}"
    return f"{prefix}{key}={error['input']!r}: {error['msg'].removeprefix('Value error, ')}."


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
