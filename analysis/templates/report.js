"use strict";
addEventListener("beforeprint", () => document.querySelectorAll("#comparison details").forEach((part) => (part.open = true)));
document.documentElement.classList.add("js");
const box = document.querySelector(".cards");
const cards = box ? [...box.children] : [];
const text = new Map(cards.map((card) => [card, card.textContent.toLowerCase()]));
const [search, owner, order] = ["search", "owner", "order"].map((id) => document.getElementById(id));
const count = document.getElementById("count");
function compare(a, b) {
  const key = order.value, x = a.dataset[key], y = b.dataset[key];
  if (key === "label" || key === "category") return x.localeCompare(y);
  return ["frequency", "max", "delta"].includes(key) ? y - x : x - y;
}
function update() {
  const words = search.value.toLowerCase().split(/\s+/);
  for (const card of cards) {
    card.hidden = !(words.every((word) => text.get(card).includes(word)) && (!owner.value || card.dataset.of === owner.value));
  }
  box.append(...[...cards].sort(compare));
  count.textContent = cards.filter((card) => !card.hidden).length + " of " + cards.length;
}
if (box) {
  for (const control of [search, owner, order]) control.addEventListener("input", update);
  update();
}
