"use strict";
// Definitions of metrics beside their names: on hover, on focus, on tap; Escape puts them away.

const tip = byId("tip");

function showTip(button) {
  tip.textContent = byId(`def-${button.dataset.term}`).textContent;
  tip.hidden = false;
  const at = button.getBoundingClientRect();
  const left = Math.max(12, Math.min(at.left, document.documentElement.clientWidth - tip.offsetWidth - 12));
  const below = at.bottom + 8 + tip.offsetHeight < window.innerHeight;
  tip.style.left = `${left}px`;
  tip.style.top = `${below ? at.bottom + 8 : at.top - 8 - tip.offsetHeight}px`;
}

function hideTip() {
  tip.hidden = true;
}

document.querySelectorAll(".term").forEach((button) => {
  button.addEventListener("mouseenter", () => showTip(button));
  button.addEventListener("focus", () => showTip(button));
  button.addEventListener("click", () => showTip(button));
  button.addEventListener("mouseleave", hideTip);
  button.addEventListener("blur", hideTip);
});
document.addEventListener("keydown", (event) => { if (event.key === "Escape") hideTip(); });
window.addEventListener("scroll", hideTip, { passive: true });
