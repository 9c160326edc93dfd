"use strict";
// Draw the charts, filter and order the pictures, and open the record that a link leads to.

const AT_FIRST = 8; // rows of a gallery before "Show all"
const OPTIONS = {
  actions: false,
  renderer: "svg",
  ast: true, // no eval, which the page's policy forbids
  defaultStyle: false,
  tooltip: { disableDefaultStyle: true },
};

async function drawCharts() {
  for (const chart of document.querySelectorAll(".chart")) {
    const spec = JSON.parse(chart.querySelector("script").textContent);
    try {
      await vegaEmbed(chart.querySelector(".plot"), spec, OPTIONS);
    } catch (error) {
      chart.querySelector("details").open = true; // the numbers in place of the chart
      console.error(error);
    }
  }
  document.documentElement.dataset.drawn = "yes";
}

function enlivenGallery(gallery) {
  const orders = JSON.parse(gallery.querySelector("script").textContent);
  const list = gallery.querySelector(".rows");
  const rows = [...list.children];
  const filter = gallery.querySelector(".filter");
  const order = gallery.querySelector(".order");
  const count = gallery.querySelector(".count");
  const more = gallery.querySelector(".more");
  let all = false;
  const update = () => {
    const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    const chosen = orders[order ? Number(order.value) : 0].map((place) => rows[place]);
    const shown = chosen.filter((row) => {
      const text = row.querySelector(".prompt").textContent.toLowerCase();
      return words.every((word) => text.includes(word));
    });
    const now = all ? shown : shown.slice(0, AT_FIRST);
    list.replaceChildren(...now);
    count.textContent = `${now.length} of ${shown.length} shown`;
    more.hidden = now.length === shown.length;
    more.textContent = `Show all ${shown.length}`;
  };
  more.addEventListener("click", () => {
    all = true;
    update();
  });
  filter.addEventListener("input", update);
  if (order) order.addEventListener("change", update);
  update();
}

function openTarget() {
  const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (target instanceof HTMLDetailsElement) {
    target.open = true;
    target.scrollIntoView();
  }
}

document.querySelectorAll(".gallery:has(.filter)").forEach(enlivenGallery);
addEventListener("hashchange", openTarget);
openTarget();
drawCharts();
