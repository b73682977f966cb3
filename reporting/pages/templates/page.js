// What a page can do beyond being read: hints, search, another step, light and dark. Without it, nothing is missing.
"use strict";
const $ = (query, of = document) => of.querySelector(query);
const make = (tag, values = {}, ...children) => {
  const element = Object.assign(document.createElement(tag), values);
  element.append(...children);
  return element;
};
for (const hidden of document.querySelectorAll(".find, .theme, .switch, .switches")) hidden.hidden = false;
for (const here of document.querySelectorAll(".bar [aria-current]")) here.parentElement.scrollLeft = here.offsetLeft - 90;

// ------------------------------------------------------------------------------------------------- light and dark
const root = document.documentElement, dark = matchMedia("(prefers-color-scheme: dark)");
const remember = (key, value) => { try { value === undefined ? 0 : localStorage.setItem(key, value); return localStorage.getItem(key); } catch { return null; } };
root.dataset.theme = remember("theme") || "";
$(".theme").onclick = () => {
  const now = root.dataset.theme || (dark.matches ? "dark" : "light");
  root.dataset.theme = now === "dark" ? "light" : "dark";
  remember("theme", root.dataset.theme);
};

// ------------------------------------------------------------------------------------------- hints at names and values
const hint = make("div", { id: "hint", hidden: true, role: "tooltip" });
document.body.append(hint);
const show = event => {
  const of = event.target.closest?.(".code [title], .code [data-hint]");
  if (!of) return;
  if (of.title) { of.dataset.hint = of.title; of.removeAttribute("title"); of.setAttribute("aria-description", of.dataset.hint); }
  hint.textContent = of.dataset.hint;
  hint.hidden = false;
  const box = of.getBoundingClientRect();
  hint.style.left = `${Math.max(8, Math.min(box.left, innerWidth - hint.offsetWidth - 16)) + scrollX}px`;
  hint.style.top = `${box.bottom + 6 + scrollY}px`;
};
const hide = () => { hint.hidden = true; };
addEventListener("mouseover", event => { hide(); show(event); });
addEventListener("focusin", event => { hide(); show(event); });
addEventListener("focusout", hide);

// ------------------------------------------------------------------------------------------------------ another step
const switches = JSON.parse($("#switches")?.textContent || "[]"), choice = $(".switch select");
const chip = ([name, shape, gradient, about]) => make("span", { className: `chip ${gradient}`, title: `${name}: ${about}`, tabIndex: 0 },
  `${name} `, make("b", {}, shape), ...(gradient === "stopped" ? [make("i", {}, "no grad")] : []));
const plain = new Map();  // line → its chips as the page came
function step(number) {
  for (const [line, chips] of plain) { $(`#L${line} .chips`)?.remove(); if (chips) $(`#L${line}`).append(chips); }
  plain.clear();
  $(".losses").textContent = switches[number].losses;
  $(".legend").replaceChildren(...Object.entries(switches[number].legend).flatMap(([letter, about]) => [make("span", {}, make("b", {}, letter), ` = ${about}`), " "]));
  choice.selectedIndex = number;
  for (const button of document.querySelectorAll("[data-step]")) button.setAttribute("aria-pressed", +button.dataset.step === number);
  const idle = new Set(switches[number].idle);
  for (const line of document.querySelectorAll(".line")) line.classList.toggle("idle", idle.has(+line.id.slice(1)));
  if (number === 0) return;
  for (const [line, row] of Object.entries(switches[number].chips)) {
    const old = $(`#L${line} .chips`), texts = new Set([...(old?.children || [])].map(x => x.textContent));
    plain.set(line, old);
    old?.remove();
    if (!row.length) continue;
    const chips = make("span", { className: "chips" }, ...row.map(chip));
    for (const x of chips.children) x.classList.toggle("changed", !texts.has(x.textContent));
    $(`#L${line}`).append(chips);
  }
}
if (choice) {
  const asked = switches.findIndex(x => x.name === new URLSearchParams(location.search).get("step"));
  choice.onchange = () => step(choice.selectedIndex);
  for (const button of document.querySelectorAll("[data-step]")) button.onclick = () => step(+button.dataset.step);
  if (asked > 0) { choice.selectedIndex = asked; step(asked); } else if (choice.selectedIndex > 0) step(choice.selectedIndex);
}

// ------------------------------------------------------------------------------------------------------------- search
const input = $(".find input"), list = $(".find ol");
input.oninput = () => {
  const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
  const rank = ([title, text]) => words.every(w => title.toLowerCase().includes(w)) ? 0 : words.every(w => `${title} ${text}`.toLowerCase().includes(w)) ? 1 : 2;
  const found = words.length ? INDEX.map(x => [rank(x), x]).filter(([r]) => r < 2).sort((a, b) => a[0] - b[0]).slice(0, 14) : [];
  list.replaceChildren(...found.map(([, [title, text, href]]) => make("li", {}, make("a", { href }, `${title} · ${href.split(".html")[0]}`, make("small", {}, text)))));
  list.hidden = !found.length;
};
input.onkeydown = event => { if (event.key === "Enter") $("a", list)?.click(); };
list.onclick = () => { list.hidden = true; };
addEventListener("keydown", event => {
  if (event.target.matches?.("input, select, textarea") ? event.key === "Escape" : false) { input.value = ""; input.blur(); list.hidden = true; }
  if (event.target.matches?.("input, select, textarea") || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "/") { event.preventDefault(); input.focus(); }
});
