"use strict";

// State: the run's facts, the image that is looked at, the axes that are moved and what they were moved to.
let run, image = null, key = "latents";
let values = new Map(), seed = 0, ends = {}, names = {}, confirmed = false;
let drawn = null; // what is on show, for saving
let job = null, next = null; // what is being drawn, and what is to be drawn before anything else
let changed = false, alone = false; // whether sliders moved since, and whether "latents alone" is finished

const at = (id) => document.getElementById(id);
const quick = () => (run.seconds.coarse ?? 1) < 1; // then a preview is worth waiting for while a slider moves
const newNoise = () => document.querySelector("input[name=noise]:checked").value === "new";
const shown = (value) => (Math.abs(value) < 0.005 ? 0 : value).toFixed(2).replace("-", "−");
const time = (seconds) => (seconds < 10 ? `${Math.max(seconds, 0.1).toFixed(1)} s` : seconds < 100 ? `${seconds.toFixed(0)} s` : `${(seconds / 60).toFixed(0)} min`);

function complain(sentence) {
  at("alert").textContent = sentence;
  at("alert").hidden = !sentence;
}

function show(element, address) {
  element.src = address;
  element.hidden = false;
  element.classList.toggle("pixels", Math.max(...run.size) < 256);
}

// Requests

async function ask(path, body, options = {}) {
  const post = body === undefined ? {} : { method: "POST", body: body instanceof Blob ? body : JSON.stringify(body) };
  const response = await fetch(path, { ...post, ...options });
  if (!response.ok) throw new Error(`${response.status}: ${await response.text()}`);
  return response;
}

async function answer(path, body) {
  const found = await (await ask(path, body)).json();
  if (found.error) throw new Error(found.error);
  return found;
}

// Events of work that takes a while, a line each, as they come.
async function follow(path, body, signal, each) {
  const reader = (await ask(path, body, { signal })).body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    const lines = (rest + (value ?? "")).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      const event = JSON.parse(line);
      if (event.error) throw new Error(event.error);
      if (event.seconds) run.seconds = event.seconds;
      if (event.progress) progress(event);
      else each(event);
    }
    if (done) return;
  }
}

const WORDS = { coarse: "preview", invert: "finding the image's own noise", fine: "finished picture", axes: "finding axes" };
let began = 0;

function progress(event) {
  if (!event.done) began = performance.now();
  at("progress").value = event.done / event.of;
  const left = event.done ? ((performance.now() - began) / 1000 / event.done) * (event.of - event.done) : 0;
  at("status").textContent = `${job?.what ?? ""}${WORDS[event.progress]}: ${event.done} of ${event.of}${left >= 1 ? `, ${time(left)} left` : ""}`;
}

function idle(failed) {
  const { coarse, fine, invert } = run.seconds;
  at("progress").value = 0;
  const parts = [];
  if (coarse) parts.push(`preview ${time(coarse)}`);
  if (fine) parts.push(`finished picture ${time(fine)}`);
  if (invert && fine > 1) parts.push(`a new image's noise ${time(invert)}, once`);
  at("status").textContent = parts.length && !failed ? `Done: ${parts.join(", ")}` : "\u00a0";
}

// One thing is drawn at a time. The sliders come first; what they made useless is cancelled.

async function work() {
  if (job) return;
  at("status").textContent = "Drawing …";
  let failed = false;
  for (;;) {
    const task = next ?? (changed ? edit : image && !alone ? reconstruct : null);
    if (!task) break;
    next = null;
    job = { control: new AbortController(), stage: "", what: "", stays: false };
    try {
      await task(job);
      failed = false;
    } catch (error) {
      if (error.name !== "AbortError") {
        complain(error.message);
        failed = true;
        changed = false;
        alone = true;
      }
    }
    job = null;
  }
  idle(failed);
}

function redraw() {
  if (!image && !newNoise()) return complain("Choose an image first, or draw with new noise.");
  changed = true;
  if (!job) work();
  else if (job.stage !== "coarse" || !quick()) give_up();
}

function give_up() {
  if (job && !job.stays) job.control.abort();
}

function begin(task) {
  next = task;
  give_up();
  work();
}

async function edit(current) {
  changed = false;
  current.stage = "coarse";
  const moved = Object.fromEntries(values);
  const body = { image: image?.image ?? null, axes: key, values: moved, seed: newNoise() ? seed : null };
  await follow("api/edit", body, current.control.signal, (event) => {
    show(at("edited"), event.pictures[0]);
    drawn = { picture: event.pictures[0], stage: event.stage };
    at("edited-caption").textContent = `${newNoise() ? "From new noise" : "Edited"}${event.stage === "coarse" ? " (preview)" : ""}`;
    at("save-plain").disabled = at("save-sheet").disabled = false;
    event.read.forEach((value, axis) => mark(axis, value));
    current.stage = "fine";
    if (changed) current.control.abort();
  });
}

