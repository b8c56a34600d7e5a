"""User-given YAML and JSON: plain values, and no key of which another would be read than was typed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import yaml

from utils.errors import UserError


class _Loader(yaml.SafeLoader):
    """A safe loader that refuses a key given twice, and a key that is neither text nor a whole number."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set[str]()
        for key, _ in node.value:
            kind = key.tag.rpartition(":")[2]
            if kind == "merge" or not isinstance(key, yaml.ScalarNode):
                continue
            where, word = f"line {key.start_mark.line + 1}", key.value
            # YAML reads NO as False, and 15_1 as 151.
            if kind != "str" and not (kind == "int" and word == str(self.construct_yaml_int(key))):
                raise UserError(f"{where}: the name {word!r} is not text in YAML; put it in quotes")
            if word in seen:
                raise UserError(f"{where}: {word!r} appears twice; remove one")
            seen.add(word)
        return node


def parse_text(text: str, where: str, *, as_json: bool = False) -> Any:
    """The content of a YAML or JSON text.

    Args:
        text: the text.
        where: the file or option that it is from, for messages.
        as_json: parse as JSON, else as YAML.

    Raises:
        UserError: it is not valid, a key appears twice, or a YAML key is neither text nor a whole number.
    """
    try:
        if as_json:
            return json.loads(text, object_pairs_hook=_object)
        return yaml.load(text, Loader=_Loader)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    except (ValueError, yaml.YAMLError) as error:
        language, reason = "JSON" if as_json else "YAML", " ".join(str(error).split())
        raise UserError(f"{where}: not valid {language} ({reason}); correct or quote it") from error


def _object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys differ."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise UserError(f"{key!r} appears twice; remove one")
        found[key] = value
    return found
