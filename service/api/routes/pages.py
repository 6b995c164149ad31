"""Pages for people: plain HTML with one style sheet in it, no script, and nothing that is fetched from elsewhere."""

from __future__ import annotations

import base64
import hashlib
import html
from collections.abc import Iterator, Mapping
from http import HTTPStatus
from typing import Annotated, Any

from fastapi import APIRouter, Path, Request
from fastapi.responses import HTMLResponse

from service.api.security import Guarded
from service.errors import NotFound
from service.problem_types import PROBLEMS

router = APIRouter(route_class=Guarded)

_STYLE = """body{font:1.05rem/1.5 system-ui,sans-serif;max-width:56rem;margin:3rem auto;padding:0 1rem}
code{background:#8882;padding:.1em .3em}table{border-collapse:collapse;margin:.5rem 0}
td{border-top:1px solid #8884;padding:.2rem .8rem .2rem 0;vertical-align:top}h3{margin:2rem 0 0}"""
_HASH = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
_POLICY = f"default-src 'none'; style-src 'sha256-{_HASH}'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"


def page(title: str, body: str) -> HTMLResponse:
    """Return a page of some HTML, which may show its own style and nothing else, whatever got into it."""
    head = (
        f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{html.escape(title)}</title>'
    )
    whole = (
        f'<!doctype html>\n<html lang="en"><head>{head}\n<style>{_STYLE}</style></head>\n<body>{body}</body></html>\n'
    )
    return HTMLResponse(whole, headers={"Content-Security-Policy": _POLICY})


@router.get("/docs", include_in_schema=False)
async def docs(request: Request) -> HTMLResponse:
    """Return every route with its parameters, as the OpenAPI document has them."""
    told = request.app.openapi()
    title, version, summary = (_text(told["info"][name]) for name in ("title", "version", "summary"))
    intro = f"<h1>{title} {version}</h1><p>{summary}</p>"
    more = '<p>For machines: <a href="/openapi.json">/openapi.json</a>.</p>'
    routes = (_route(method, path, own) for path, item in told["paths"].items() for method, own in item.items())
    return page(told["info"]["title"], intro + more + "\n".join(routes))


def _route(method: str, path: str, own: Mapping[str, Any]) -> str:
    rows = "\n".join(_rows(own))
    name = f"<h3><code>{method.upper()} {_text(path)}</code></h3>"
    return f"{name}<p><strong>{_text(own['summary'])}.</strong> {_text(own['description'])}</p><table>{rows}</table>"


def _rows(own: Mapping[str, Any]) -> Iterator[str]:
    for one in own.get("parameters", ()):
        default = one["schema"].get("default")
        usual = "" if default is None else f", {str(default).lower()} by default"
        yield _row(one["in"], one["name"], f"{_kind(one['schema'])}{usual}", one.get("description", ""))
    for kind, content in own.get("requestBody", {}).get("content", {}).items():
        schema = content["schema"]
        fields = ", ".join(schema.get("properties", ())) or schema.get("$ref", "").rpartition("/")[2]
        yield _row("body", kind, fields, "")
    scopes = [scope for one in own.get("security", ()) for names in one.values() for scope in names]
    if scopes:
        yield _row("key", ", ".join(scopes), "", "the scope that it needs")


def _kind(schema: Mapping[str, Any]) -> str:
    either = [_kind(one) for one in schema.get("anyOf", ()) if one.get("type") != "null"]
    return " or ".join(either) or str(schema.get("type", ""))


def _row(place: str, name: str, kind: str, meaning: str) -> str:
    return (
        f"<tr><td>{place}</td><td><code>{_text(name)}</code></td><td>{_text(kind)}</td><td>{_text(meaning)}</td></tr>"
    )


def _text(value: str) -> str:
    return html.escape(value)


@router.get(
    "/problems/{slug}",
    tags=["problems"],
    response_class=HTMLResponse,
    summary="What a problem type means and what to do",
)
async def show(slug: Annotated[str, Path(json_schema_extra={"enum": list(PROBLEMS)})]) -> HTMLResponse:
    """Return the page of a problem type."""
    kind = PROBLEMS.get(slug)
    if kind is None:
        raise NotFound(f"There is no problem type {slug[:100]!r}.")
    status = f"{kind.status} {HTTPStatus(kind.status).phrase}"
    parts = (html.escape(part) for part in (kind.title, status, slug, kind.meaning, kind.remedy))
    return page(kind.title, _PAGE.format(*parts))


_PAGE = """<h1>{0}</h1><p><code>{1}</code> <code>{2}</code></p><p>{3}</p>
<p><strong>What to do:</strong> {4}</p>"""
