"use strict";
// The sheet of identities: filter, sort, a page at a time.

const PAGE = 12;
const PLACES = 8;
const sheet = { set: 0, shown: PAGE, found: [] };

// One identity: its name, and of every set given its figures and its strip.
function identityCard(members) {
  const [first] = members;
  const isAlone = members.length === 1;
  const figures = (identity) => element("span", { class: "figures" },
    isAlone ? null : dot(identity.set),
    figureText("consistency", shown(identity.consistency, 3)),
    identity.switchT === null ? null : figureText("switch", shown(identity.switchT, 0)),
    identity.trainingCosine === null ? null : figureText("training", shown(identity.trainingCosine, 3)));
  return element("button", { type: "button", class: "identity", "data-name": first.name, onclick: () => openIdentity(first) },
    element("span", { class: "head" }, element("span", { class: "name" }, first.name), isAlone ? figures(first) : null),
    ...members.map((identity) => element("span", { class: "member" }, isAlone ? null : figures(identity),
      strip(identity, PLACES))));
}

function figureText(name, value) {
  return element("span", {}, `${name} `, element("b", {}, value));
}

function fillEnds() {
  SETS.forEach((set) => {
    const ranked = set.identities.filter((identity) => identity.consistency !== null);
    ranked.sort((a, b) => b.consistency - a.consistency);
    const best = ranked.slice(0, 4);
    const worst = ranked.slice(best.length).slice(-4).reverse();
    const groups = [["Most consistent", best], ["Least consistent", worst]].filter(([, group]) => group.length);
    byId("ends").append(element("div", { class: "card" },
      ...groups.flatMap(([title, group]) => [
        element("h3", {}, dot(set), SETS.length > 1 ? `${title} · ${set.name}` : title),
        element("div", { class: "end" }, ...group.map((identity) => identityCard([identity])))])));
  });
}

function present(key) {
  return SETS[sheet.set].identities.map((identity) => identity[key]).filter((value) => value !== null);
}

// What can be sorted by and filtered depends on the data set: one-stage sets have no switch.
function fillControls() {
  const sort = byId("sort");
  const before = sort.value || "consistency";
  const available = FIGURES.filter(({ key }) => new Set(present(key)).size > 1);
  sort.replaceChildren(...available.map(({ key, title }) => element("option", { value: key }, title)),
    element("option", { value: "name" }, "name"));
  sort.value = [...sort.options].some((option) => option.value === before) ? before : "name";
  byId("ranges").replaceChildren(...available.map(({ key, title, digits }) => {
    const values = present(key);
    const bounds = { from: values.reduce((a, b) => Math.min(a, b)), to: values.reduce((a, b) => Math.max(a, b)) };
    const field = (end, value) => element("input", { type: "number", step: "any", inputmode: "decimal", "data-key": key,
      "data-end": end, placeholder: shown(value, digits), "aria-label": `${title}, ${end}`, oninput: refresh });
    return element("fieldset", {}, element("legend", {}, title), field("from", bounds.from), "to", field("to", bounds.to));
  }));
}

function passes(identity) {
  if (!identity.name.toLowerCase().includes(byId("query").value.trim().toLowerCase())) return false;
  return [...byId("ranges").querySelectorAll("input")].every((input) => {
    if (input.value === "") return true;
    const value = identity[input.dataset.key];
    return value !== null && (input.dataset.end === "from" ? value >= Number(input.value) : value <= Number(input.value));
  });
}

function compare(key, descending) {
  const sign = descending ? -1 : 1;
  return (a, b) => {
    if (key === "name") return sign * a.name.localeCompare(b.name, "en", { numeric: true });
    if (a[key] === null || b[key] === null) return (a[key] === null) - (b[key] === null); // absent ones last
    return sign * (a[key] - b[key]);
  };
}

function refresh() {
  sheet.shown = PAGE;
  sheet.found = SETS[sheet.set].identities.filter(passes);
  sheet.found.sort(compare(byId("sort").value, byId("direction").getAttribute("aria-pressed") === "true"));
  draw();
}

function draw() {
  const set = SETS[sheet.set];
  const others = byId("beside").checked ? SETS.filter((other) => other !== set) : [];
  byId("sheet").replaceChildren(...sheet.found.slice(0, sheet.shown).map((identity) => identityCard(
    [identity, ...others.map((other) => other.byName.get(identity.name)).filter(Boolean)])));
  const held = set.identities.filter((identity) => identity.thumbnails.length).length;
  const parts = [`${sheet.found.length.toLocaleString("en")} of ${set.total.toLocaleString("en")} identities`];
  if (set.identities.length < set.total) parts.push(`${set.identities.length.toLocaleString("en")} are in this page`);
  if (held < set.identities.length) parts.push(`${held.toLocaleString("en")} with pictures, the extremes and an even sample`);
  byId("count").textContent = parts.join(" · ");
  byId("more").hidden = sheet.shown >= sheet.found.length;
}

function choose(number) {
  sheet.set = number;
  [...byId("sets").children].forEach((button, other) => button.setAttribute("aria-pressed", String(other === number)));
  fillControls();
  refresh();
}

function startSheet() {
  byId("sets").append(...SETS.map((set, number) => element("button", { type: "button", onclick: () => choose(number) },
    dot(set), set.name)));
  byId("sets").hidden = SETS.length < 2;
  const isShared = SETS.slice(1).some((set) => set.identities.some((identity) => SETS[0].byName.has(identity.name)));
  byId("beside-label").hidden = !isShared;
  byId("ranges-box").open = window.matchMedia("(min-width: 641px)").matches;
  byId("query").addEventListener("input", refresh);
  byId("sort").addEventListener("change", refresh);
  byId("beside").addEventListener("change", draw);
  byId("more").addEventListener("click", () => { sheet.shown += 2 * PAGE; draw(); });
  byId("direction").addEventListener("click", (event) => {
    const descending = event.target.getAttribute("aria-pressed") !== "true";
    event.target.setAttribute("aria-pressed", String(descending));
    event.target.textContent = descending ? "descending" : "ascending";
    refresh();
  });
  fillEnds();
  choose(0);
}

startSheet();
