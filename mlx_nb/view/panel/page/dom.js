// Helpers for elements, texts and the theme.

// Creates an element with attributes; `on...` are listeners, and strings become text.
function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== ""));
  return element;
}

// Writes only changes, because a write would clear a selection and be read aloud again.
function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

// HTML from the kernel, which has escaped all data in it.
function setHtml(element, html) {
  const parsed = new DOMParser().parseFromString(html, "text/html");
  element.replaceChildren(...parsed.body.childNodes);
}

// Updates the children of `parent`, one for each item; a child is kept while the item's key and data are the same.
function sync(parent, items, keyOf, make) {
  const there = new Map([...parent.children].map((child) => [child.dataset.key, child]));
  const wanted = items.map((item, index) => {
    const key = String(keyOf(item, index)), data = JSON.stringify(item), old = there.get(key);
    if (old && old.dataset.of === data) return old;
    const made = make(item, index);
    made.dataset.key = key;
    made.dataset.of = data;
    return made;
  });
  const isSame = wanted.length === parent.children.length && wanted.every((one, at) => one === parent.children[at]);
  if (isSame) return;
  const focused = parent.contains(document.activeElement) ? document.activeElement.closest("[data-key]")?.dataset.key : null;
  parent.replaceChildren(...wanted);
  if (focused) wanted.find((one) => one.dataset.key === focused)?.focus();
}

// As the kernel writes it, independent of the browser's language.
const timeOfDay = (date) => date.toTimeString().slice(0, 8);

const seconds = (value) => {
  if (value < 60) return value < 10 ? `${value.toFixed(1)} s` : `${Math.round(value)} s`;
  const all = Math.round(value), two = (number) => String(number).padStart(2, "0");
  const minutes = Math.floor(all / 60), hours = Math.floor(minutes / 60);
  return hours ? `${hours}:${two(minutes % 60)}:${two(all % 60)}` : `${minutes}:${two(all % 60)}`;
};

// Whether the page behind an element is dark, by its color, because notebooks mark their themes differently.
function isDark(element) {
  for (let node = element.parentElement; node; node = node.parentElement) {
    const [r, g, b, alpha = 1] = (getComputedStyle(node).backgroundColor.match(/[\d.]+/g) ?? [0, 0, 0, 0]).map(Number);
    if (alpha > 0.5) return 0.2126 * r + 0.7152 * g + 0.0722 * b < 110;
  }
  return matchMedia("(prefers-color-scheme: dark)").matches && getComputedStyle(document.documentElement).colorScheme.includes("dark");
}

// Marks the root of a view while the page is dark. Returns a function that stops this.
function followTheme(root) {
  const look = () => root.classList.toggle("mlx-nb-dark", isDark(root));
  const observer = new MutationObserver(() => setTimeout(look, 50)), media = matchMedia("(prefers-color-scheme: dark)");
  for (const node of [document.documentElement, document.body]) observer.observe(node, { attributes: true });
  media.addEventListener("change", look);
  const first = requestAnimationFrame(look), later = setTimeout(look, 400);
  look();
  return () => {
    observer.disconnect();
    media.removeEventListener("change", look);
    cancelAnimationFrame(first);
    clearTimeout(later);
  };
}
