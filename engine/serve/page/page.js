// The page: a form that makes jobs, and a card for each job of this browser that follows its events.
"use strict";

const $ = (selector, root = document) => root.querySelector(selector);
const KEY = "stylize.jobs";
const KEPT = 30; // jobs that this browser remembers
const FINISHED = ["succeeded", "failed", "cancelled"];
const POLL = 1000; // milliseconds between two looks at a job
const STREAMS = 2; // each holds one of the six connections that browsers open to a host, over all tabs
const form = $("#form");
const pictures = { content: null, style: null };
let sending = false;
let unanswered = null; // what was sent, and its key, until the server has said what became of it
const shown = new Map(); // id -> card
let streams = 0;

// Server.

function headers(more = {}) {
  const token = sessionStorage.getItem("stylize.token");
  return token ? { authorization: `Bearer ${token}`, ...more } : more;
}

async function ask(url, options = {}) {
  const answer = await fetch(url, { ...options, headers: headers(options.headers) });
  if (answer.status === 401) askForToken();
  if (!answer.ok) {
    const body = await answer.json().catch(() => ({}));
    const error = new Error(body.detail || `the server answered ${answer.status}`);
    error.status = answer.status;
    throw error;
  }
  return answer;
}

function askForToken() {
  $("#token").hidden = false;
  $("details").open = true;
  $("#token input").focus();
}

const sleep = (milliseconds) => new Promise((done) => setTimeout(done, milliseconds));

// History: what a card needs to come back after a reload.

function remembered() {
  try {
    return JSON.parse(localStorage.getItem(KEY)) || [];
  } catch {
    return [];
  }
}

function remember(jobs) {
  for (let kept = jobs.slice(0, KEPT); ; kept = kept.slice(0, -1)) {
    try {
      return localStorage.setItem(KEY, JSON.stringify(kept));
    } catch (error) { // the browser's quota: the oldest go first
      if (kept.length < 2) return;
    }
  }
}

// The form.

function show(error) {
  const box = $("#error");
  box.hidden = !error;
  box.textContent = error ? error.message || String(error) : "";
}

function take(name, file) {
  if (!file) return;
  if (!file.type.startsWith("image/")) {
    show(new Error(`${file.name} is not a picture`));
    return;
  }
  show(null);
  pictures[name] = file;
  const drop = $(`.drop[data-name=${name}]`);
  const image = $("img", drop);
  URL.revokeObjectURL(image.src);
  image.src = URL.createObjectURL(file);
  const see = (seen) => {
    image.hidden = !seen;
    drop.classList.toggle("full", seen);
    $(".hint", drop).dataset.file = seen ? "" : file.name;
  };
  image.onerror = () => {
    see(false);
    show(new Error(`${file.name}: this browser cannot show it`));
  };
  see(true);
  image.alt = `${name} picture`;
  allow();
}

// Let the buttons be pressed that can do something.
function allow() {
  $("#swap").disabled = !(pictures.content && pictures.style);
  $("button[type=submit]").disabled = sending || $("#swap").disabled;
}

for (const drop of document.querySelectorAll(".drop")) {
  const name = drop.dataset.name;
  const input = $("input", drop);
  input.addEventListener("change", () => {
    take(name, input.files[0]);
    input.value = ""; // the same file, replaced meanwhile, can be chosen again
  });
  $("label", drop).addEventListener("keydown", (event) => {
    if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      input.click();
    }
  });
  for (const kind of ["dragenter", "dragover"]) {
    drop.addEventListener(kind, (event) => {
      event.preventDefault();
      drop.classList.add("over");
    });
  }
  drop.addEventListener("dragleave", () => drop.classList.remove("over"));
  drop.addEventListener("drop", (event) => {
    event.preventDefault();
    drop.classList.remove("over");
    take(name, event.dataTransfer.files[0]);
  });
}

document.addEventListener("paste", (event) => {
  const file = [...event.clipboardData.files].find((each) => each.type.startsWith("image/"));
  if (!file) return;
  const focused = document.activeElement.closest?.(".drop")?.dataset.name;
  take(focused || (pictures.content ? "style" : "content"), file);
});

$("#samples").addEventListener("click", async () => {
  try {
    for (const name of ["content", "style"]) {
      const blob = await (await ask(`/samples/${name}.jpg`)).blob();
      take(name, new File([blob], `${name}.jpg`, { type: "image/jpeg" }));
    }
  } catch (error) {
    show(error);
  }
});

$("#swap").addEventListener("click", () => {
  const { content, style } = pictures;
  take("content", style);
  take("style", content);
});

const STRENGTHS = { "-4": "faint", "-2": "weak", 0: "normal", 2: "strong", 4: "overwhelming" };
form.strength.addEventListener("input", () => {
  const value = Number(form.strength.value);
  const between = value < 0 ? "weaker" : "stronger";
  $("#strength-name").textContent = STRENGTHS[value] || between;
  form.strength.setAttribute("aria-valuetext", $("#strength-name").textContent);
});

// What is to be corrected has to be seen.
form.addEventListener("invalid", () => { $("details").open = true; }, true);

