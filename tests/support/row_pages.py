"""Opens displays of rows as pages in Chromium."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from jupyter_lab import CHROMIUM

SITE = "http://row.test/"

ATTACK = (
    '<script>window.pwned = 1; alert(1)</script><img src=x onerror="window.pwned = 2; alert(2)">'
    '<svg onload="window.pwned = 3"></svg><iframe src="http://elsewhere.test/frame"></iframe>'
    '<link rel=stylesheet href="http://elsewhere.test/style.css"><style>* { display: none }</style>'
    "<img src=http://elsewhere.test/pixel.png> </span></div></details></body><!-- <![CDATA[ <textarea> <plaintext>"
    ' " \' onmouseover="window.pwned = 4" javascript:alert(3) &lt;b&gt; &#60; &amp;amp; ${1} {{ 1 }} $x^2$'
)

HIDING = (
    "\x1b[31mred\x1b[0m \x1b]0;title\x07 \x9b2J \x08\x08 \r\n"
    "abc \u202egnirts\u202c def \u2066ghi\u2069 \u200fjkl\u200e \u061c m\u200bn\ufeffo\u00adp \u00a0\u2003\u2028\u2029 "
    "\U000e0041 \ue000 \x00 q\tr  s   t \u3164|\u2800| Z" + "\u0301" * 40
)

SCRIPTS = (
    "👩‍👩‍👧 👍🏽 ❤️ 🏳️‍🌈 🇫🇷 1️⃣ | "
    "שלום עולם 123 (abc) | السلام عليكم 45 | 日本語のテキスト | e\u0301 หน้า हिन्दी | ‹U+202E› ⏎ ⇥\n"
    "def f(x):\n    return x\n\n\n" + "unbroken" * 60 + " https://example.org/" + "path/" * 40
)


# The colors, sizes and padding that JupyterLab's light and dark themes give to an output; plain has none of them.
THEMES = {
    "light": ("true", "white", "rgba(0, 0, 0, 0.87)"),
    "dark": ("false", "#111", "#fff"),
    "plain": None,
}


def document(html: str, theme: str) -> str:
    """A page that contains one output as in JupyterLab, or as in a bare browser."""
    if THEMES[theme] is None:
        return f'<!doctype html><meta charset="utf-8"><body><div id="output">{html}</div></body>'
    is_light, background, color = THEMES[theme]
    return (
        '<!doctype html><meta charset="utf-8"><style>'
        f":root {{ --jp-layout-color0: {background}; --jp-content-font-color1: {color}; }}"
        "body { margin: 0; background: var(--jp-layout-color0); }"
        ".jp-OutputArea-output { padding: 5px 20px 5px 72px; color: var(--jp-content-font-color1);"
        " font: 14px/1.6 system-ui, sans-serif; }"
        f'</style><body data-jp-theme-light="{is_light}">'
        f'<div id="output" class="jp-RenderedHTMLCommon jp-OutputArea-output">{html}</div></body>'
    )


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    assert CHROMIUM, "Chromium is needed: apt-get install chromium"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield browser
        browser.close()


@pytest.fixture
def opened(browser, tmp_path):
    """Open an output as a page; fails if it runs a script, opens a dialog or requests anything."""
    pages, happened = [], []

    def open_page(html: str, theme: str = "light", width: int = 1200):
        page = browser.new_page(viewport={"width": width, "height": 900})
        pages.append(page)
        requests: list[str] = []

        def answer(route):
            requests.append(route.request.url)
            if len(requests) > 1:
                happened.append(f"request for {route.request.url}")
                route.abort()
            else:
                route.fulfill(body=document(html, theme), content_type="text/html; charset=utf-8")

        def dismiss(dialog):
            happened.append(f"dialog {dialog.message}")
            dialog.dismiss()

        page.route("**/*", answer)
        page.on("dialog", dismiss)
        page.on("pageerror", lambda error: happened.append(f"script error {error}"))
        page.on("console", lambda message: happened.append(f"console {message.text}"))
        page.goto(SITE, wait_until="load")
        return page

    yield open_page
    assert [page.evaluate("window.pwned") for page in pages] == [None] * len(pages)
    for page in pages:
        page.close()
    assert happened == []


@pytest.fixture
def screenshot(tmp_path):
    folder = Path(os.environ.get("MLX_NB_SCREENSHOTS") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    return lambda page, name: page.screenshot(path=folder / f"{name}.png", full_page=True)


@pytest.fixture(scope="module")
def tokenizer(tiny_folder):
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(tiny_folder)


# Draws every piece of text with the backgrounds and opacities of its ancestors; ratio as WCAG 2 defines it.
CONTRAST = """() => {
    const parse = text => {
        const numbers = text.match(/[\\d.]+/g).map(Number);
        return numbers.length < 4 ? [...numbers, 1] : numbers;
    };
    const over = (top, under) => under.map((value, index) => top[3] * top[index] + (1 - top[3]) * value);
    const luminance = color => {
        const [r, g, b] = color.map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const draw = (styles, at, under, ink) => {
        if (at === styles.length) return ink ? over(ink, under) : under;
        const drawn = draw(styles, at + 1, over(parse(styles[at].backgroundColor), under), ink);
        return under.map((value, index) => value + (drawn[index] - value) * Number(styles[at].opacity));
    };
    const worst = new Map();
    const walker = document.createTreeWalker(document.querySelector("#output"), NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
        const text = walker.currentNode.textContent.trim();
        if (!text) continue;
        const styles = [];
        for (let node = walker.currentNode.parentElement; node; node = node.parentElement)
            styles.unshift(getComputedStyle(node));
        const ground = draw(styles, 0, [255, 255, 255], null);
        const ink = draw(styles, 0, [255, 255, 255], parse(styles.at(-1).color));
        const [dark, bright] = [luminance(ground), luminance(ink)].sort((a, b) => a - b);
        const key = /^[⏎⇥·◌]+$/.test(text) ? "glyph " : "text ";
        const ratio = Math.round((bright + 0.05) / (dark + 0.05) * 100) / 100;
        const name = key + styles.slice(-3).map(s => s.backgroundColor + " " + s.opacity).join(" > ");
        if (!worst.has(name) || worst.get(name)[0] > ratio) worst.set(name, [ratio, text.slice(0, 40), key.trim()]);
    }
    return [...worst.values()].sort((a, b) => a[0] - b[0]);
}"""
