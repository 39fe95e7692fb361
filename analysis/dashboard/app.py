"""The app: which part of the page follows from which choice, and who may ask for it."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

from dash import Dash, Input, Output, State, ctx, no_update, set_props
from dash.development.base_component import Component
from flask import Response, abort, request

from analysis.dashboard import comparing, labelling, layout, views
from analysis.dashboard.crosscoders import Crosscoder, folders_in, load
from analysis.dashboard.documents import shown_documents
from analysis.dashboard.filters import NO_CATEGORY, Filter, matching, num_pages, page_of
from analysis.taxonomy.categories import OTHER, Category
from extract.errors import BadInput

LOCAL = ("127.0.0.1", "localhost", "::1")
SHOWN: dict[str, str] = {}
HIDDEN = {"display": "none"}
# The inputs of the page that make the filter.
FILTERS = (
    *("pair", "owners", "categories", "search", "by-hand", "order"),
    *("error-low", "error-high", "reconstruction-low", "reconstruction-high"),
)


class Study:
    """The analysed crosscoders in a folder of outputs by name, and the classes of the taxonomy's categories."""

    def __init__(self, name: str, outputs: Path, categories: list[Category]) -> None:
        self.name = name
        self._outputs = outputs
        self.groups = {category.name: category.group for category in categories} | {OTHER: OTHER}

    def pairs(self) -> list[str]:
        return [folder.name for folder in folders_in(self._outputs)]

    def crosscoder(self, pair: str) -> Crosscoder | None:
        """As its files are now; None for what is no analysis folder, whatever an address says."""
        return load(self._outputs / "analysis" / pair) if pair in self.pairs() else None

    def latent(self, path: str | None) -> tuple[Crosscoder, int] | None:
        """The latent that an address names, if there is one."""
        named = views.parse_path(path)
        found = self.crosscoder(named[0]) if named else None
        return (found, named[1]) if found and named and named[1] < len(found.columns["latent"]) else None


def make_app(study: Study) -> Dash:
    """The app over a study; its scripts and styles come from this machine alone."""
    app = Dash(
        __name__, title=study.name, update_title="", serve_locally=True, add_log_handler=False, on_error=say_problem
    )
    app.layout = lambda: layout.page(study.name, study.pairs(), list(study.groups))
    _choosing(app, study)
    _listing(app, study)
    _reading(app, study)
    _labelling(app, study)
    _comparing(app, study)
    _guard(app)
    return app


def say_problem(error: Exception) -> None:
    """Puts on the page what its reader can mend, such as a line of human.jsonl that is none; the rest is a fault."""
    if not isinstance(error, BadInput):
        raise error
    set_props("problem", {"children": str(error)})


