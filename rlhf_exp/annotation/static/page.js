// Saves an answer and shows the next question. Without this script the forms work by themselves.
"use strict";
(() => {
  const status = document.getElementById("status");
  const keys = document.getElementById("keys");
  const CHOICES = { 1: "A", 2: "Tie", 3: "B" };
  const LONGEST_WAIT_MS = 5000;
  // A key pressed twice would otherwise answer the next question too.
  const DEAF_MS = 200;
  const started = performance.now();
  let busy = false;

  keys.checked = localStorage.getItem("keys") !== "off";
  const showKeys = () => { document.body.dataset.keys = keys.checked ? "on" : "off"; };
  keys.addEventListener("change", () => {
    localStorage.setItem("keys", keys.checked ? "on" : "off");
    showKeys();
  });
  setTimeout(showKeys, DEAF_MS);
  document.getElementById("title").focus({ preventScroll: true });

  async function send(form, choice) {
    const body = new URLSearchParams(new FormData(form));
    body.set("choice", choice);
    return fetch(form.action, {
      method: "POST",
      body,
      headers: { Accept: "application/json" },
      redirect: "error",
      signal: AbortSignal.timeout(20000),
    });
  }

  async function save(form, button) {
    if (busy) return;
    busy = true;
    button.dataset.sending = "";
    for (let wait = 500; ; wait = Math.min(2 * wait, LONGEST_WAIT_MS)) {
      try {
        const answer = await send(form, button.value);
        if (answer.ok) {
          const { next } = await answer.json();
          busy = false;
          status.textContent = "Saved.";
          if (next === location.pathname) location.reload();
          else location.assign(next);
          return;
        }
        if (answer.status < 500) {
          status.textContent = (await answer.json()).message;
          delete button.dataset.sending;
          busy = false;
          return;
        }
      } catch {
        // No connection: the server may be back in a moment, and sending twice does no harm.
      }
      status.textContent = "Not saved yet: the server does not answer. Trying again…";
      await new Promise((resolve) => setTimeout(resolve, wait));
    }
  }

  for (const form of document.querySelectorAll("form.criterion")) {
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      save(form, event.submitter);
    });
  }

  addEventListener("beforeunload", (event) => {
    if (busy) event.preventDefault();
  });

  document.addEventListener("keydown", (event) => {
    if (!keys.checked || busy || event.repeat || performance.now() - started < DEAF_MS) return;
    if (event.ctrlKey || event.metaKey || event.altKey || event.shiftKey) return;
    if (event.key in CHOICES) {
      const form = document.activeElement.closest("form.criterion")
        ?? document.querySelector("form.criterion[data-current]");
      event.preventDefault();
      save(form, form.querySelector(`button[value="${CHOICES[event.key]}"]`));
    } else if (event.key === "ArrowLeft" || event.key === "ArrowRight") {
      const link = document.getElementById(event.key === "ArrowLeft" ? "before" : "after");
      if (link.href) link.click();
    }
  });
})();