form.token.addEventListener("change", () => {
  sessionStorage.setItem("stylize.token", form.token.value);
  show(null);
  for (const card of shown.values()) card.follow();
});

function options() {
  return {
    size: Number(form.size.value),
    iterations: Number(form.iterations.value),
    style_weight: 10000 * 10 ** (Number(form.strength.value) / 2),
    tv_weight: Number(form.tv_weight.value),
    init: form.init.value,
    pooling: form.pooling.value,
    optimizer: form.optimizer.value,
    seed: Number(form.seed.value),
  };
}

// A small copy of the content, for the slider after a reload.
async function thumbnail(file) {
  try {
    const bitmap = await createImageBitmap(file);
    const scale = Math.min(1, 512 / Math.max(bitmap.width, bitmap.height));
    const canvas = document.createElement("canvas");
    canvas.width = Math.max(1, Math.round(bitmap.width * scale));
    canvas.height = Math.max(1, Math.round(bitmap.height * scale));
    canvas.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
    return canvas.toDataURL("image/jpeg", 0.8);
  } catch {
    return "";
  }
}

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  const parts = { ...pictures, options: JSON.stringify(options()) }; // the form may change on the way
  if (!unanswered || Object.keys(parts).some((name) => parts[name] !== unanswered.parts[name])) {
    unanswered = { parts, key: crypto.getRandomValues(new Uint32Array(4)).join("-") };
  }
  const { key } = unanswered;
  sending = true;
  allow();
  show(null);
  try {
    const body = new FormData();
    for (const [name, part] of Object.entries(parts)) body.set(name, part);
    const send = () => ask("/v1/jobs", { method: "POST", body, headers: { "idempotency-key": key } });
    const answer = await send().catch((error) => {
      if (error.status) throw error;
      return sleep(1000).then(send); // a lost connection: the key makes a second try safe
    });
    const job = await answer.json();
    unanswered = null;
    const entry = { id: job.id, before: await thumbnail(parts.content) };
    remember([entry, ...remembered()]);
    open(entry).focus();
  } catch (error) {
    if (error.status < 500) unanswered = null; // a 502, say, is of a proxy that does not know
    show(error.status ? error : new Error("the server cannot be reached"));
  } finally {
    sending = false;
    allow();
  }
});

// Cards.

class Card {
  constructor(entry) {
    this.id = entry.id;
    this.losses = [];
    this.preview = 0; // the number of the picture that is shown
    this.loading = null;
    this.following = false;
    this.root = $("#job").content.cloneNode(true).firstElementChild;
    this.root.dataset.id = entry.id;
    this.before = $(".before", this.root);
    this.after = $(".after", this.root);
    this.slider = $(".slider", this.root);
    if (entry.before) this.before.src = entry.before;
    this.slider.addEventListener("input", () => {
      this.before.style.setProperty("--cut", `${this.slider.value}%`);
    });
    $(".cancel", this.root).addEventListener("click", () => this.cancel());
    $(".download", this.root).addEventListener("click", () => this.download());
    $(".again", this.root).addEventListener("click", () => this.again());
    $(".forget", this.root).addEventListener("click", () => this.forget());
  }

  focus() {
    this.root.focus({ preventScroll: true });
    this.root.scrollIntoView({ block: "nearest", behavior: "smooth" });
  }

  // Look at the job until its end is shown, or at its events where that is worth a connection.
  async follow() {
    if (this.following) return;
    this.following = true;
    for (let wait = POLL; this.following; wait = Math.min(8000, wait * 2)) {
      try {
        const job = await (await ask(`/v1/jobs/${this.id}`)).json();
        connection(true);
        wait = POLL;
        this.progress(job);
        if (FINISHED.includes(job.state) || (live(job) && streams < STREAMS)) await this.stream();
      } catch (error) {
        this.following = ![401, 404].includes(error.status);
        connection(Boolean(error.status));
        if (error.status === 404) this.state("failed", "This picture was removed from the server.");
      }
      if (this.following) await sleep(document.hidden ? 5 * wait : wait);
    }
  }

  // Read the events from where they were lost; those of a finished job end at once.
  async stream() {
    streams += 1;
    try {
      const answer = await ask(`/v1/jobs/${this.id}/events`, { headers: { "last-event-id": String(this.known()) } });
      for await (const [name, data] of events(answer.body)) {
        if (name === "end") return await this.end(data);
        if (name !== "progress") continue;
        this.progress(data);
        if (!live(data) && !FINISHED.includes(data.state)) return;
      }
    } finally {
      streams -= 1;
    }
  }

  // The last iteration whose loss has come.
  known() {
    return this.losses.length ? this.losses[this.losses.length - 1][0] : 0;
  }