async function reconstruct(current) {
  current.what = "latents alone, ";
  const asked = image.image;
  await follow("api/reconstruct", { image: asked }, current.control.signal, (event) => {
    if (image.image !== asked) return;
    show(at("alone"), event.pictures[0]);
    alone = event.stage === "fine";
  });
}

// Images

async function choose(asked, name, thumbnail) {
  try {
    const found = await asked();
    complain("");
    image = { ...found, name };
    alone = false;
  } catch (error) {
    complain(`${name}: ${error.message}`);
    return;
  }
  for (const each of at("thumbnails").children) each.setAttribute("aria-pressed", String(each === thumbnail));
  at("note").textContent = thumbnail ? image.note : `${name}: ${image.note}`;
  show(at("original"), image.picture);
  at("alone").hidden = true;
  values.clear();
  sliders();
  give_up();
  redraw();
}

function upload(file) {
  if (!file) return;
  if (file.size > run.most_bytes) return complain(`${file.name}: ${(file.size / 2 ** 20).toFixed(0)} MiB, and images of at most ${run.most_bytes / 2 ** 20} MiB are taken`);
  choose(() => answer("api/upload", file), file.name, null);
}

// Axes

const set = () => run.sets[key];
const place = (row, value) => `calc(9px + (100% - 18px) * ${(value - row.low) / (row.high - row.low)})`;
let rows = [];

function ends_of(axis) {
  const { low, high } = set().axes[axis];
  const own = image?.posterior[key]?.mean[axis] ?? (low + high) / 2;
  const room = 0.25 * Math.max(high - low, 1e-3);
  return { low: Math.min(low, own) - room, high: Math.max(high, own) + room, own };
}

function sliders() {
  const template = at("slider");
  rows = [];
  const build = (axis) => {
    const part = template.content.cloneNode(true).firstElementChild;
    const [name, range] = [part.querySelector(".axis-name"), part.querySelector("input[type=range]")];
    const row = { axis, part, range, ...ends_of(axis), output: part.querySelector("output") };
    name.value = names[key]?.[axis] ?? set().axes[axis].name;
    name.setAttribute("aria-label", `Name of ${set().axes[axis].name}`);
    name.title = "Click to rename";
    name.addEventListener("input", () => {
      (names[key] ??= set().axes.map((each) => each.name))[axis] = name.value;
      row.range.setAttribute("aria-label", name.value);
      unsaved();
    });
    name.addEventListener("keydown", (event) => event.key === "Enter" && name.blur());
    part.querySelector(".axis-note").textContent = set().axes[axis].note;
    Object.assign(range, { min: row.low, max: row.high, step: (row.high - row.low) / 400, value: values.get(axis) ?? row.own });
    range.setAttribute("aria-label", name.value);
    range.addEventListener("input", () => {
      values.set(axis, Number(range.value));
      value(row);
      redraw();
    });
    range.addEventListener("dblclick", () => reset([axis]));
    const std = image?.posterior[key]?.std[axis] ?? 0;
    const [spread, own] = [part.querySelector(".spread"), part.querySelector(".own")];
    spread.style.left = own.style.left = place(row, row.own);
    spread.style.width = `calc((100% - 18px) * ${Math.min(1, (2 * std) / (row.high - row.low))})`;
    spread.hidden = own.hidden = !image;
    part.querySelector(".read").hidden = true;
    rows[axis] = row;
    value(row);
    return part;
  };
  at("sliders").replaceChildren(...set().order.map(build));
  const hidden = at("hidden-axes");
  hidden.hidden = !set().hidden.length;
  hidden.querySelector("summary").textContent = `${set().hidden.length} that carry nothing`;
  hidden.querySelector("div").replaceChildren(...set().hidden.map(build));
  unsaved();
}

function value(row) {
  const moved = values.get(row.axis);
  const std = image?.posterior[key]?.std[row.axis];
  row.output.textContent = moved === undefined ? `${shown(row.own)}${std ? ` ± ${shown(std)}` : ""}` : `${shown(row.own)} → ${shown(moved)}`;
  row.part.classList.toggle("moved", moved !== undefined);
  at("reset").disabled = !values.size;
}

