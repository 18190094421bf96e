// One pair at a time: a key or a button sends the vote, the answer is the next pair. Nothing is kept here.
"use strict";

const KEYS = {
  ArrowLeft: "left", 1: "left", ArrowRight: "right", 2: "right", ArrowDown: "tie", 0: "tie", t: "tie",
  s: "skip", u: "undo", Backspace: "undo",
};
const at = (id) => document.getElementById(id);
const images = { left: at("left").querySelector("img"), right: at("right").querySelector("img") };
const fetched = new Map(); // pictures of the next pairs, by digest
let state = null;
let ready = false; // both pictures are to be seen, and no vote is on its way
let broken = false; // a picture of the pair cannot be shown

const address = (digest) => `/picture/${digest}`;

function say(text) {
  at("message").textContent = text;
}

function allow() {
  for (const button of document.querySelectorAll("[data-vote]")) {
    const vote = button.dataset.vote;
    const judged = vote !== "undo" && vote !== "skip";
    const open = vote === "undo" ? state?.last : state?.pair;
    button.disabled = !ready || !open || (judged && broken);
  }
}

function percent(share) {
  return `${Math.round(100 * share)} %`;
}

async function put(side, digest) {
  const image = images[side];
  image.src = address(digest);
  await image.decode();
  image.style.setProperty("--ratio", image.naturalWidth / image.naturalHeight);
}

async function show(next) {
  state = next;
  const { done, total, skipped, pair, labeller } = state;
  at("bar").max = total;
  at("bar").value = done;
  at("count").textContent = `${done} of ${total}` + (skipped ? `, ${skipped} skipped` : "");
  at("who").textContent = labeller;
  at("agreement").textContent = state.kappas
    .map(([one, other, pairs, share, kappa]) => {
      const name = one === labeller ? other : one;
      const shown = kappa === null ? "" : `, kappa ${kappa.toFixed(2)}`;
      return `Agreement with ${name}: ${percent(share)} of ${pairs} pairs${shown}`;
    })
    .join(" · ");
  at("pair").hidden = !pair;
  at("done").hidden = Boolean(pair);
  at("prompt").textContent = pair ? pair.prompt : "Thank you";
  document.querySelector(".ask").hidden = !pair;
  broken = false;
  if (pair) {
    try {
      await Promise.all([put("left", pair.left), put("right", pair.right)]);
    } catch {
      broken = true;
      say("A picture of this pair cannot be shown: skip it.");
    }
  }
  at("pair").dataset.of = pair ? pair.id : "";
  ready = true;
  allow();
  preload();
}

function preload() {
  const wanted = new Set(state.ahead.flatMap((pair) => [pair.left, pair.right]));
  for (const digest of fetched.keys()) if (!wanted.has(digest)) fetched.delete(digest);
  for (const digest of wanted) {
    if (!fetched.has(digest)) {
      const image = new Image();
      image.src = address(digest);
      fetched.set(digest, image);
    }
  }
}

async function ask(path, body) {
  const options = body && {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
  };
  const answer = await fetch(path, options);
  const failed = { error: `The labelling command failed (${answer.status}): look at its terminal.` };
  return [answer.ok, await answer.json().catch(() => failed)];
}

async function send(vote) {
  const pair = vote === "undo" ? state?.last : state?.pair?.id;
  if (!ready || !pair || (broken && vote !== "undo" && vote !== "skip")) return;
  ready = false;
  allow();
  at("pair").dataset.chosen = vote;
  try {
    let [fine, found] = await ask("/vote", { pair, vote });
    say(fine ? "" : found.error);
    if (!fine) [fine, found] = await ask("/state");
    if (fine) await show(found);
    else say(found.error);
  } catch {
    say("The labelling command has ended: start it again and reload this page. All earlier votes are kept.");
  }
  delete at("pair").dataset.chosen;
  ready = true;
  allow();
}

for (const button of document.querySelectorAll("[data-vote]")) {
  button.addEventListener("click", () => send(button.dataset.vote));
}
document.addEventListener("keydown", (event) => {
  const vote = KEYS[event.key.length === 1 ? event.key.toLowerCase() : event.key];
  if (!vote || event.repeat || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  send(vote);
});

allow();
(async () => {
  try {
    const [fine, found] = await ask("/state");
    if (fine) await show(found);
    else say(found.error);
  } catch {
    say("The labelling command does not answer.");
  }
})();