  progress(job) {
    this.losses.push(...(job.losses || []).filter(([iteration]) => iteration > this.known()));
    this.draw(job.total);
    $("progress", this.root).value = job.total ? job.iteration / job.total : 0;
    const size = job.options.size || 512;
    if (job.state === "queued") {
      this.state(job.state, job.place ? `Waiting, ${job.place} before it` : "Waiting for its turn");
    } else if (job.state === "running") {
      this.state(job.state, job.eta === null ? "Starting" : `Painting, ${duration(job.eta)} left`);
    }
    const parts = [`${size} px`];
    if (job.total) parts.push(`iteration ${job.iteration} of ${job.total}`);
    if (job.total && job.scale !== size) parts.push(`at ${job.scale} px`);
    if (job.loss !== null) parts.push(`loss ${job.loss.toPrecision(3)}`);
    $(".detail", this.root).textContent = parts.join(" · ");
    if (job.preview !== this.preview && !FINISHED.includes(job.state)) {
      // One at a time, while events are read on; one that is lost or left out is made up for by the next.
      this.loading ||= this.picture(job).catch(() => {}).finally(() => { this.loading = null; });
    }
  }

  async picture(job) {
    const url = `${job.image}?v=${job.preview}`;
    const blob = await (await ask(url, { headers: { accept: "image/png" } })).blob();
    this.preview = job.preview;
    URL.revokeObjectURL(this.after.src);
    this.after.src = URL.createObjectURL(blob);
    this.blob = blob;
    this.after.hidden = false;
    $(".wait", this.root).hidden = true;
    const compare = Boolean(this.before.src);
    this.before.hidden = this.slider.hidden = !compare;
    $(".download", this.root).hidden = false;
  }

  async end(job) {
    await this.loading; // it would come after the last picture
    if (job.preview || job.state === "succeeded") await this.picture(job);
    else $(".wait", this.root).textContent = "no picture";
    this.following = false; // not before: a picture that does not come is asked for again
    const took = duration(job.seconds);
    const text = {
      succeeded: `Done in ${took}`,
      cancelled: "Cancelled; this is the picture so far",
      failed: `Failed: ${job.reason}`,
    }[job.state];
    this.state(job.state, text);
    if (job.state === "succeeded") this.after.alt = "The finished picture";
  }

  state(state, text) {
    this.root.classList.remove("queued", "running", "succeeded", "failed", "cancelled");
    this.root.classList.add(state);
    const line = $(".state", this.root);
    if (line.textContent !== text) line.textContent = text;
    const over = FINISHED.includes(state);
    $(".cancel", this.root).hidden = over;
    $(".forget", this.root).hidden = !over;
    $(".again", this.root).hidden = !(over && this.blob);
    $("progress", this.root).hidden = over;
  }

  // Losses on a logarithmic axis; the first ones of a scale stand far above the rest and are cut off.
  draw(total) {
    const values = this.losses.map(([iteration, , loss]) => [iteration, Math.log10(Math.max(loss, 1e-12))]);
    if (values.length < 2) return;
    const sorted = values.map(([, value]) => value).sort((a, b) => a - b);
    const low = sorted[0];
    const high = Math.max(sorted[Math.floor(0.95 * (sorted.length - 1))], low + 1e-6);
    const points = values.map(([iteration, value]) => {
      const y = 57 - 54 * Math.min(1, (value - low) / (high - low));
      return `${((300 * iteration) / total).toFixed(1)},${y.toFixed(1)}`;
    });
    $("polyline", this.root).setAttribute("points", points.join(" "));
  }

  async cancel() {
    $(".cancel", this.root).disabled = true;
    try {
      await ask(`/v1/jobs/${this.id}`, { method: "DELETE" });
    } catch (error) {
      show(error);
    } finally {
      $(".cancel", this.root).disabled = false;
    }
  }

  download() {
    const link = document.createElement("a");
    link.href = this.after.src;
    link.download = `stylize-${this.id.slice(0, 8)}.png`;
    link.click();
  }

  again() {
    take("content", new File([this.blob], "picture.png", { type: "image/png" }));
    form.scrollIntoView({ behavior: "smooth" });
  }

  forget() {
    this.root.remove();
    URL.revokeObjectURL(this.after.src);
    shown.delete(this.id);
    remember(remembered().filter((entry) => entry.id !== this.id));
    $("#none").hidden = shown.size > 0;
  }
}

// Whether the events of a job are worth a connection: they come often, and somebody looks.
function live(job) {
  return job.state === "running" && !document.hidden;
}

// [name, data] of each server-sent event of a stream; leaving the loop over them closes it.
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      rest += value;
      const blocks = rest.split("\n\n");
      rest = blocks.pop();
      for (const block of blocks) {
        const name = /^event: (.*)$/m.exec(block);
        const data = /^data: (.*)$/m.exec(block);
        if (name && data) yield [name[1], JSON.parse(data[1])];
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

function connection(there) {
  $("#server").textContent = there ? "" : "The server cannot be reached; trying again. Nothing is lost.";
}

function duration(seconds) {
  if (seconds < 60) return `${Math.max(1, Math.round(seconds))} s`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min ${Math.round(seconds % 60)} s`;
  return `${Math.floor(seconds / 3600)} h ${Math.round((seconds % 3600) / 60)} min`;
}

function open(entry) {
  const card = new Card(entry);
  shown.set(entry.id, card);
  $("#none").hidden = true;
  $("#jobs").prepend(card.root);
  card.state("queued", "Waiting for its turn");
  card.follow();
  return card;
}

for (const entry of remembered().reverse()) open(entry);
