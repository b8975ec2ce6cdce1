"use strict";
{# What moves on the page; without scripts it stands still and is complete. #}
document.documentElement.classList.add("scripted");

const format = (value, digits) => (Math.round(value * 10 ** digits) / 10 ** digits + 0).toFixed(digits).replace("-", "\u2212");

for (const player of document.querySelectorAll(".player")) {
  const [range, output, picture] = ["input", "output", ".picture"].map((part) => player.querySelector(part));
  const values = range.dataset.values.split(" ").map(Number);
  const show = () => {
    picture.style.setProperty("--x", range.value);
    output.textContent = format(values[range.value], 2);
    range.setAttribute("aria-valuetext", output.textContent);
  };
  range.addEventListener("input", show);
  show();
}

const lens = document.getElementById("lens");
const enlarge = (thumb) => {
  const small = thumb.querySelector(".picture");
  const large = lens.querySelector(".picture");
  large.className = small.className;
  for (const place of ["--x", "--y"]) large.style.setProperty(place, small.style.getPropertyValue(place));
  lens.querySelector("figcaption").textContent = thumb.dataset.caption + (thumb.dataset.values ? ": " + thumb.dataset.values : "");
  lens.hidden = false;
};
const hide = () => { lens.hidden = true; };
for (const [shown, gone] of [["pointerover", "pointerout"], ["focusin", "focusout"]]) {
  document.addEventListener(shown, (event) => { const thumb = event.target.closest(".thumb"); if (thumb) enlarge(thumb); });
  document.addEventListener(gone, (event) => { if (event.target.closest(".thumb")) hide(); });
}
document.addEventListener("click", (event) => { const thumb = event.target.closest(".thumb"); if (thumb) { thumb.focus(); enlarge(thumb); } });
document.addEventListener("keydown", (event) => { if (event.key === "Escape") hide(); });

for (const gallery of document.querySelectorAll(".gallery")) {
  const data = JSON.parse(gallery.querySelector("script").textContent);
  const thumbs = [...gallery.querySelectorAll(".thumb")];
  const [across, up] = gallery.querySelectorAll("select"); {# of a single latent there are none, and nothing moves #}
  const place = () => {
    for (const [select, side] of [[across, "left"], [up, "bottom"]]) {
      const positions = data.positions[select.value];
      const low = Math.min(...positions), width = Math.max(...positions) - low || 1;
      thumbs.forEach((thumb, number) => { thumb.style[side] = 4 + 92 * (positions[number] - low) / width + "%"; });
    }
  };
  thumbs.forEach((thumb, number) => {
    thumb.dataset.values = data.latents.slice(0, 6).map((latent, row) => `z${latent} ${format(data.positions[row][number], 2)}`).join(", ");
    thumb.tabIndex = number ? -1 : 0;
  });
  across?.addEventListener("change", place);
  up?.addEventListener("change", place);
  {# One stop of the tabulator for all thumbnails; arrows go to the next one in their direction. #}
  gallery.addEventListener("keydown", (event) => {
    const arrow = { ArrowLeft: [across, -1], ArrowRight: [across, 1], ArrowDown: [up, -1], ArrowUp: [up, 1] }[event.key];
    const at = thumbs.indexOf(document.activeElement);
    if (!arrow || at < 0) return;
    event.preventDefault();
    const positions = data.positions[arrow[0]?.value ?? 0];
    const order = thumbs.map((_, number) => number).sort((a, b) => positions[a] - positions[b] || a - b);
    const next = order[order.indexOf(at) + arrow[1]];
    if (next === undefined) return;
    thumbs[at].tabIndex = -1;
    thumbs[next].tabIndex = 0;
    thumbs[next].focus();
  });
}

for (const command of document.querySelectorAll(".command")) {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = "Copy";
  button.addEventListener("click", async () => {
    getSelection().selectAllChildren(command.querySelector("pre"));
    try {
      await navigator.clipboard.writeText(command.querySelector("pre").textContent);
      button.textContent = "Copied";
    } catch {
      button.textContent = "Selected";
    }
  });
  command.append(button);
}

addEventListener("beforeprint", () => { for (const part of document.querySelectorAll("details")) part.open = true; });
