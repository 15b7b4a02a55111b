// Draws the trees that the page carries as data: zoom, search, details, keyboard. Asks nobody for anything.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const find = (name) => document.querySelector(`[data-testid="${name}"]`);
  const graph = find("graph"), details = find("details"), trail = find("trail"), said = find("matches");
  const search = find("search"), hint = find("hint");
  const ROW = 20; // pixels; as in the style sheet
  const MOST = 4000; // elements at once; the largest
  const STEPS = [0.002, 0.01, 0.05, 0.15]; // of the whole run: where the colour of a difference gets stronger
  const state = { kind: data.first, process: "", side: "after", zoom: 0, query: "" };
  let tree = null; // what is drawn: columns as in the data, and what `prepare` adds
  let drawn = new Map(); // number of a node → its element

  // ---- words

  const seconds = (value) => {
    const size = Math.abs(value);
    if (size >= 1000) return `${Math.round(value).toLocaleString("en")} s`;
    for (const [unit, factor] of [["s", 1], ["ms", 1e3], ["µs", 1e6]]) {
      const shown = size * factor;
      if (shown >= 0.9995) return `${(value * factor).toFixed(shown < 9.995 ? 2 : shown < 99.95 ? 1 : 0)} ${unit}`;
    }
    return "0 s";
  };
  const percent = (share) => {
    const value = 100 * (Number.isFinite(share) ? share : 0);
    return `${value.toFixed(Math.abs(value) >= 9.95 || value === 0 ? 0 : 1)} %`;
  };
  const signed = (text) => (text.startsWith("-") ? text.replace("-", "−") : `+${text}`);
  const frameOf = (node) => tree.frames[tree.frame[node]];
  const nameOf = (node) => frameOf(node)[0];
  const placeOf = (node) => {
    const [, file, line] = frameOf(node);
    return line ? `${file}:${line}` : file;
  };
  const timeOf = (node) => (state.side === "before" ? tree.before : tree.total)[node];
  const shareOf = (node) => timeOf(node) / timeOf(0);

  function element(kind, text, attributes = {}) {
    const made = document.createElement(kind);
    made.textContent = text;
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    return made;
  }

  // ---- the tree

  function prepare() {
    tree = data.graphs.find((each) => each.kind === state.kind && each.process === state.process).tree;
    tree.children = tree.frame.map(() => []);
    for (let node = 1; node < tree.frame.length; node++) tree.children[tree.parent[node]].push(node);
    const most = (node) => (data.compared ? Math.max(tree.before[node], tree.total[node]) : tree.total[node]);
    for (const each of tree.children) each.sort((a, b) => most(b) - most(a) || a - b);
  }

  // Nodes below the one that is looked at, with their places in shares of its width; what is less than a pixel is none.
  function layout() {
    const whole = timeOf(state.zoom), least = 1 / Math.max(320, graph.clientWidth);
    const found = [{ node: state.zoom, left: 0, width: whole > 0 ? 1 : 0, depth: 0 }];
    let hidden = 0;
    for (let next = 0; next < found.length; next++) {
      const { node, left, depth } = found[next];
      let at = left;
      for (const child of tree.children[node]) {
        const width = whole > 0 ? timeOf(child) / whole : 0;
        if (width >= least) found.push({ node: child, left: at, width, depth: depth + 1 });
        else hidden++;
        at += width;
      }
    }
    found.sort((a, b) => b.width - a.width || a.depth - b.depth);
    return { shown: found.slice(0, MOST), hidden: hidden + Math.max(0, found.length - MOST) };
  }

  function colourOf(node) {
    if (data.compared) {
      const whole = Math.max(tree.before[0], tree.total[0]), change = (tree.total[node] - tree.before[node]) / whole;
      const strength = STEPS.filter((each) => Math.abs(change) >= each).length;
      return strength === 0 ? "same" : `${change > 0 ? "slower" : "faster"} strength${strength}`;
    }
    let sum = 0;
    for (const letter of nameOf(node)) sum = (sum * 31 + letter.codePointAt(0)) % 997;
    return `${frameOf(node)[3]} shade${sum % 3}`;
  }

  function draw() {
    const had = graph.contains(document.activeElement) ? Number(document.activeElement.dataset.node) : -1;
    const { shown, hidden } = layout(), fragment = document.createDocumentFragment();
    drawn = new Map();
    let deepest = 0;
    for (const { node, left, width, depth } of shown) {
      const label = `${nameOf(node)}, ${seconds(timeOf(node))}, ${percent(shareOf(node))}`;
      const pixels = width * graph.clientWidth;
      const made = element("div", pixels > 28 ? nameOf(node) : "", {
        role: "treeitem", tabindex: "-1", "data-node": node, "data-testid": "frame", "data-name": nameOf(node),
        "aria-level": depth + 1, "aria-label": label, class: `frame ${colourOf(node)}${pixels < 5 ? " thin" : ""}`,
      });
      made.style.left = `${100 * left}%`;
      made.style.width = `${100 * width}%`;
      made.style.top = `${ROW * depth}px`;
      drawn.set(node, made);
      fragment.append(made);
      deepest = Math.max(deepest, depth);
    }
    graph.style.height = `${ROW * (deepest + 1)}px`;
    graph.replaceChildren(fragment);
    const small = hidden + (state.zoom === 0 ? tree.left_out : 0);
    hint.textContent = small ? `${small.toLocaleString("en")} frames are too narrow to be drawn: zoom in to see more` : "";
    mark();
    drawTrail();
    const first = drawn.get(had) || drawn.get(state.zoom);
    if (first) first.tabIndex = 0;
    if (first && had >= 0) first.focus();
    tell(first ? Number(first.dataset.node) : state.zoom);
  }

  function drawTrail() {
    const way = [];
    for (let node = state.zoom; ; node = tree.parent[node]) {
      way.unshift(node);
      if (node === 0) break;
    }
    const steps = way.length > 6 ? [way[0], -1, ...way.slice(-4)] : way;
    trail.replaceChildren(...steps.map((node) => {
      if (node < 0) return element("span", "…");
      const button = element("button", nameOf(node), { type: "button", "data-zoom": node });
      if (node === state.zoom) button.setAttribute("aria-current", "true");
      return button;
    }));
    find("reset").disabled = state.zoom === 0;
  }

  function show() {
    prepare();
    state.zoom = 0;
    for (const button of document.querySelectorAll("[data-kind], [data-side]")) {
      const value = button.dataset.kind || button.dataset.side;
      button.setAttribute("aria-pressed", String(value === state.kind || value === state.side));
    }
    const empty = tree.frame.length === 0;
    find("empty").hidden = !empty;
    find("empty").textContent = data.empty[state.kind];
    find("canvas").hidden = empty;
    find("unit").textContent = data.units[state.kind];
    if (!empty) draw();
  }

  function zoom(node) {
    // What only one of two runs has is nothing in the other's widths.
    if (timeOf(node) <= 0) return;
    state.zoom = node;
    draw();
    graph.parentElement.scrollTop = 0;
  }

  // ---- details

  function tell(node) {
    const lines = [placeOf(node)], total = tree.total[node];
    if (data.compared) {
      const before = tree.before[node], change = total - before;
      const relative = before === 0 ? "new" : total === 0 ? "gone" : signed(percent(change / before));
      lines.push(`before ${seconds(before)}, after ${seconds(total)}: ${signed(seconds(change))}, ${relative}; `
        + `${signed(percent(change / tree.before[0]))} of the whole before`);
    } else {
      lines.push(`${seconds(total)}, ${percent(shareOf(node))} of all`
        + (state.zoom ? `, ${percent(total / tree.total[state.zoom])} of what is shown` : "")
        + `; own ${seconds(tree.own[node])}; seen ${tree.samples[node].toLocaleString("en")} times`);
      const at = [];
      for (let i = 0; i < tree.lines[node].length; i += 2) {
        at.push(`line ${tree.lines[node][i]}: ${seconds(tree.lines[node][i + 1])}`);
      }
      if (at.length) lines.push(`was at ${at.join(", ")}`);
      const [count, ...some] = tree.owners[node] || [0];
      const names = some.map((each) => tree.names[each]).filter(Boolean);
      if (names.length) lines.push(`in ${count === 1 ? "" : `${count}: `}${names.join(", ")}${count > some.length ? ", …" : ""}`);
    }
    details.replaceChildren(element("strong", nameOf(node)), ...lines.filter(Boolean).map((each) => element("span", each)));
    details.dataset.node = node;
  }

  // ---- search

  const matches = (node) => {
    const [name, file] = frameOf(node);
    return node !== 0 && (name.toLowerCase().includes(state.query) || file.toLowerCase().includes(state.query));
  };

  function mark() {
    graph.classList.toggle("searching", state.query !== "");
    for (const [node, made] of drawn) made.classList.toggle("match", state.query !== "" && matches(node));
    if (!state.query) {
      said.textContent = "";
      return;
    }
    // Below a match another one adds nothing: its time is in there. Parents come before their children.
    const inside = new Uint8Array(tree.frame.length);
    let sum = 0, count = 0;
    for (let node = 0; node < tree.frame.length; node++) {
      const above = node > 0 && inside[tree.parent[node]] === 1, match = matches(node);
      inside[node] = above || match ? 1 : 0;
      if (match) count++;
      if (match && !above) sum += timeOf(node);
    }
    said.textContent = count ? `${count} ${count === 1 ? "place" : "places"}, ${seconds(sum)}, ${percent(sum / timeOf(0))} of all` : "nothing matches";
  }

  function look(text) {
    state.query = text.trim().toLowerCase();
    if (tree.frame.length) mark();
  }

  // The next match after what is focused, the largest first; one that is too narrow is zoomed to.
  function next() {
    const here = Number(details.dataset.node), all = tree.frame.map((_, node) => node).filter(matches);
    if (!all.length || !state.query) return;
    const node = all[(all.indexOf(here) + 1) % all.length];
    if (!drawn.has(node)) zoom(tree.parent[node]);
    focus(node);
  }

  // ---- what the reader does

  function focus(node) {
    const made = drawn.get(node);
    if (!made) return;
    for (const each of graph.querySelectorAll('[tabindex="0"]')) each.tabIndex = -1;
    made.tabIndex = 0;
    made.focus();
    made.scrollIntoView({ block: "nearest", inline: "nearest" });
    tell(node);
  }

  function beside(node, step) {
    const here = drawn.get(node), level = here.getAttribute("aria-level");
    const row = [...drawn].filter(([, made]) => made.getAttribute("aria-level") === level)
      .sort(([, a], [, b]) => parseFloat(a.style.left) - parseFloat(b.style.left)).map(([each]) => each);
    return row[row.indexOf(node) + step];
  }

  const keys = {
    ArrowDown: (node) => focus(tree.children[node].find((each) => drawn.has(each))),
    ArrowUp: (node) => (node === state.zoom ? out() : focus(tree.parent[node])),
    ArrowLeft: (node) => focus(beside(node, -1)),
    ArrowRight: (node) => focus(beside(node, 1)),
    Home: () => focus(state.zoom),
    Enter: (node) => zoom(node),
    " ": (node) => zoom(node),
    Escape: () => out(),
    Backspace: () => out(),
  };
  const out = () => zoom(state.zoom === 0 ? 0 : tree.parent[state.zoom]);
  const nodeAt = (event) => {
    const made = event.target.closest("[data-node]");
    return made ? Number(made.dataset.node) : null;
  };

  graph.addEventListener("click", (event) => {
    const node = nodeAt(event);
    if (node === null) return;
    zoom(node);
    focus(node);
  });
  graph.addEventListener("pointerover", (event) => {
    const node = nodeAt(event);
    if (node !== null) tell(node);
  });
  graph.addEventListener("focusin", (event) => {
    const node = nodeAt(event);
    if (node !== null) tell(node);
  });
  graph.addEventListener("keydown", (event) => {
    const node = nodeAt(event), act = keys[event.key];
    if (node === null || !act || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    act(node);
  });
  trail.addEventListener("click", (event) => {
    const button = event.target.closest("[data-zoom]");
    if (button) zoom(Number(button.dataset.zoom));
  });
  find("reset").addEventListener("click", () => zoom(0));
  search.addEventListener("input", () => look(search.value));
  search.addEventListener("keydown", (event) => {
    if (event.key === "Enter") next();
    if (event.key === "Escape") {
      search.value = "";
      look("");
    }
  });
  document.addEventListener("keydown", (event) => {
    if (event.key !== "/" || event.ctrlKey || event.metaKey || event.altKey || event.target.matches("input, select")) return;
    event.preventDefault();
    search.focus();
  });
  document.addEventListener("click", (event) => {
    const button = event.target.closest("[data-kind], [data-side], [data-search]");
    if (!button) return;
    if (button.dataset.search !== undefined) {
      search.value = button.dataset.search;
      look(search.value);
      find("graph-section").scrollIntoView({ block: "start" });
      return;
    }
    if (button.dataset.kind) state.kind = button.dataset.kind;
    if (button.dataset.side) state.side = button.dataset.side;
    show();
  });
  if (find("process")) {
    find("process").addEventListener("change", (event) => {
      state.process = event.target.value;
      show();
    });
  }
  let width = 0;
  new ResizeObserver(() => {
    if (graph.clientWidth === width || !tree || tree.frame.length === 0) return;
    width = graph.clientWidth;
    requestAnimationFrame(draw);
  }).observe(graph.parentElement);

  show();
  width = graph.clientWidth;
})();
