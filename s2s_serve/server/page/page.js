// The page of the server. Text from data is only ever put in as textContent.
"use strict";

const at = (id) => document.getElementById(id);
// What is known about the model: the answer of /v1/card.
let model = { features: [], columns: [], title: null, card: {} };
let token = sessionStorage.getItem("token") || "";
let numbered = 0;

function make(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

// ---------------------------------------------------------------- talking with the server

// Ids of 64 bits do not fit into the numbers of JavaScript, so they are read and written as BigInt.
function fromJson(text) {
  return JSON.parse(text, (key, value, context) => {
    const large = typeof value === "number" && !Number.isSafeInteger(value);
    return large && context && /^-?\d+$/.test(context.source) ? BigInt(context.source) : value;
  });
}

function toJson(value) {
  return JSON.stringify(value, (key, each) => {
    if (typeof each !== "bigint") return each;
    return JSON.rawJSON ? JSON.rawJSON(String(each)) : Number(each);
  });
}

class Refused extends Error {}

async function ask(path, body, signal) {
  const headers = {};
  if (token) headers.Authorization = `Bearer ${token}`;
  const request = { headers, signal };
  if (body !== undefined) {
    request.method = "POST";
    request.body = toJson(body);
    headers["Content-Type"] = "application/json";
  }
  const response = await fetch(path, request);
  const answer = fromJson(await response.text());
  if (response.status === 401) at("login").hidden = false;
  if (!response.ok) throw new Refused(answer.error);
  return answer;
}

async function attempt(work) {
  at("problem").textContent = "";
  try {
    await work();
  } catch (error) {
    if (error.name === "AbortError") return;
    const lost = "The server cannot be reached.";
    at("problem").textContent = error instanceof Refused ? error.message : lost;
    at("said").textContent = "";
  }
}

// ---------------------------------------------------------------- ids and titles

function idOf(text, isText) {
  const quoted = /^"(.*)"$/.exec(text);
  if (quoted) return quoted[1];
  if (isText || !/^-?\d+(\.\d+)?$/.test(text)) return text;
  const number = Number(text);
  return Number.isSafeInteger(number) || text.includes(".") ? number : BigInt(text);
}

function entryOf(text, isText) {
  const ids = text.split(",").map((each) => each.trim()).filter((each) => each);
  if (!ids.length) return null;
  return ids.length === 1 ? idOf(ids[0], isText) : ids.map((each) => idOf(each, isText));
}

function holdsText(column) {
  return model.card.features.some((each) => each.column === column && each.kind === "text");
}

function textOf(value) {
  if (value === null || value === undefined) return "";
  return Array.isArray(value) ? value.map(textOf).join(", ") : String(value);
}

function titleOf(item) {
  const title = model.title === null ? "" : textOf(item[model.title]);
  return title || textOf(item.item);
}

// ---------------------------------------------------------------- events of the history

function addEvent(item) {
  const row = make("div");
  const event = make("li", {}, row);
  for (const name of model.features) {
    const id = `field${++numbered}`;
    const input = make("input", { id, name, autocomplete: "off" });
    const label = make("label", { for: id }, name);
    const field = make("div", { class: "field" }, label, input);
    if (name === model.card.item_feature) suggestItems(input, field, row);
    row.append(field);
  }
  const remove = make("button", { type: "button", "aria-label": "Remove this event" }, "✕");
  remove.addEventListener("click", () => {
    const next = event.nextElementSibling || event.previousElementSibling;
    event.remove();
    (next ? next.querySelector("input") : at("add")).focus();
  });
  row.append(remove);
  at("events").append(event);
  if (item) fill(row, item);
  return row;
}

// Puts an item into the fields of an event: its id, and what its columns say about other features.
function fill(row, item) {
  for (const input of row.querySelectorAll("input")) {
    if (input.name === model.card.item_feature) {
      input.value = textOf(item.item);
      let title = input.parentElement.querySelector(".quiet");
      if (!title) input.parentElement.append((title = make("div", { class: "quiet" })));
      title.textContent = titleOf(item) === input.value ? "" : titleOf(item);
    } else if (model.columns.includes(input.name)) {
      input.value = textOf(item[input.name]);
    }
  }
}

function history() {
  const found = Object.fromEntries(model.features.map((name) => [name, []]));
  for (const row of at("events").querySelectorAll("li > div")) {
    const inputs = [...row.querySelectorAll("input")];
    if (inputs.every((input) => !input.value.trim())) continue;
    for (const input of inputs) {
      found[input.name].push(entryOf(input.value, holdsText(input.name)));
    }
  }
  return found;
}

// ---------------------------------------------------------------- suggestions while an item is typed

function suggestItems(input, field, row) {
  const list = make("ul", { class: "options", role: "listbox", id: `${input.id}_options`, "aria-label": "Suggested items" });
  list.hidden = true;
  field.append(list);
  const roles = { role: "combobox", "aria-autocomplete": "list", "aria-expanded": "false", "aria-controls": list.id };
  for (const [name, value] of Object.entries(roles)) input.setAttribute(name, value);
  let found = [];
  let chosen = -1;
  let asked = null;
  let timer = 0;

  function show(items) {
    found = items;
    list.replaceChildren(...items.map((item, n) => {
      const text = titleOf(item) === textOf(item.item) ? textOf(item.item) : `${titleOf(item)} (${textOf(item.item)})`;
      const option = make("li", { role: "option", id: `${list.id}_${n}`, "aria-selected": "false" }, text);
      // Before the field loses the focus, which would close the list.
      option.addEventListener("mousedown", (event) => { event.preventDefault(); choose(n); });
      return option;
    }));
    list.hidden = !items.length;
    input.setAttribute("aria-expanded", String(!list.hidden));
    mark(-1);
  }

  function mark(n) {
    chosen = n;
    [...list.children].forEach((option, each) => option.setAttribute("aria-selected", String(each === n)));
    if (n < 0) input.removeAttribute("aria-activedescendant");
    else {
      input.setAttribute("aria-activedescendant", list.children[n].id);
      list.children[n].scrollIntoView({ block: "nearest" });
    }
  }

  function choose(n) {
    fill(row, found[n]);
    close();
  }

  function close() {
    clearTimeout(timer);
    if (asked) asked.abort();
    show([]);
  }

  input.addEventListener("input", () => {
    clearTimeout(timer);
    if (asked) asked.abort();
    timer = setTimeout(() => attempt(async () => {
      asked = new AbortController();
      const path = `v1/items?limit=8&query=${encodeURIComponent(input.value)}`;
      show((await ask(path, undefined, asked.signal)).items);
    }), 120);
  });
  input.addEventListener("keydown", (event) => {
    if (list.hidden) return;
    const last = found.length - 1;
    if (event.key === "ArrowDown") mark(chosen === last ? 0 : chosen + 1);
    else if (event.key === "ArrowUp") mark(chosen <= 0 ? last : chosen - 1);
    else if (event.key === "Enter" && chosen >= 0) choose(chosen);
    else if (event.key === "Escape") close();
    else return;
    event.preventDefault();
  });
  input.addEventListener("blur", close);
}

// ---------------------------------------------------------------- answers

async function showItems(list, ids, scores) {
  const path = `v1/items?items=${encodeURIComponent(toJson(ids))}`;
  const known = ids.length ? (await ask(path)).items : [];
  const described = new Map(known.map((item) => [item.item, item]));
  list.replaceChildren(...ids.map((id, n) => {
    const item = described.get(id) || { item: id };
    const title = titleOf(item);
    const row = make("div", { class: "found" }, make("span", { class: "title" }, title));
    if (title !== textOf(id)) row.append(make("span", { class: "quiet" }, textOf(id)));
    row.append(make("span", { class: "score" }, scores[n] === null ? "" : Number(scores[n]).toFixed(4)));
    const nearest = make("button", { type: "button", "aria-label": `Nearest to ${title}` }, "Nearest");
    nearest.addEventListener("click", () => attempt(() => showNearest(id, title)));
    const add = make("button", { type: "button", "aria-label": `Add ${title} to the history` }, "Add");
    add.addEventListener("click", () => {
      dropEmpty();
      addEvent(item);
      attempt(recommend);
    });
    row.append(nearest, add);
    return make("li", {}, row);
  }));
}

function dropEmpty() {
  for (const event of [...at("events").children]) {
    if ([...event.querySelectorAll("input")].every((input) => !input.value.trim())) event.remove();
  }
}

async function recommend() {
  const answer = await ask("v1/recommend", { histories: [history()], k: Number(at("k").value) });
  const [result] = answer.results;
  await showItems(at("answer"), result.items, result.scores);
  const events = result.unknown === 1 ? "1 event was" : `${result.unknown} events were`;
  const unknown = result.unknown ? ` ${events} unknown to the model.` : "";
  const by = { model: "the model", popularity: "popularity" };
  at("said").textContent = `${result.items.length} items, ranked by ${by[result.by] || result.by}.${unknown}`;
  at("version").textContent = `version ${answer.version}`;
}

async function showNearest(id, title) {
  const answer = await ask("v1/similar", { item: id, k: Number(at("k").value) });
  at("nearest_title").textContent = `Nearest to ${title}`;
  await showItems(at("near"), answer.items, answer.scores);
  at("nearest").hidden = false;
  at("nearest").focus();
}

// A value of the model's card: numbers are rounded, a list of objects is a table, other objects can be opened.
function described(value) {
  if (typeof value === "number" && !Number.isInteger(value)) return String(Number(value.toPrecision(4)));
  if (value === null || typeof value !== "object") return textOf(value);
  const isObject = (each) => each !== null && typeof each === "object";
  if (Array.isArray(value)) return value.some(isObject) ? table(value.filter(isObject)) : textOf(value);
  const count = Object.keys(value).length;
  if (!count) return "";
  return make("details", {}, make("summary", {}, count === 1 ? "1 value" : `${count} values`), definitions(value));
}

function definitions(value) {
  const list = make("dl");
  for (const [name, each] of Object.entries(value)) {
    list.append(make("dt", {}, name), make("dd", {}, described(each)));
  }
  return list;
}

function table(rows) {
  const names = [...new Set(rows.flatMap((row) => Object.keys(row)))];
  const head = make("tr", {}, ...names.map((name) => make("th", { scope: "col" }, name)));
  const body = rows.map((row) => make("tr", {}, ...names.map((name) => make("td", {}, described(row[name] ?? null)))));
  return make("div", { class: "wide", tabindex: "0", role: "group", "aria-label": names.join(", ") },
    make("table", {}, make("thead", {}, head), make("tbody", {}, ...body)));
}

async function start() {
  model = await ask("v1/card");
  at("login").hidden = true;
  at("version").textContent = `version ${model.version}`;
  at("card").replaceChildren(definitions(model.card));
  at("events").replaceChildren();
  addEvent();
}

at("ask").addEventListener("submit", (event) => { event.preventDefault(); attempt(recommend); });
at("add").addEventListener("click", () => addEvent().querySelector("input").focus());
at("clear").addEventListener("click", () => {
  at("events").replaceChildren();
  at("answer").replaceChildren();
  at("near").replaceChildren();
  at("nearest").hidden = true;
  at("said").textContent = "";
  addEvent().querySelector("input").focus();
});
at("login").addEventListener("submit", (event) => {
  event.preventDefault();
  token = at("token").value;
  sessionStorage.setItem("token", token);
  attempt(start);
});
attempt(start);
