"use strict";
// Cards are made from the JSON of the page when they are looked at. Documents become text nodes, never HTML.
(() => {
  const PER_PAGE = 24, WEAKEST = 0.2; // the weakest mark that is still seen on paper
  const CONFIDENCE = ["high", "medium", "low"];
  const FILTERS = ["search", "owner", "category", "confidence", "certainty", "outcome", "error", "reconstruction", "order"];
  const get = (id) => document.getElementById(id);
  const box = get("cards");
  document.documentElement.classList.add("js");
  addEventListener("beforeprint", () => document.querySelectorAll("#comparison details").forEach((part) => (part.open = true)));
  if (!box) return;

  const data = JSON.parse(get("data").textContent);
  const cards = data.cards.map((values, index) => {
    const card = Object.fromEntries(data.columns.map((name, column) => [name, values[column]]));
    Object.assign(card, data.owners[card.of], { rank: index });
    card.anchor = `${card.pair}-${card.latent}`;
    card.home = `${card.owner} in ${card.pair}`;
    card.level = CONFIDENCE.indexOf(card.confidence) < 0 ? CONFIDENCE.length : CONFIDENCE.indexOf(card.confidence); // without a confidence: last
    return card;
  });
  const byAnchor = new Map(cards.map((card) => [card.anchor, card]));
  let shown = cards, page = 0;

  function make(tag, className, ...children) {
    const element = document.createElement(tag);
    if (className) element.className = className;
    element.append(...children.filter((child) => child !== null && child !== ""));
    return element;
  }
  const number = (value, digits = 2) => (value === null ? "–" : value.toFixed(digits).replace("-", "−"));
  const interval = (range, digits) => (range ? ` [${number(range[0], digits)}, ${number(range[1], digits)}]` : "");
  const fact = (name, ...value) => make("div", "", make("dt", "", name), make("dd", "", ...value));

  // Words of a card for the search, made when first needed.
  function wordsOf(card) {
    if (card.words === undefined) {
      const texts = card.documents.map((entry) => entry[3].map((piece) => (typeof piece === "string" ? piece : piece[0])).join(""));
      const human = card.human ? Object.values(card.human) : [];
      card.words = [card.label, card.pattern, card.description, card.category, card.class, card.home, card.anchor, ...human, ...texts].join("\n").toLowerCase();
    }
    return card.words;
  }

  function documentOf([source, tags, strongest, pieces], most) {
    const shown = make("div", "doc", make("small", "", [source, tags, number(strongest, 1)].filter(Boolean).join(" · ")));
    for (const piece of pieces) {
      if (typeof piece === "string") shown.append(piece);
      else if (piece.length === 1) shown.append(make("s", "", piece[0]));
      else {
        const mark = make("i", "", piece[0]);
        mark.style.setProperty("--a", Math.max(WEAKEST, Math.min(1, piece[1] / most)).toFixed(2));
        mark.title = String(piece[1]);
        shown.append(mark);
      }
    }
    return shown;
  }

  // Activations by powers of two: bars of logarithmic height, so that rare strong ones show.
  function histogramOf([lowest, counts]) {
    const most = Math.log1p(Math.max(...counts)), bars = make("span", "histogram");
    const bins = counts.map((count, bin) => `${lowest * 2 ** bin} to ${lowest * 2 ** (bin + 1)}: ${count.toLocaleString("en")}`);
    bars.title = `Activations (heights by the logarithm of the count)\n${bins.join("\n")}`;
    for (const count of counts) {
      const bar = make("i", "");
      bar.style.height = `${(14 * Math.log1p(count)) / most}px`;
      bars.append(bar);
    }
    return bars;
  }

  function headingOf(card) {
    if (card.human && card.human.label) return make("h4", "", card.human.label);
    if (card.label) return make("h4", "", card.label);
    return make("h4", "lost", card.outcome === "placed" ? "label withheld" : card.outcome);
  }

  function placeOf(card) {
    if (!card.category) return make("p", "lost", card.label ? card.outcome : "");
    const similar = card.similarity === null ? "" : ` · similarity ${number(card.similarity)}`;
    const below = ` · nearest category at ${number(card.similarity)}, below the floor`;
    const detail = card.class !== card.category ? (card.class ? ` · ${card.class}` : "") + similar : card.similarity === null ? "" : below;
    return make("p", "", card.category, make("span", "empty", detail));
  }

  function cardOf(card) {
    const article = make("article", "card");
    article.id = card.anchor;
    article.style.setProperty("--rgb", card.rgb);
    const facts = make("dl", "",
      fact("Δ-norm", number(card.delta)),
      fact("ν error", number(card.error, 3), make("span", "empty", interval(card.errorRange, 2))),
      fact("ν reconstruction", number(card.reconstruction, 3), make("span", "empty", interval(card.reconstructionRange, 2))),
      fact("fires on", `${card.frequency === null ? "–" : number(100 * card.frequency, 3)} % of tokens${card.numDocuments === null ? "" : `, in ${card.numDocuments.toLocaleString("en")} documents`}`),
      fact("max", number(card.max, 1)),
      fact("", card.dedicated ? "dedicated" : "free"),
      fact("ν", card.certainty));
    for (const [kind, value, low, high] of card.scores) facts.append(fact(kind, number(value), make("span", "empty", interval([low, high], 2))));
    if (card.histogram) facts.append(fact("", histogramOf(card.histogram)));
    const shares = card.shares.filter(([, share]) => share >= 0.05).map(([name, share]) => `${name} ${Math.round(100 * share)} %`);
    if (shares.length) facts.append(fact("on", shares.join(", ")));
    const judged = card.confidence ? ` Confidence ${card.confidence}${card.reason ? `: ${card.reason}` : ""}.` : card.reason ? ` ${card.reason}.` : "";
    article.append(
      make("span", "of", make("b", "", card.owner), ` only · ${card.pair} · ${card.latent}`),
      headingOf(card), placeOf(card), facts,
      make("p", "", [card.pattern, card.description].filter(Boolean).join(" — "), make("span", "empty", `${judged} Annotator: ${card.annotator}.`)));
    if (card.human) article.append(make("p", "", make("b", "", "By hand"), ` ${[card.human.label, card.human.category, card.human.note].filter(Boolean).join(" · ")} `, make("span", "empty", [card.human.who, `automatic label: ${card.label || card.outcome}`].filter(Boolean).join("; "))));
    if (card.twins.length) article.append(make("p", "empty", "Near-duplicates: ", ...card.twins.slice(0, 8).flatMap((latent) => [linkTo(`${card.pair}-${latent}`, String(latent)), " "]), card.twins.length > 8 ? `and ${card.twins.length - 8} more` : ""));
    const most = Math.max(...card.documents.map((entry) => entry[2]), 0) || 1;
    article.append(...card.documents.map((entry) => documentOf(entry, most)));
    if (!card.documents.length) article.append(make("p", "empty", "No documents on this card."));
    return article;
  }

  function linkTo(anchor, text) {
    if (!byAnchor.has(anchor)) return document.createTextNode(text);
    const link = make("a", "", text);
    link.href = `#${anchor}`;
    return link;
  }

  function orderBy(key) {
    if (key === "label" || key === "category") return (a, b) => a[key].localeCompare(b[key]);
    if (key === "frequency" || key === "max") return (a, b) => b[key] - a[key];
    if (key === "rank") return (a, b) => a.level - b.level || a.rank - b.rank;
    return (a, b) => Math.abs(a[key] ?? Infinity) - Math.abs(b[key] ?? Infinity);
  }

  function filter() {
    const value = Object.fromEntries(FILTERS.map((id) => [id, get(id).value]));
    const words = value.search.toLowerCase().split(/\s+/).filter(Boolean);
    const within = (card, key) => value[key] === get(key).max || (card[key] !== null && Math.abs(card[key]) <= Number(value[key]));
    shown = cards.filter((card) =>
      (!value.owner || card.home === value.owner) &&
      (!value.category || card.category === value.category || `class ${card.class}` === value.category) &&
      (!value.confidence || card.confidence === value.confidence) &&
      (!value.certainty || card.certainty === value.certainty) &&
      (!value.outcome || card.outcome === value.outcome) &&
      within(card, "error") && within(card, "reconstruction") &&
      words.every((word) => wordsOf(card).includes(word)));
    shown.sort(orderBy(value.order));
    for (const id of ["error", "reconstruction"]) get(id).parentNode.querySelector("output").textContent = Number(value[id]).toFixed(2);
    page = 0;
    render();
  }

  function render() {
    const pages = Math.max(1, Math.ceil(shown.length / PER_PAGE));
    page = Math.min(Math.max(page, 0), pages - 1);
    box.replaceChildren(...shown.slice(page * PER_PAGE, (page + 1) * PER_PAGE).map(cardOf));
    get("page").textContent = `page ${page + 1} of ${pages}`;
    get("count").textContent = `${shown.length.toLocaleString("en")} of ${cards.length.toLocaleString("en")} latents`;
    get("previous").disabled = page === 0;
    get("next").disabled = page === pages - 1;
  }

  // Shows the page that a card is on; filters that hide it are lifted.
  function open(anchor) {
    const card = byAnchor.get(anchor);
    if (!card) return;
    if (!shown.includes(card)) reset();
    page = Math.floor(shown.indexOf(card) / PER_PAGE);
    render();
    const found = get(anchor);
    found.classList.add("target");
    found.scrollIntoView();
  }

  function reset() {
    for (const id of FILTERS) get(id).value = id === "order" ? "rank" : get(id).max || "";
    filter();
  }

  function addOptions(id, values) {
    for (const value of values) {
      const option = make("option", "", value.startsWith("class ") ? `all of ${value.slice(6)}` : value);
      option.value = value;
      get(id).append(option);
    }
    get(id).hidden = values.length < 2;
  }
  const distinct = (key) => [...new Set(cards.map((card) => card[key]).filter(Boolean))];
  const classes = distinct("class").filter((name) => cards.some((card) => card.class === name && card.category !== name));
  addOptions("owner", distinct("home"));
  addOptions("category", [...distinct("category").sort(), ...classes.sort().map((name) => `class ${name}`)]);
  addOptions("confidence", CONFIDENCE.filter((level) => cards.some((card) => card.confidence === level)));
  addOptions("certainty", distinct("certainty").sort());
  addOptions("outcome", distinct("outcome").sort());
  for (const id of ["error", "reconstruction"]) {
    const largest = Math.max(...cards.map((card) => Math.abs(card[id] ?? 0)));
    get(id).max = get(id).value = (Math.ceil(100 * largest) / 100 || 0.01).toFixed(2);
  }
  for (const id of FILTERS) get(id).addEventListener("input", filter);
  get("reset").addEventListener("click", reset);
  get("previous").addEventListener("click", () => { page -= 1; render(); });
  get("next").addEventListener("click", () => { page += 1; render(); });
  addEventListener("hashchange", () => open(decodeURIComponent(location.hash.slice(1))));
  document.addEventListener("click", (event) => {
    const link = event.target.closest('a[href^="#"]');
    if (link && link.hash === location.hash) open(decodeURIComponent(link.hash.slice(1)));
  });
  filter();
  open(decodeURIComponent(location.hash.slice(1)));
})();
