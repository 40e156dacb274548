"""Which route takes a request: literal paths by look-up, the others in the order in which they were given."""

import re
from collections.abc import Iterable, Mapping

from covey import answer, serve


class Table:
    """Paths to routes by method."""

    def __init__(self, routes: Iterable[serve.Route]) -> None:
        self._literal: dict[str, dict[str, serve.Route]] = {}
        self._patterns: dict[str, tuple[re.Pattern[str], dict[str, serve.Route]]] = {}
        for route in routes:
            self._add(route)

    def _add(self, route: serve.Route) -> None:
        if "{" in route.path:
            methods = self._patterns.setdefault(route.path, (_pattern(route.path), {}))[1]
        else:
            methods = self._literal.setdefault(route.path, {})
        if route.method in methods:
            raise ValueError(f"two routes for {route.method} {route.path}")
        methods[route.method] = route

    def find(self, method: str, path: str) -> tuple[serve.Route, Mapping[str, str]]:
        """The route, or Fault 404 or 405. HEAD is answered as GET without its body where no route takes it."""
        found: list[tuple[dict[str, serve.Route], Mapping[str, str]]] = []
        if path in self._literal:
            if method in self._literal[path]:
                return self._literal[path][method], {}
            found.append((self._literal[path], {}))
        found += [
            (methods, hit.groupdict()) for regex, methods in self._patterns.values() if (hit := regex.fullmatch(path))
        ]
        for wanted in (method, "GET") if method == "HEAD" else (method,):
            for methods, params in found:
                if wanted in methods:
                    return methods[wanted], params
        if not found:
            raise answer.Fault(404, f"there is nothing at {path}", code="NOT_FOUND")
        allow = ", ".join(sorted({name for methods, _ in found for name in methods}))
        raise answer.Fault(405, f"{path} takes {allow}, not {method}", code="UNSUPPORTED", headers={"Allow": allow})


def plain(path: str) -> str:
    """The path with each run of slashes as one: clients join base URLs and paths carelessly."""
    return re.sub("/{2,}", "/", path) if "//" in path else path


def _pattern(path: str) -> re.Pattern[str]:
    parts = re.split(r"\{(\w+)(:path)?\}", path)
    out = re.escape(parts[0])
    for name, several, literal in zip(parts[1::3], parts[2::3], parts[3::3], strict=True):
        out += f"(?P<{name}>{'.+' if several else '[^/]+'}){re.escape(literal)}"
    return re.compile(out)
