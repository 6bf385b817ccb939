// Where the KV cache is: GPU memory, CPU memory and disk, in all and for each that holds some.

import { bytes, count, counted } from "./estimate.js";

const PLACES = [
  ["gpu", "gpu_bytes", "GPU memory"],
  ["cpu", "cpu_bytes", "CPU memory"],
  ["disk", "disk_bytes", "Disk"],
];
const STATES = {
  running: "Running",
  waiting: "Waiting",
  kept: "Kept in memory",
  saved: "Kept on disk",
};

const $ = (id) => document.getElementById(id);

/** Make an element with a class and a text. What a model or a server says is never markup. */
export function element(tag, name = "", text = "") {
  const made = document.createElement(tag);
  if (name) made.className = name;
  if (text) made.textContent = text;
  return made;
}

/** Show what the server's slots hold. */
export function showSlots(slots) {
  const totals = PLACES.map(([, field]) => slots.reduce((sum, slot) => sum + slot[field], 0));
  const most = Math.max(...totals, 1);
  $("places").replaceChildren(
    ...PLACES.map(([place, , label], number) => placeRow(place, label, totals[number], most)),
  );
  const some = PLACES.flatMap(([, , label], number) =>
    totals[number] ? [`${label} ${bytes(totals[number])}`] : [],
  );
  $("cache-total").textContent = some.join(" · ") || "empty";
  $("no-slots").hidden = slots.length > 0;
  $("slots").replaceChildren(...slots.map(slotItem));
}

function placeRow(place, label, held, most) {
  const row = element("div", "place");
  const bar = element("div", "bar");
  const part = element("span", place);
  part.style.setProperty("inline-size", `${(100 * held) / most}%`);
  bar.append(part);
  row.append(element("span", "", label), element("span", "size", bytes(held)), bar);
  return row;
}

function slotItem(slot) {
  const item = element("li", slot.state);
  const head = element("div", "row");
  head.append(element("strong", "", STATES[slot.state] ?? String(slot.state)));
  head.append(element("span", "hint", counted(slot.tokens, "token")));
  item.append(head, element("p", "hint", doing(slot)));
  const held = PLACES.filter(([, field]) => slot[field]);
  const all = held.reduce((sum, [, field]) => sum + slot[field], 0);
  if (all) {
    const bar = element("div", "bar");
    for (const [place, field] of held) {
      const part = element("span", place);
      part.style.setProperty("inline-size", `${(100 * slot[field]) / all}%`);
      bar.append(part);
    }
    const sizes = held.map(([, field, label]) => `${label} ${bytes(slot[field])}`);
    item.append(bar, element("p", "hint", sizes.join(" · ")));
  }
  return item;
}

function doing(slot) {
  const progress = slot.prompt_progress;
  if (slot.state === "waiting") {
    return slot.queue_position ? `behind ${counted(slot.queue_position, "other")}` : "next";
  }
  if (slot.state !== "running") return "";
  if (slot.completion_tokens) return `answering, ${counted(slot.completion_tokens, "token")}`;
  if (progress) return `reading, ${count(progress.processed)} of ${count(progress.total)}`;
  return "beginning";
}