def _guard(app: Dash) -> None:
    """Answers to this machine's own names and to its own pages alone, and lets pages run no script but ours.

    Names: another one may have been made to lead here. Pages: those of any site can send requests to this machine.
    """
    policy = (
        f"default-src 'self'; script-src 'self' {' '.join(app.csp_hashes())}; style-src 'self' 'unsafe-inline'; "
        "img-src 'self' data:; object-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )

    def check_host() -> None:
        origin = request.headers.get("Origin", f"http://{request.host}")
        if not {urlsplit(f"//{request.host}").hostname, urlsplit(origin).hostname} <= set(LOCAL):
            abort(403)

    def protect(response: Response) -> Response:
        response.headers["Content-Security-Policy"] = policy
        response.headers["Referrer-Policy"] = "no-referrer"
        return response

    app.server.before_request(check_host)
    app.server.after_request(protect)


def _choosing(app: Dash, study: Study) -> None:
    @app.callback(Output("browse", "style"), Output("compare", "style"), Input("url", "pathname"))
    def show_view(path: str) -> tuple[dict[str, str], dict[str, str]]:
        return (HIDDEN, SHOWN) if path == "/compare" else (SHOWN, HIDDEN)

    @app.callback(Output("pair", "value"), Input("url", "pathname"), State("pair", "value"))
    def follow(path: str, pair: str) -> object:
        """The table shows the crosscoder of the latent that is open."""
        found = study.latent(path)
        return found[0].name if found and found[0].name != pair else no_update

    @app.callback(
        Output("owners", "options"),
        Output("owners", "value"),
        Output("categories", "options"),
        Output("categories", "value"),
        Input("pair", "value"),
    )
    def choices(pair: str) -> tuple[list[dict[str, str]], list[str], list[str], list[str]]:
        owners = crosscoder.owners() if (crosscoder := study.crosscoder(pair)) else {}
        named = [{"label": f"{owner} ({count})", "value": owner} for owner, count in owners.items()]
        return named, [], [*study.groups, NO_CATEGORY], []


def _listing(app: Dash, study: Study) -> None:
    asked = {name: Input(name, "value") for name in FILTERS}
    turned = [Input("previous", "n_clicks"), Input("next", "n_clicks"), Input("saved", "data")]

    @app.callback(
        output=[
            Output("table", "children"),
            Output("where", "children"),
            Output("page", "data"),
            Output("problem", "children"),
        ],
        inputs={"asked": asked, "turned": turned, "path": Input("url", "pathname")},
        state={"page": State("page", "data")},
    )
    def list_latents(asked: dict, turned: list, path: str, page: int) -> tuple[Component | str, str, int, str]:
        crosscoder = study.crosscoder(asked["pair"])
        if crosscoder is None:
            return "", "Nothing is analysed under this name.", 0, ""
        latents = matching(crosscoder, filter_of(asked))
        page = _turn(page, num_pages(len(latents)), str(ctx.triggered_id))
        selected = views.parse_path(path)
        number = selected[1] if selected and selected[0] == crosscoder.name else None
        where = f"{len(latents)} latents, page {page + 1} of {num_pages(len(latents))}"
        return views.table(crosscoder, page_of(latents, page), number), where, page, crosscoder.warning


def filter_of(asked: dict) -> Filter:
    """The filter that the values of the page's inputs mean, by the inputs' names."""
    return Filter(
        owners=tuple(asked["owners"] or ()),
        categories=tuple(asked["categories"] or ()),
        search=asked["search"] or "",
        nu=(
            (asked["error-low"], asked["error-high"]),
            (asked["reconstruction-low"], asked["reconstruction-high"]),
        ),
        by_hand=bool(asked["by-hand"]),
        order=asked["order"],
    )


def _turn(page: int, num: int, trigger: str) -> int:
    """The page to show: turned by a button, kept when a latent was opened or labelled, the first for another filter."""
    if trigger in ("previous", "next", "saved", "url"):
        page += {"previous": -1, "next": 1}.get(trigger, 0)
        return min(max(page, 0), num - 1)
    return 0


def _reading(app: Dash, study: Study) -> None:
    @app.callback(
        Output("facts", "children"),
        Output("latent", "style"),
        Input("url", "pathname"),
        Input("saved", "data"),
    )
    def show_facts(path: str, saved: int) -> tuple[Component | str, dict[str, str]]:
        found = study.latent(path)
        return (views.facts(*found), SHOWN) if found else ("", HIDDEN)

    @app.callback(
        Output("documents", "children"), Input("url", "pathname"), Input("kind", "value"), Input("context", "value")
    )
    def show_documents(path: str, kind: str, context: int) -> Component | str:
        found = study.latent(path)
        return shown_documents(found[0].folder, found[1], kind, context) if found else ""


def _labelling(app: Dash, study: Study) -> None:
    fields = [f"hand-{name}" for name in ("label", "category", "note")]

    @app.callback(
        output=[
            [Output(name, "value") for name in fields],
            [Output(name, "placeholder") for name in fields[:2]],
            Output("shown", "data"),
            Output("message", "children"),
        ],
        inputs={"path": Input("url", "pathname")},
    )
    def fill_form(path: str) -> tuple[list[str | None], list[str], list[str | None], str]:
        return *labelling.form_of(study.latent(path), path), ""

    @app.callback(
        output=[Output("message", "children", allow_duplicate=True), Output("saved", "data")],
        inputs={"clicks": Input("save", "n_clicks")},
        state={
            "path": State("url", "pathname"),
            "shown": State("shown", "data"),
            "values": [State(name, "value") for name in fields],
            "who": State("who", "value"),
            "saved": State("saved", "data"),
        },
        prevent_initial_call=True,
    )
    def save(clicks: int, path: str, shown: list[str], values: list, who: str | None, saved: int) -> tuple[str, object]:
        said = labelling.save(study.latent(path), path, shown, values, who, study.groups)
        return said, saved + 1 if said in (labelling.SAVED, labelling.WITHDRAWN) else no_update


def _comparing(app: Dash, study: Study) -> None:
    for side in "ab":
        _owner_choice(app, study, side)

    @app.callback(
        output=[Output("compared", "children"), Output("listed", "options"), Output("side-by-side", "children")],
        inputs={
            "pairs": [Input("pair-a", "value"), Input("pair-b", "value")],
            "owners": [Input("owner-a", "value"), Input("owner-b", "value")],
            "listed": Input("listed", "value"),
            "saved": Input("saved", "data"),
        },
    )
    def compare(
        pairs: list[str], owners: list[str | None], listed: str | None, saved: int
    ) -> tuple[list[Component], list[str], list[Component]]:
        a, b = study.crosscoder(pairs[0]), study.crosscoder(pairs[1])
        if a is None or b is None or owners[0] is None or owners[1] is None:
            return [], [], []
        one, two = comparing.Side(a, owners[0]), comparing.Side(b, owners[1])
        tables = [
            comparing.owner_table(a, b),
            comparing.share_table(one, two, "category", lambda side: side.counts()),
            comparing.share_table(one, two, "class", lambda side: side.counts(study.groups)),
        ]
        names = sorted(one.counts() | two.counts())
        return tables, names, [comparing.latents_of(side, listed) for side in (one, two)]


def _owner_choice(app: Dash, study: Study, side: str) -> None:
    """The owners of one side's crosscoder; its last model stands first."""

    @app.callback(Output(f"owner-{side}", "options"), Output(f"owner-{side}", "value"), Input(f"pair-{side}", "value"))
    def owners(pair: str) -> tuple[list[str], str | None]:
        crosscoder = study.crosscoder(pair)
        if crosscoder is None:
            return [], None
        found = list(crosscoder.owners())
        last = crosscoder.models[-1]
        return found, last if last in found else found[0]
