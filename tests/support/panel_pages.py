"""Opens a widget such as the panel in a bare page: its script and state, with a model like that of anywidget."""

from __future__ import annotations

import json

from mlx_nb.view.panel.heartbeat import stop_beats
from mlx_nb.view.panel.panel import Panel

# Background of the page, of what floats above it, and text, as JupyterLab's themes give them; plain has none of them.
THEMES = {
    "light": ("white", "white", "rgba(0, 0, 0, 1)", "rgba(0, 0, 0, 0.87)"),
    "dark": ("#111", "#212121", "rgba(255, 255, 255, 1)", "rgba(255, 255, 255, 0.87)"),
}
PLAIN = "plain"
OWN = {"layout", "tabbable", "tooltip"}
PAGE = """<!doctype html><meta charset="utf-8"><style>%(theme)s body { margin: 0 } #cell { padding: 6px }
%(style)s</style><body><div id="cell"></div><script type="module">
import widget from "/panel.js";
const state = %(state)s, heard = {};
window.sent = [];
window.saved = [];
let unsaved = {};
window.change = (name, value) => {
    if (JSON.stringify(state[name]) === JSON.stringify(value)) return;
    state[name] = value;
    for (const callback of [...heard[`change:${name}`] ?? []]) callback();
};
window.model = {
    get: name => state[name],
    set(name, value) { unsaved[name] = value; change(name, value); },
    save_changes() { window.saved.push(unsaved); unsaved = {}; },
    on(name, callback) { (heard[name] ??= []).push(callback); },
    off(name, callback) { heard[name] = (heard[name] ?? []).filter(one => one !== callback); },
    send(message) { window.sent.push(message); window.to_kernel?.(message); },
};
window.deliver = message => { for (const callback of [...heard["msg:custom"] ?? []]) callback(message, []); };
const forget = widget.initialize?.({ model: window.model });
window.close_view = widget.render({ model: window.model, el: document.querySelector("#cell") });
window.close_model = forget;
window.ready = true;
</script></body>"""


def state_of(panel) -> dict:
    """The initial state that a panel sends to its page."""
    return {name: value for name, value in panel.get_state().items() if name[0] != "_" and name not in OWN}


def page_of(state: dict, theme: str, css: str = Panel._css) -> str:
    """The page as HTML, in a theme of `THEMES` or plain."""
    style = ""
    if theme in THEMES:
        page, above, text, quiet = THEMES[theme]
        style = f":root {{ --jp-layout-color0: {page}; --jp-layout-color1: {above}; --jp-ui-font-color0: {text};"
        style += f" --jp-ui-font-color1: {quiet} }} body {{ background: {page}; color: {text} }}"
    told = json.dumps(state, allow_nan=False).replace("<", "\\u003c")
    return PAGE % {"theme": style, "style": css, "state": told}


def open_panel(browser, panel, theme="light", width=900, height=900, wrong=None, **changed):
    """A page with the panel; `panel`, in this process, answers its requests."""
    stop_beats(panel)
    return open_widget(browser, panel, theme, width, height, wrong, **changed)


def open_widget(browser, panel, theme="light", width=900, height=900, wrong=None, **changed):
    """A page with a widget; `wrong` collects errors, and `page.requests` the messages to the kernel."""
    wrong = [] if wrong is None else wrong
    panel._loop = None  # the loop that runs here is the browser's
    page = browser.new_page(viewport={"width": width, "height": height}, device_scale_factor=1)
    answers = {
        "/panel.js": (str(panel._esm), "text/javascript"),
        "/": (page_of({**state_of(panel), **changed}, theme, str(panel._css)), "text/html"),
    }

    def answer(route):
        body, kind = answers.get(route.request.url.removeprefix("http://panel.test"), (None, None))
        if body is None:
            wrong.append(f"request for {route.request.url}")
            route.abort()
        else:
            route.fulfill(body=body, content_type=f"{kind}; charset=utf-8")

    def to_page(content, buffers=None):
        page.evaluate("message => { setTimeout(() => deliver(message)) }", content)

    page.route("**/*", answer)
    page.on("pageerror", lambda error: wrong.append(f"script error {error}"))
    page.on("console", lambda message: wrong.append(f"console {message.text}"))
    requests = []
    page.expose_function("to_kernel", lambda message: requests.append(message))
    page.goto("http://panel.test/")
    page.wait_for_function("window.ready")
    panel.send = to_page
    page.requests = requests
    return page


def answer_all(page, panel):
    """Let the panel answer the pending requests of the page."""
    page.wait_for_timeout(30)
    while page.requests:
        panel._on_message(None, page.requests.pop(0), None)
    page.wait_for_timeout(30)
