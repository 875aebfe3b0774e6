"""The page at `/`: a chat, and live figures. Its files come as they are; the page itself speaks the API."""

from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response

TYPES = {
    "index.html": "text/html; charset=utf-8",
    "page.css": "text/css; charset=utf-8",
    "page.js": "text/javascript; charset=utf-8",
}
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src data:; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


async def page(request: Request) -> Response:
    """One of the page's files."""
    name = request.url.path.lstrip("/") or "index.html"
    content = files(__name__).joinpath(name).read_bytes()
    return Response(content, headers=HEADERS | {"Content-Type": TYPES[name]})