function mark(axis, read) {
  if (!rows[axis]) return;
  const marker = rows[axis].part.querySelector(".read");
  marker.hidden = false;
  marker.style.left = place(rows[axis], Math.min(rows[axis].high, Math.max(rows[axis].low, read)));
}

function reset(axes) {
  for (const axis of axes) {
    values.delete(axis);
    rows[axis].range.value = rows[axis].own;
    value(rows[axis]);
  }
  redraw();
}

function sets() {
  const found = Object.entries(run.sets).map(([each, { label }]) => {
    const [part, input, text] = ["label", "input", "span"].map((tag) => document.createElement(tag));
    Object.assign(input, { type: "radio", name: "set", value: each, checked: each === key });
    input.addEventListener("change", () => {
      key = each;
      if (values.size) changed = true;
      values.clear();
      sliders();
      if (changed) redraw();
    });
    text.textContent = label;
    part.append(input, text);
    return part;
  });
  at("sets").replaceChildren(...found);
}

function unsaved() {
  confirmed = false;
  at("save-axes").textContent = "Save names";
  at("save-axes").classList.toggle("wanted", Boolean(names[key]));
}

async function save_axes() {
  try {
    const found = await answer("api/save-axes", { axes: key, names: names[key] ?? set().axes.map((each) => each.name), replace: confirmed });
    if (found.confirm) {
      at("axes-note").textContent = `${found.confirm}. Replace them?`;
      at("save-axes").textContent = "Replace";
      confirmed = true;
      return;
    }
    delete names[key];
    run.sets = found.sets;
    await posterior();
    at("axes-note").textContent = `Saved: ${found.saved}, for --axes of traverse, edit and encode.`;
  } catch (error) {
    at("axes-note").textContent = error.message;
  }
}

// The image along axes that came since it was chosen.
async function posterior() {
  if (image) image.posterior = (await answer(`api/images/${image.image}`)).posterior;
  sets();
  sliders();
}

async function find_axes(current) {
  current.stays = true;
  at("find").textContent = "Stop";
  try {
    await follow("api/find-axes", {}, current.control.signal, (event) => (run.sets = event.sets));
    await posterior();
    at("axes-note").textContent = "scale: from coarse to fine; pca: by variance; gradient: by the pixels they move; ica: independent ones. Name what you see.";
  } finally {
    at("find").textContent = "Find axes";
  }
}

// Between two images

function put(slot) {
  if (!image) return;
  ends[slot] = image;
  const picture = document.createElement("img");
  picture.alt = image.name;
  show(picture, image.picture);
  at(slot).firstElementChild.replaceChildren(picture);
  at(slot).lastElementChild.textContent = slot === "first" ? "A" : "B";
  at("draw-between").disabled = !(ends.first && ends.second);
}

async function draw_between(current) {
  Object.assign(current, { stays: true, what: "the way, " });
  const body = { first: ends.first.image, second: ends.second.image, count: 9 };
  await follow("api/between", body, current.control.signal, ({ pictures }) => {
    const figures = pictures.map((address, number) => {
      const [figure, picture, text] = ["figure", "img", "figcaption"].map((tag) => document.createElement(tag));
      text.textContent = number === 0 ? "A" : number === pictures.length - 1 ? "B" : `${Math.round((100 * number) / (pictures.length - 1))} %`;
      picture.alt = `On the way: ${text.textContent}`;
      show(picture, address);
      figure.append(picture, text);
      return figure;
    });
    at("way").replaceChildren(...figures);
    at("save-between").disabled = false;
  });
}

// Saving: pictures enlarged by whole pixels, with words below them, drawn here.

function sheet(cells, lines) {
  const side = Math.max(...run.size), scale = Math.max(1, Math.ceil(192 / side)), gap = 16, line = 20;
  const canvas = document.createElement("canvas");
  canvas.width = cells.length * (side * scale + gap) + gap;
  canvas.height = side * scale + 2 * gap + line * (lines.length + 1) + gap;
  const context = canvas.getContext("2d");
  Object.assign(context, { fillStyle: "#fff", imageSmoothingEnabled: false });
  context.fillRect(0, 0, canvas.width, canvas.height);
  Object.assign(context, { fillStyle: "#22252a", font: "14px system-ui, sans-serif", textBaseline: "top" });
  cells.forEach(([picture, text], place) => {
    const left = gap + place * (side * scale + gap);
    context.drawImage(picture, left, gap, side * scale, side * scale);
    context.fillText(text, left, gap + side * scale + 6, side * scale);
  });
  lines.forEach((text, place) => context.fillText(text, gap, 2 * gap + side * scale + line * (place + 1), canvas.width - 2 * gap));
  return canvas.toDataURL("image/png");
}

