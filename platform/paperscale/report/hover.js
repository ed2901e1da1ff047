"use strict";
// Reads the numbers under the pointer from the lines themselves; without it the page is whole.
(() => {
  const axis = (svg, name) => {
    const [low, high, start, end, log] = svg.dataset[name].split(" ").map(Number);
    return { value: (place) => {
      const share = (place - start) / (end - start);
      return log ? low * (high / low) ** share : low + share * (high - low);
    }, start, end };
  };
  const points = (line) => line.getAttribute("d").slice(1).split("L").map((pair) => pair.split(",").map(Number));
  const show = (number) => Number(number.toPrecision(4)).toLocaleString("en", { maximumSignificantDigits: 4 });
  const box = document.createElement("div");
  box.className = "read";
  box.hidden = true;
  document.body.append(box);
  for (const svg of document.querySelectorAll("svg.plot[data-x]")) {
    const x = axis(svg, "x"), y = axis(svg, "y");
    let lines;
    const cursor = document.createElementNS(svg.namespaceURI, "path");
    cursor.setAttribute("class", "cursor");
    svg.append(cursor);
    const leave = () => { box.hidden = true; cursor.removeAttribute("d"); };
    svg.addEventListener("pointerleave", leave);
    svg.addEventListener("pointermove", (event) => {
      lines ??= [...svg.querySelectorAll("path.line")].map((line) => ({ line, points: points(line) }));
      const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse()).x;
      if (at < x.start || at > x.end) return leave();
      const rows = lines.map(({ line, points }) => {
        const near = points.reduce((best, point, index) =>
          Math.abs(point[0] - at) < Math.abs(points[best][0] - at) ? index : best, 0);
        return { line, near, point: points[near] };
      }).filter(({ point }) => Math.abs(point[0] - at) < 12).sort((a, b) => a.point[1] - b.point[1]);
      if (!rows.length) return leave();
      cursor.setAttribute("d", `M${at},${Math.min(y.start, y.end)}V${Math.max(y.start, y.end)}`);
      box.replaceChildren(show(x.value(at)));
      for (const { line, near, point } of rows) {
        const row = document.createElement("div"), name = document.createElement("span");
        const part = line.dataset.names?.split("|")[near];
        name.textContent = line.dataset.name + (part ? ` (${part})` : "");
        name.className = [...line.classList].find((word) => /^s\d$/.test(word));
        row.append(name, ` ${show(y.value(point[1]))}`);
        box.append(row);
      }
      box.hidden = false;
      const right = event.clientX + box.offsetWidth + 24 > innerWidth;
      box.style.left = `${right ? event.clientX - box.offsetWidth - 14 : event.clientX + 14}px`;
      box.style.top = `${Math.min(event.clientY + 14, innerHeight - box.offsetHeight - 8)}px`;
    });
  }
  addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((part) => { part.open = true; }));
})();
