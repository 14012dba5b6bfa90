"use strict";
// The dialog of one identity: all of its images, its neighbours, and a way to the identities before and after it.

const dialog = byId("identity");

async function openIdentity(identity) {
  const table = identity.files ? await inflate(identity.files) : null;
  if (table && typeof table.files === "string") table.files = table.index.map((number) => number + table.files);
  const seeds = identity.seeds ? await inflate(identity.seeds) : null;
  const held = dialog.contains(document.activeElement) ? document.activeElement.getAttribute("aria-label") : null;
  const grid = element("div", { class: "images" }, ...images(identity, table, seeds));
  dialog.replaceChildren(
    heading(identity),
    element("div", { class: "body" },
      facts(identity),
      table ? order(grid) : element("p", { class: "note" }, "The table of its images does not fit into this page."),
      grid,
      onDisk(identity, table, grid)));
  if (!dialog.open) dialog.showModal();
  if (held) refocus(held);
  dialog.scrollTop = 0;
}

// The button of this label was replaced by its like: the keyboard stays on it, or on "close" where it can do no more.
function refocus(label) {
  const button = dialog.querySelector(`button[aria-label="${label}"]`);
  (button && !button.disabled ? button : byId("close")).focus();
}

function heading(identity) {
  const place = sheet.found.indexOf(identity);
  const step = (label, text, other) => element("button", { type: "button", "aria-label": label, disabled: !other,
    onclick: () => openIdentity(other) }, text);
  return element("header", {},
    element("div", {}, element("h2", { id: "identity-name" }, dot(identity.set), identity.name),
      SETS.length > 1 ? element("span", { class: "note" }, identity.set.name) : null),
    element("span", { class: "buttons" },
      step("previous identity", "←", place > 0 ? sheet.found[place - 1] : null),
      step("next identity", "→", place >= 0 ? sheet.found[place + 1] : null),
      element("button", { type: "button", id: "close", "aria-label": "close", onclick: () => dialog.close() }, "×")));
}

function facts(identity) {
  const set = identity.set;
  const list = element("dl", { class: "numbers" });
  const add = (name, value) => list.append(element("div", {}, element("dt", {}, name), element("dd", {}, value)));
  add("images", identity.count.toLocaleString("en"));
  add("consistency", shown(identity.consistency, 3));
  add("near the centre", identity.near === null ? "–" : `${(100 * identity.near).toFixed(0)} %`);
  if (identity.switchT !== null) add("mean switch step", shown(identity.switchT, 0));
  const near = element("div", { class: "near" });
  const box = (title, name, cosine, faces) => near.append(element("div", { class: "box" },
    element("p", { class: "note" }, `${title} `, name, ` · cosine ${shown(cosine, 3)}`), faces));
  if (identity.training !== null) {
    const faces = set.training[identity.training] || [];
    box("Nearest training identity", element("b", {}, identity.training), identity.trainingCosine,
      element("span", { class: "strip" }, ...faces.map((data) => picture(data, set.size, `training face of ${identity.training}`))));
  }
  const other = set.byName.get(identity.neighbour);
  if (other && other !== identity) {
    box("Nearest other identity", element("button", { type: "button", class: "link", onclick: () => openIdentity(other) }, other.name),
      identity.neighbourCosine, strip(other, 4));
  }
  return element("div", { class: "facts" }, list, near);
}

// A tile an image: thumbnail where the page has it, number, cosine, switch step and seed, and the way to its file.
function images(identity, table, seeds) {
  const set = identity.set;
  const count = table ? table.files.length : identity.thumbnails.length;
  return Array.from({ length: count }, (_, place) => {
    const file = table ? table.start + table.files[place] : null;
    const number = table && table.index ? table.index[place] : place;
    const cosine = table ? table.cosine[place] : null;
    const data = identity.thumbnails[place];
    const face = data
      ? picture(data, set.size, `image ${number} of ${identity.name}`)
      : element("span", { class: "absent", "data-file": file }, "on disk");
    const lines = [element("b", {}, `#${number}`), element("span", {}, `cos ${shown(cosine, 3)}`)];
    if (table && table.switch) lines.push(element("span", {}, table.switch[place] < 0 ? "no switch" : `t ${table.switch[place]}`));
    if (seeds) lines.push(element("span", { class: "seed", title: "seed" }, seeds[place]));
    if (table && table.copy[place]) lines.push(element("span", { class: "copy" }, `copy of ${table.copy[place]}`));
    const link = file !== null && set.address !== null;
    return element("figure", { "data-cosine": cosine, "data-place": place, title: file },
      element(link ? "a" : "span", link ? { href: address(set, file), target: "_blank", rel: "noopener" } : {}, face),
      element("figcaption", {}, ...lines));
  });
}

function address(set, file) {
  return set.address + file.split("/").map(encodeURIComponent).join("/");
}

function order(grid) {
  const arrange = (event) => {
    const key = event.target.value;
    grid.append(...[...grid.children].sort((a, b) => a.dataset[key] - b.dataset[key]));
  };
  return element("p", { class: "order" }, element("label", {}, "Order ",
    element("select", { onchange: arrange }, element("option", { value: "place" }, "as drawn"),
      element("option", { value: "cosine" }, "by cosine, lowest first"))),
  element("span", {}, "Number, cosine to the centre, step of the switch, seed."));
}

// Pictures that the page does not hold are read from their files only when asked for, so that opening it reads nothing.
function onDisk(identity, table, grid) {
  if (!table || identity.set.address === null || identity.thumbnails.length >= table.files.length) return null;
  const show = (event) => {
    grid.querySelectorAll(".absent").forEach((place) => {
      const image = element("img", { src: address(identity.set, place.dataset.file), alt: place.dataset.file });
      image.addEventListener("error", () => { place.textContent = "no file"; image.replaceWith(place); });
      place.replaceWith(image);
    });
    event.target.remove();
  };
  return element("p", {}, element("button", { type: "button", onclick: show }, "Show the other pictures from disk"));
}

dialog.addEventListener("click", (event) => {
  if (event.target === dialog) dialog.close(); // beside the dialog
});
document.addEventListener("keydown", (event) => { // of the document: a click between the tiles leaves the focus on none of them
  if (!dialog.open || event.target.matches("select, input")) return;
  const arrow = { ArrowLeft: "previous identity", ArrowRight: "next identity" }[event.key];
  if (arrow) dialog.querySelector(`button[aria-label="${arrow}"]`).click();
});
