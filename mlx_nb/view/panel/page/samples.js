// The pages Samples (answers to sample prompts at several updates, side by side) and Chat.

const COLUMNS = 4; // answers side by side, including the base's

// [text, whether it is missing in the other text], word by word.
function wordChanges(text, other) {
  const one = text.match(/\s+|[^\s]+/g) ?? [], two = other.match(/\s+|[^\s]+/g) ?? [];
  if (one.length * two.length > 250000) return [[text, false]];
  const width = two.length + 1, longest = new Uint16Array((one.length + 1) * width);
  for (let i = one.length - 1; i >= 0; i -= 1)
    for (let j = two.length - 1; j >= 0; j -= 1)
      longest[i * width + j] = one[i] === two[j] ? longest[(i + 1) * width + j + 1] + 1
        : Math.max(longest[(i + 1) * width + j], longest[i * width + j + 1]);
  const parts = [];
  const put = (word, isNew) => (parts.at(-1)?.[1] === isNew ? (parts.at(-1)[0] += word) : parts.push([word, isNew]));
  for (let i = 0, j = 0; i < one.length; ) {
    if (j < two.length && one[i] === two[j]) { put(one[i], false); i += 1; j += 1; }
    else if (j < two.length && longest[i * width + j + 1] > longest[(i + 1) * width + j]) j += 1;
    else { put(one[i], one[i].trim() !== ""); i += 1; }
  }
  return parts;
}

const marked = (text, other) => other === null ? [text]
  : wordChanges(text, other).map(([part, isNew]) => (isNew ? h("mark", { title: "differs from the answer to the left" }, part) : part));

function samplesPage(page) {
  const { model } = page;
  const prompt = h("input", { type: "text", class: "mlx-nb-field", placeholder: "a prompt to keep …", "aria-label": "a prompt to keep" });
  const keep = page.button("keep", "Keep", "answer this prompt at every validation", () => {
    if (!prompt.value.trim()) return prompt.focus();
    page.act({ do: "keep", prompt: prompt.value }, page.later("keeping the prompt; the answer follows"));
    prompt.value = "";
  });
  const now = page.button("sample", "Answer now", "answer the sample prompts at this update",
    () => page.act({ do: "sample" }, page.later("answering the sample prompts")));
  prompt.addEventListener("keydown", (event) => { if (event.key === "Enter") keep.click(); });
  const none = h("div", { class: "mlx-nb-note" }, "There are no sample prompts yet. A prompt that you keep is answered at every validation, and the answers appear here side by side.");
  const tables = h("div", {});
  const el = h("div", {}, h("form", { class: "mlx-nb-line", onsubmit: (event) => event.preventDefault() }, prompt, keep, now), none, tables);

  function table({ prompt: text, base, answers }) {
    const columns = [...(base === null ? [] : [["base", base]]), ...answers.map(([step, answer]) => [`update ${step}`, answer])];
    const first = base === null ? [] : [columns[0]], rest = columns.slice(first.length);
    const shown = [...first, ...rest.slice(-(COLUMNS - first.length))];
    const forget = h("button", { type: "button", class: "mlx-nb-small", title: "stop answering this prompt", onclick: () => page.act({ do: "forget", prompt: text }, "removing the prompt …") }, "Remove");
    const body = shown.length
      ? h("div", { class: "mlx-nb-scrolls" }, h("table", { class: "mlx-nb-answers" },
          h("thead", {}, h("tr", {}, shown.map(([label]) => h("th", { scope: "col" }, label)))),
          h("tbody", {}, h("tr", {}, shown.map(([, answer], at) => h("td", {}, marked(answer, at ? shown[at - 1][1] : null)))))))
      : h("div", { class: "mlx-nb-note" }, "not answered yet");
    return h("section", { class: "mlx-nb-sample" }, h("div", { class: "mlx-nb-prompt" }, h("b", {}, text), forget), body);
  }

  function draw() {
    const samples = model.get("samples");
    none.hidden = samples.length > 0;
    sync(tables, samples, (sample) => sample.prompt, table);
  }
  return { el, draw, on: ["samples"] };
}

function chatPage(page) {
  const { model } = page;
  const talk = h("div", { class: "mlx-nb-talk", role: "log", "aria-live": "polite", tabindex: 0, "aria-label": "conversation" });
  const message = h("textarea", { class: "mlx-nb-field", rows: 2, placeholder: "talk to the model at this update …", "aria-label": "message" });
  const base = h("input", { type: "checkbox" });
  const send = page.button("chat", "Send", "send to the current model (Enter)", () => {
    const text = message.value.trim();
    if (!text || busy()) return;
    page.act({ do: "chat", text, base: base.checked }, page.isRunning() ? "sent; the answer follows after this update …" : page.isBusy() ? "sent; the answer follows after the current activity …" : "sent …");
    message.value = "";
    message.focus();
  });
  const stop = h("button", { type: "button", class: "mlx-nb-action", onclick: () => page.act({ do: "enough" }, "ending the answer …") }, "■ Stop answering");
  const newChat = h("button", { type: "button", class: "mlx-nb-action", onclick: () => page.act({ do: "new chat" }, "starting a new chat …") }, "New chat");
  const keep = h("button", { type: "button", class: "mlx-nb-action", title: "answer the last message at every validation", onclick: () => {
    page.act({ do: "keep last" }, page.later("keeping the message; the answer follows"));
  } }, "Keep as sample");
  message.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); send.click(); }
  });
  const el = h("div", {}, talk, message,
    h("div", { class: "mlx-nb-line" }, send, stop, keep, newChat, h("label", { class: "mlx-nb-check" }, base, "use the base")));
  const busy = () => model.get("talk").some(({ done }) => !done);

  function draw() {
    const turns = model.get("talk"), isAtEnd = talk.scrollHeight - talk.scrollTop - talk.clientHeight < 30;
    sync(talk, turns, (_, at) => at, ({ role, content, by, update, done }) =>
      h("div", { class: `mlx-nb-turn mlx-nb-${role}` },
        h("div", { class: "mlx-nb-who" }, role === "user" ? "you" : by === "base" ? "base model" : `model at update ${update}`),
        h("div", { class: "mlx-nb-words" }, content || (done ? "(empty)" : "…"), done ? "" : h("span", { class: "mlx-nb-caret" }, "▍"))));
    if (!turns.length) talk.replaceChildren(h("div", { class: "mlx-nb-note" }, "Write a message. The current model answers, between two updates while it trains."));
    if (isAtEnd) talk.scrollTop = talk.scrollHeight;
    stop.hidden = !busy();
    send.hidden = busy();
    keep.disabled = newChat.disabled = !turns.length;
  }
  return { el, draw, on: ["talk"] };
}
