"use strict";
// What the page shows of the identities: read from the JSON in the page; the tables of images are inflated when asked for.

const SETS = JSON.parse(document.getElementById("data").textContent || '{"sets":[]}').sets;
SETS.forEach((set, number) => {
  set.colour = `var(--c${(number % 8) + 1})`;
  set.identities = set.identities.map(([figures, files, seeds, thumbnails]) => {
    const [name, count, consistency, near, neighbour, neighbourCosine, training, trainingCosine, switchT] = figures;
    return { set, name, count, consistency, near, neighbour, neighbourCosine, training, trainingCosine, switchT,
      files, seeds, thumbnails };
  });
  set.byName = new Map(set.identities.map((identity) => [identity.name, identity]));
});

// The figures that can be sorted by and filtered: key, what people call it, digits behind the point.
const FIGURES = [
  { key: "consistency", title: "consistency", digits: 3 },
  { key: "near", title: "share near the centre", digits: 2 },
  { key: "switchT", title: "switch step", digits: 0 },
  { key: "trainingCosine", title: "nearest training identity", digits: 3 },
  { key: "neighbourCosine", title: "nearest other identity", digits: 3 },
  { key: "count", title: "images", digits: 0 },
];

function byId(id) {
  return document.getElementById(id);
}

// element("a", { href: "..." }, "text", child, ...): texts stay texts, whatever stands in them.
function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value === true) made.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

function shown(value, digits) {
  return value === null || value === undefined ? "–" : value.toFixed(digits);
}

// base64 of deflated JSON => its value
async function inflate(text) {
  const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Response(stream).json();
}

function picture(data, size, alt) {
  return element("img", { src: `data:image/webp;base64,${data}`, width: size, height: size, alt, decoding: "async" });
}

// The first thumbnails of an identity, side by side; empty places where the page holds none of them.
function strip(identity, places) {
  const size = identity.set.size;
  const row = element("span", { class: "strip" });
  identity.thumbnails.slice(0, places).forEach((data, number) => {
    row.append(picture(data, size, `${identity.name}, image ${number + 1}`));
  });
  if (identity.thumbnails.length === 0) row.append(element("span", { class: "absent" }, "not in this page: open for its files"));
  return row;
}

function dot(set) {
  return element("i", { class: "dot", style: `background:${set.colour}` });
}
