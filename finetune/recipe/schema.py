"""The JSON Schema of a recipe, for editors: `# yaml-language-server: $schema=...` in a recipe names it."""

from __future__ import annotations

from typing import Any

from finetune.recipe import fields
from finetune.recipe.sections import Recipe


def recipe_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a recipe file, with every short form that the reader accepts.

    Required keys are asked for only where the file extends no other, because they may stand there.
    """
    schema = Recipe.model_json_schema()
    definitions = schema["$defs"]
    required: dict[str, list[str]] = {name: model.pop("required", []) for name, model in definitions.items()}
    required["Source"] = definitions["Source"]["required"] = required["Source"] or ["path"]
    source: dict[str, Any] = {"anyOf": [{"type": "string", "minLength": 1}, {"$ref": "#/$defs/Source"}]}
    for path, section in fields.sections().items():
        if path.endswith("[]"):
            owner, name = path[:-2].split(".")
            field = definitions[fields.sections()[owner].__name__]["properties"][name]
            field.pop("items", None), field.pop("type", None)
            field["anyOf"] = [*source["anyOf"], {"type": "array", "items": source}]
            if name == "train":
                field["anyOf"][-1]["minItems"] = 1
        elif path:
            field = schema["properties"][path]
            text = " ".join((section.__doc__ or "").split())
            schema["properties"][path] = {
                "title": field.get("title", path.capitalize()),
                "description": text,
                "anyOf": [{"$ref": f"#/$defs/{section.__name__}"}, {"type": "null"}],
            }
    for model in (*definitions.values(), schema):
        for field in model["properties"].values():
            if "description" in field:
                field["description"] = " ".join(field["description"].split())
    schema["properties"] = {
        "extends": {
            "title": "Extends",
            "description": "A recipe whose values hold where this one says nothing; the path is relative to this file.",
            "type": "string",
            "minLength": 1,
        },
        **schema["properties"],
    }
    whole = schema.pop("required")
    inside = {
        path: {"type": "object", "required": required[section.__name__]}
        for path, section in fields.sections().items()
        if path and not path.endswith("[]") and required[section.__name__]
    }
    schema["if"] = {"not": {"required": ["extends"]}}
    schema["then"] = {"required": whole, "properties": inside}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