function save(address, name) {
  const link = document.createElement("a");
  Object.assign(link, { href: address, download: name });
  link.click();
}

function save_sheet() {
  const cells = [["original", "image"], ["alone", "latents alone"], ["edited", newNoise() ? "from new noise" : "edited"]];
  const moves = [...values].map(([axis, moved]) => `${rows[axis].part.querySelector(".axis-name").value}: ${shown(rows[axis].own)} → ${shown(moved)}`);
  const about = [image?.name, run.name, drawn.stage === "coarse" ? "preview" : `${run.steps.fine} steps`].filter(Boolean).join(" · ");
  save(sheet(cells.map(([id, text]) => [at(id), text]).filter(([picture]) => !picture.hidden), [about, ...moves]), `${run.name}-edit.png`);
}

function save_between() {
  const cells = [...at("way").children].map((figure) => [figure.firstElementChild, figure.lastElementChild.textContent]);
  save(sheet(cells, [`${ends.first.name} to ${ends.second.name} · ${run.name}`]), `${run.name}-between.png`);
}

// The page

function noise() {
  const words = newNoise()
    ? "New noise: the sliders say what is in the picture, all else is drawn anew. A preview may differ from the finished picture in what the latents do not say."
    : "Edit this image: its own noise is kept, and with it all that the latents do not say.";
  at("noise-note").textContent = run.inverts ? words : "This method decodes: a picture is made of the latents alone.";
  at("again").hidden = !newNoise() || !run.inverts;
}

async function open() {
  run = await answer("api/run");
  key = run.sets.file ? "file" : "latents";
  document.title = `${run.name} · explore`;
  at("name").textContent = run.name;
  const colours = { 1: "grey", 3: "colour" }[run.channels] ?? `${run.channels} channels`;
  at("facts").textContent = `${run.method}, ${run.size.join(" × ")}, ${colours}, ${run.live} of ${run.latents} latents carry something`;
  if (run.missing) complain(`No held-out images: ${run.missing}. Images of your own work.`);
  at("find").hidden = !run.finds;
  at("axes-note").textContent = `Move a slider and watch the picture; click a name to change it. Names go to ${run.axes_file}.${run.finds ? " Finding axes draws thousands of pictures and takes a while, in which edits wait." : ""}`;
  if (!run.inverts) {
    document.querySelector("input[name=noise][value=new]").checked = true;
    document.querySelector("input[name=noise][value=own]").disabled = true;
  }
  const thumbnails = run.held_out.map((name, number) => {
    const [button, picture] = ["button", "img"].map((tag) => document.createElement(tag));
    Object.assign(button, { type: "button", title: name });
    Object.assign(picture, { alt: name, loading: "lazy" });
    show(picture, `held-out/${number}.png`);
    button.append(picture);
    button.addEventListener("click", () => choose(() => answer("api/held-out", { number }), name, button));
    return button;
  });
  at("thumbnails").replaceChildren(...thumbnails);
  sets();
  sliders();
  noise();
  thumbnails[0]?.click();

  for (const each of document.querySelectorAll("input[name=noise]")) each.addEventListener("change", () => (noise(), redraw()));
  at("again").addEventListener("click", () => ((seed += 1), redraw()));
  at("reset").addEventListener("click", () => reset([...values.keys()]));
  at("find").addEventListener("click", () => (at("find").textContent === "Stop" ? job.control.abort() : begin(find_axes)));
  at("save-axes").addEventListener("click", save_axes);
  at("save-sheet").addEventListener("click", save_sheet);
  at("save-plain").addEventListener("click", () => save(drawn.picture, `${run.name}-picture.png`));
  for (const slot of ["first", "second"]) at(slot).addEventListener("click", () => put(slot));
  at("draw-between").addEventListener("click", () => begin(draw_between));
  at("save-between").addEventListener("click", save_between);
  at("file").addEventListener("change", () => (upload(at("file").files[0]), (at("file").value = "")));
  document.addEventListener("paste", (event) => upload([...event.clipboardData.files].find((file) => file.type.startsWith("image/"))));
  for (const kind of ["dragover", "dragleave", "drop"]) {
    document.addEventListener(kind, (event) => {
      event.preventDefault();
      document.body.classList.toggle("over", kind === "dragover");
      if (kind === "drop") upload(event.dataTransfer.files[0]);
    });
  }
}

open().catch((error) => complain(error.message));
