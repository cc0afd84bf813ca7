"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const byId = (id) => document.getElementById(id);
  const root = document.documentElement;
  const charts = [];
  let selected = -1;
  let layerChart = null;

  const colour = (name) => getComputedStyle(root).getPropertyValue(`--${name}`).trim();

  const element = (tag, text, className) => {
    const made = document.createElement(tag);
    if (text !== undefined) made.textContent = text;
    if (className) made.className = className;
    return made;
  };

  // Theme: the system's, until the button says otherwise. Canvases take their colours when they are drawn.
  const systemDark = window.matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : systemDark.matches);

  function showTheme() {
    byId("theme").textContent = isDark() ? "Light" : "Dark";
    drawAll();
  }

  // Plots.
  const axis = (label, extra) => ({
    stroke: colour("quiet"), grid: { stroke: colour("line"), width: 1 }, ticks: { stroke: colour("line"), width: 1 },
    label, labelSize: 18, labelFont: "12px system-ui, sans-serif", font: "11px system-ui, sans-serif", ...extra,
  });

  const decibels = (plot, value) => (value === null || value === undefined ? "--" : `${value.toFixed(1)} dB`);

  function line(label, name, extra) {
    return { label, stroke: colour(name), width: 2, spanGaps: true, value: decibels, scale: "dB",
      points: { show: data.names.length < 120, size: 5 }, ...extra };
  }

  function drawLayers() {
    const box = byId("chart");
    const indices = data.names.map((_, index) => index);
    const options = {
      width: box.clientWidth, height: 320,
      cursor: { drag: { x: true, y: false }, points: { size: 8 } },
      scales: { x: { time: false, range: (plot, low, high) => [low - 0.5, high + 0.5] }, dB: {}, bits: { range: [0, 34] } },
      axes: [
        axis("layer", { incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000] }),
        axis("SQNR, dB", { scale: "dB", size: 50 }),
        axis("bits", { scale: "bits", side: 1, size: 45, grid: { show: false } }),
      ],
      series: [
        { label: "layer", value: (plot, index) => (index === null ? "--" : data.names[Math.round(index)]) },
        line("in the network", "network"),
        line("own", "own"),
        line("weight", "weight", { dash: [5, 4] }),
        line("bits per weight", "bits", { scale: "bits", width: 1, dash: [2, 3], points: { show: false },
          value: (plot, value) => (value === null || value === undefined ? "--" : value.toFixed(2)) }),
      ],
      hooks: { draw: [markSelected] },
    };
    layerChart = new uPlot(options, [indices, data.network, data.own, data.weight, data.bits], box);
    layerChart.over.addEventListener("click", () => {
      if (layerChart.cursor.idx !== null && layerChart.cursor.idx !== undefined) select(layerChart.cursor.idx);
    });
    charts.push(layerChart);
  }

  function markSelected(plot) {
    if (selected < 0) return;
    const x = Math.round(plot.valToPos(selected, "x", true));
    plot.ctx.save();
    plot.ctx.strokeStyle = colour("ink");
    plot.ctx.lineWidth = window.devicePixelRatio;
    plot.ctx.beginPath();
    plot.ctx.moveTo(x, plot.bbox.top);
    plot.ctx.lineTo(x, plot.bbox.top + plot.bbox.height);
    plot.ctx.stroke();
    plot.ctx.restore();
  }

  function drawHistogram(box, kind, [low, high, before, after]) {
    const figure = element("figure");
    const caption = element("figcaption", kind);
    for (const what of ["before", "after"]) caption.append(element("span", "", `key ${what}`), what);
    figure.append(caption);
    box.append(figure);
    const step = (high - low) / before.length;
    const edges = [...before, 0].map((_, index) => low + index * step);
    const heights = (counts) => [...counts, counts[counts.length - 1]].map((count) => Math.log10(1 + count));
    const stepped = uPlot.paths.stepped({ align: 1 });
    const options = {
      width: figure.clientWidth, height: 150, legend: { show: false }, cursor: { show: false },
      scales: { x: { time: false, range: [low, high] }, y: { range: (plot, least, most) => [0, Math.max(1, most * 1.05)] } },
      axes: [
        axis(undefined, { space: 34, size: 28 }),
        axis(undefined, { size: 44, splits: (plot, index, least, most) => [...Array(Math.floor(most) + 1).keys()],
          values: (plot, ticks) => ticks.map((tick) => (tick === 0 ? "0" : tick < 4 ? String(10 ** tick) : `1e${tick}`)) }),
      ],
      series: [
        {},
        { stroke: colour("before"), fill: `${colour("before")}55`, width: 1, paths: stepped, points: { show: false } },
        { stroke: colour("after"), width: 1.5, paths: stepped, points: { show: false } },
      ],
    };
    charts.push(new uPlot(options, [edges, heights(before), heights(after)], figure));
  }

  function drawHistograms(box, name) {
    box.replaceChildren();
    const kinds = data.histograms[name] || {};
    for (const kind of ["weight", "input", "output"]) if (kinds[kind]) drawHistogram(box, kind, kinds[kind]);
  }

  function drawAll() {
    for (const chart of charts.splice(0)) chart.destroy();
    layerChart = null;
    if (!data.names.length) return;
    drawLayers();
    for (const box of document.querySelectorAll("[data-histograms]")) drawHistograms(box, box.dataset.histograms);
  }

  // Selection.
  const table = byId("layer-table");
  const rows = table ? [...table.tBodies[0].rows] : [];
  const numberOf = (row) => Number(row.id.slice("layer-".length));
  const rowOf = new Map(rows.map((row) => [numberOf(row), row]));

  function select(index) {
    if (rowOf.has(selected)) mark(rowOf.get(selected), false);
    selected = index;
    const row = rowOf.get(index);
    mark(row, true);
    if (row.hidden) clearFilters();
    showDetail(index);
    const box = row.closest(".tall"), top = row.offsetTop - table.tHead.offsetHeight;
    if (top < box.scrollTop || top + row.offsetHeight > box.scrollTop + box.clientHeight / 2) box.scrollTop = top;
    if (layerChart) layerChart.redraw(false);
  }

  function unselect() {
    byId("detail").hidden = true;
    document.body.classList.remove("selecting");
    if (rowOf.has(selected)) rowOf.get(selected).setAttribute("aria-current", "false");
    selected = -1;
    if (layerChart) layerChart.redraw(false);
  }

  function mark(row, on) {
    row.setAttribute("aria-current", String(on));
    row.tabIndex = on ? 0 : -1;
    if (on) for (const other of rows) if (other !== row) other.tabIndex = -1;
  }

  function showDetail(index) {
    const list = element("ul", undefined, "causes");
    for (const [kind, why] of data.causes[index]) {
      const entry = element("li");
      entry.append(element("span", kind, "cause"), ` ${why}`);
      list.append(entry);
    }
    const plots = element("div", undefined, "histograms");
    plots.dataset.histograms = data.names[index];
    byId("detail-text").replaceChildren(
      element("h3", data.names[index]), element("p", data.facts[index], "quiet"), list, plots,
    );
    byId("detail").hidden = false;
    document.body.classList.add("selecting");
    drawHistograms(plots, data.names[index]);
  }

  function step(by) {
    const visible = [...table.tBodies[0].rows].filter((row) => !row.hidden);
    if (!visible.length) return null;
    const at = visible.findIndex((row) => numberOf(row) === selected);
    const next = visible[Math.min(visible.length - 1, Math.max(0, at < 0 ? 0 : at + by))];
    select(numberOf(next));
    return next;
  }

  // Sorting: a click sorts ascending, the next one descending; rows without a figure come last either way.
  function sortBy(column, descending) {
    const key = (row) => {
      const cell = row.cells[column];
      if (cell.dataset.value === undefined) return cell.textContent;
      return cell.dataset.value === "" ? null : Number(cell.dataset.value);
    };
    const compare = (a, b) => (typeof a === "string" ? a.localeCompare(b) : a - b);
    const keyed = rows.map((row) => [key(row), row]);
    keyed.sort(([a, one], [b, other]) => {
      if (a === null || b === null) return (a === null) - (b === null) || numberOf(one) - numberOf(other);
      return (descending ? compare(b, a) : compare(a, b)) || numberOf(one) - numberOf(other);
    });
    table.tBodies[0].append(...keyed.map(([, row]) => row));
  }

  function makeSortable() {
    const headings = [...table.tHead.rows[0].cells];
    headings.forEach((heading, column) => {
      const button = element("button", heading.textContent);
      button.type = "button";
      heading.replaceChildren(button);
      button.addEventListener("click", () => {
        const descending = heading.getAttribute("aria-sort") === "ascending";
        for (const other of headings) other.removeAttribute("aria-sort");
        heading.setAttribute("aria-sort", descending ? "descending" : "ascending");
        sortBy(column, descending);
      });
    });
    headings[0].setAttribute("aria-sort", "ascending");
  }

  // Filters.
  const NETWORK = 7;

  function applyFilters() {
    const name = byId("filter-name").value.toLowerCase();
    const cause = byId("filter-cause").value;
    const kernel = byId("filter-kernel").value;
    const below = byId("filter-below").value;
    let shown = 0;
    for (const row of rows) {
      const figure = row.cells[NETWORK].dataset.value;
      row.hidden = !(
        row.cells[0].textContent.toLowerCase().includes(name)
        && (!cause || row.dataset.causes.split("|").includes(cause))
        && (!kernel || row.dataset.kernel === kernel)
        && (!below || (figure !== "" && Number(figure) < Number(below)))
      );
      shown += row.hidden ? 0 : 1;
    }
    byId("shown").textContent = shown === rows.length ? `${shown} layers` : `${shown} of ${rows.length} layers`;
  }

  function clearFilters() {
    byId("filters").reset();
    applyFilters();
  }

  // Everything that needs a script appears now.
  byId("theme").hidden = false;
  byId("theme").addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    showTheme();
  });
  systemDark.addEventListener("change", showTheme);
  if (table) {
    byId("chart-section").hidden = false;
    byId("filters").hidden = false;
    byId("filters").addEventListener("input", applyFilters);
    byId("filters").addEventListener("submit", (event) => event.preventDefault());
    makeSortable();
    rows[0].tabIndex = 0;
    table.tBodies[0].addEventListener("click", (event) => {
      const row = event.target.closest("tr");
      if (row && !window.getSelection().toString()) select(numberOf(row));
    });
    table.tBodies[0].addEventListener("keydown", (event) => {
      const steps = { ArrowDown: 1, ArrowUp: -1, PageDown: 10, PageUp: -10, Home: -rows.length, End: rows.length };
      const moved = event.key in steps ? step(steps[event.key]) : null;
      if (event.key === "Enter" || event.key === " ") select(numberOf(event.target.closest("tr")));
      else if (moved) moved.focus({ preventScroll: true }), moved.scrollIntoView({ block: "nearest" });
      else return;
      event.preventDefault();
    });
    byId("chart").addEventListener("keydown", (event) => {
      const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!by) return;
      event.preventDefault();
      select(Math.min(rows.length - 1, Math.max(0, selected < 0 ? 0 : selected + by)));
    });
    for (const link of document.querySelectorAll("[data-select]")) {
      link.addEventListener("click", () => select(Number(link.dataset.select)));
    }
    byId("close").addEventListener("click", unselect);
    document.addEventListener("keydown", (event) => {
      if (event.key === "Escape") unselect();
      if (event.key !== "/" || event.target.closest("input, select")) return;
      event.preventDefault();
      byId("filter-name").focus();
    });
  }
  window.addEventListener("resize", () => {
    window.clearTimeout(drawAll.timer);
    drawAll.timer = window.setTimeout(drawAll, 150);
  });
  showTheme();
})();
