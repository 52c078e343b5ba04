"""The API's documentation as one page: rendered from OpenAPI, for the usual viewers load scripts from elsewhere."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, select_autoescape


def api_page(schema: dict[str, Any]) -> str:
    """HTML of all operations, their fields, an example of each and how to ask for it with curl."""
    environment = Environment(
        loader=PackageLoader("dsd.web", "static"), autoescape=select_autoescape(["html"]), trim_blocks=True
    )
    operations = [
        _operation(path, method, operation, schema)
        for path, methods in schema["paths"].items()
        for method, operation in methods.items()
    ]
    return environment.get_template("docs.html").render(info=schema["info"], operations=operations)


def _operation(path: str, method: str, operation: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    content = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
    example = content.get("example")
    curl = f"curl http://127.0.0.1:8000{path}"
    if example is not None:
        first = "image" if "image" in example else "images"
        shown = {k: v for k, v in example.items() if k not in ("images", "image", "pairs")}
        parts = [f"-F {first}=@scene.png"]
        for name, value in shown.items():
            parts += [f"-F {name}='{v}'" for v in (value if isinstance(value, list) else [value])]
        parts += [f"-F pairs={','.join(map(str, pair))}" for pair in example.get("pairs", ())]
        curl = " \\\n  ".join([curl, *parts])
    required = content.get("schema", {}).get("required", [])
    answer = operation["responses"].get("200", {}).get("content", {}).get("application/json", {}).get("schema", {})
    return {
        "path": path,
        "method": method.upper(),
        "summary": operation.get("summary", ""),
        "description": operation.get("description", ""),
        "curl": curl,
        "example": None if example is None else json.dumps(_clipped(example), indent=1),
        "fields": _fields(content.get("schema", {}), required),
        "answer": _fields(_resolved(answer, schema), []),
        "errors": [(status, r["description"]) for status, r in operation["responses"].items() if status[0] in "45"],
    }


def _resolved(schema: dict[str, Any], whole: dict[str, Any]) -> dict[str, Any]:
    if "$ref" not in schema:
        return schema
    found: dict[str, Any] = whole["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    return found


def _fields(schema: dict[str, Any], required: list[str]) -> list[dict[str, Any]]:
    return [
        {"name": name, "type": _type(value), "required": name in required, "about": value.get("description", "")}
        for name, value in schema.get("properties", {}).items()
    ]


def _type(value: dict[str, Any]) -> str:
    if "anyOf" in value:
        return " or ".join(_type(v) for v in value["anyOf"])
    if value.get("type") == "array":
        return f"list of {_type(value.get('items', {}))}"
    return str(value.get("type") or value.get("$ref", "value").rpartition("/")[2])


def _clipped(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _clipped(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_clipped(v) for v in value]
    return value[:48] + "..." if isinstance(value, str) and len(value) > 60 else value


def static_text(name: str) -> str:
    """A file of the page."""
    return (files("dsd.web") / "static" / name).read_text("utf-8")
