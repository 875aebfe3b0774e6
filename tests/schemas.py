"""Random JSON schemas whose texts are short, and whether a value is what one accepts."""

import random
import re
from typing import Any

Schema = dict[str, Any]


def random_schema(rng: random.Random, depth: int = 0) -> Schema:
    """A schema whose texts are short, of all kinds that one can be made of."""
    plain = ["string", "integer", "boolean", "enum", "null", "pattern", "anyOf"]
    nested = ["object", "array"]
    least, low = rng.randint(0, 2), rng.randint(-99, 50)
    names = rng.sample(["a", "name", "some key", "ß", 'quo"te', "x_1"], rng.randint(0, 4))
    match rng.choice(nested if depth == 0 else plain + nested * (depth < 3)):
        case "object" as kind:
            properties = {name: random_schema(rng, depth + 1) for name in names}
            required = [name for name in names if rng.random() < 0.7]
            schema = {"properties": properties, "required": required, "additionalProperties": False}
        case "array" as kind:
            schema = {"items": random_schema(rng, depth + 1), "minItems": least, "maxItems": least + 2}
        case "string" as kind:
            schema = {"minLength": least, "maxLength": rng.randint(2, 6)}
        case "integer" as kind:
            schema = {"minimum": low, "maximum": low + rng.randint(0, 2000)}
        case "enum":
            return {"enum": rng.sample(["red", 7, None, True, {"k": [1, 2]}], 2)}
        case "pattern":
            kind, schema = "string", {"pattern": "^[a-f]{2,4}-[0-9]+$", "maxLength": 9}
        case "anyOf":
            return {"anyOf": [random_schema(rng, 3), random_schema(rng, 3)]}
        case kind:
            schema = {}
    return {"type": kind, **schema}


def conforms(value: Any, schema: Schema) -> bool:
    """Whether JSON Schema says so, of the keywords above."""
    if "type" not in schema:
        same = any(value == each and type(value) is type(each) for each in schema.get("enum", ()))
        return same or any(conforms(value, each) for each in schema.get("anyOf", ()))
    match schema["type"]:
        case "object" if isinstance(value, dict):
            inner = schema["properties"]
            is_whole = set(schema["required"]) <= value.keys() <= inner.keys()
            return is_whole and all(conforms(each, inner[name]) for name, each in value.items())
        case "array" if isinstance(value, list):
            is_long = schema["minItems"] <= len(value) <= schema["maxItems"]
            return is_long and all(conforms(each, schema["items"]) for each in value)
        case "string" if isinstance(value, str):
            is_long = schema.get("minLength", 0) <= len(value) <= schema["maxLength"]
            return is_long and re.search(schema.get("pattern", ""), value) is not None
        case "integer" if type(value) is int:
            return schema["minimum"] <= value <= schema["maximum"]
    return (schema["type"], value) in (("boolean", True), ("boolean", False), ("null", None))
