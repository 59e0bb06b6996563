"""The documentation of the API as one self-contained page."""

from __future__ import annotations

import base64
import hashlib
import json
from html import escape
from typing import Any

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1c1c1c;
  background: #fff; }
h2 { margin-top: 2.5rem; } code, pre { font: 14px/1.45 ui-monospace, monospace; }
section { border-top: 1px solid #ddd; padding: 1rem 0; } pre { background: #f5f5f3; padding: .75rem; overflow: auto; }
.method { display: inline-block; min-width: 3.5rem; font-weight: 700; } table { border-collapse: collapse; }
td { padding: .15rem 1rem .15rem 0; vertical-align: top; }
@media (prefers-color-scheme: dark) { body { background: #161616; color: #e6e6e6; } pre { background: #242424; }
  section { border-color: #3a3a3a; } a { color: #8ab4f8; } }
"""
POLICY = (
    "default-src 'none'; base-uri 'none'; frame-ancestors 'none'; style-src 'sha256-"
    f"{base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()}'"
)


def documentation(openapi: dict[str, Any]) -> str:
    """An HTML page of all routes with their parameters and bodies.

    Args:
        openapi: The schema of the API.
    """
    groups: dict[str, list[str]] = {}
    for path, methods in openapi["paths"].items():
        for method, route in methods.items():
            groups.setdefault(route.get("tags", ["other"])[0], []).append(_route(path, method, route, openapi))
    body = "".join(f"<h2>{escape(name.capitalize())}</h2>{''.join(routes)}" for name, routes in groups.items())
    about = openapi["info"]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
        f'content="width=device-width"><title>{escape(about["title"])} API</title><style>{_STYLE}</style></head><body>'
        f"<h1>{escape(about['title'])} API {escape(about['version'])}</h1><p>{escape(about.get('description', ''))} "
        'Errors are <code>{"error": "what is wrong and what to do"}</code> with a 4xx or 5xx status. '
        'Programs can read <a href="/openapi.json">openapi.json</a>.</p>'
        f"{body}</body></html>"
    )


def _route(path: str, method: str, route: dict[str, Any], openapi: dict[str, Any]) -> str:
    rows = "".join(
        f"<tr><td><code>{escape(p['name'])}</code></td><td>{escape(p['in'])}</td>"
        f"<td>{escape(_kind(p.get('schema', {})))}</td></tr>"
        for p in route.get("parameters", ())
    )
    bodies = "".join(
        f"<p>Body, {escape(kind)}:</p><pre>{escape(_body(content.get('schema', {}), openapi))}</pre>"
        for kind, content in route.get("requestBody", {}).get("content", {}).items()
    )
    return (
        f'<section><h3><span class="method">{escape(method.upper())}</span> <code>{escape(path)}</code></h3>'
        f"<p>{escape(route.get('description', ''))}</p>{f'<table>{rows}</table>' if rows else ''}{bodies}</section>"
    )


def _kind(schema: dict[str, Any]) -> str:
    kinds = [one.get("type", "") for one in schema.get("anyOf", [schema])]
    parts = [" or ".join(kind for kind in kinds if kind)]
    parts += [f"{name} {schema[name]}" for name in ("minimum", "maximum", "maxLength", "default") if name in schema]
    return ", ".join(str(part) for part in parts if part != "")


def _body(schema: dict[str, Any], openapi: dict[str, Any]) -> str:
    """A JSON-like sketch of a body."""
    return json.dumps(_sketch(schema, openapi), indent=2)


def _sketch(schema: dict[str, Any], openapi: dict[str, Any]) -> Any:
    if "$ref" in schema:
        return _sketch(openapi["components"]["schemas"][schema["$ref"].rpartition("/")[2]], openapi)
    if "properties" in schema:
        return {name: _sketch(inner, openapi) for name, inner in schema["properties"].items()}
    if schema.get("type") == "array":
        return [_sketch(schema.get("items", {}), openapi)]
    if "anyOf" in schema and any("$ref" in one or "properties" in one for one in schema["anyOf"]):
        return _sketch(schema["anyOf"][0], openapi)
    return _kind(schema)
