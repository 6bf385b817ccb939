// Conversations that are saved with their KV cache: `headinfer chat` and `--session` go on with them.

import { bytes, counted } from "./estimate.js";
import { element } from "./memory.js";
import { ask } from "./stream.js";

const $ = (id) => document.getElementById(id);

/** The sessions of the server's folder, and the form that saves one more. */
export class Sessions {
  /**
   * @param key returns the API key.
   * @param current returns what is to be saved: `slot` and `messages`, or null.
   * @param restored takes what a session gives: `messages`, `slot`, `tokens` and `name`.
   * @param onProblem takes an error.
   */
  constructor({ key, current, restored, onProblem }) {
    Object.assign(this, { key, current, restored, onProblem });
    this._busy = false;
    this._names = new Set();
    $("save-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this._do(() => this._save($("session").value.trim()));
    });
    $("session").addEventListener("input", () => this.show());
  }

  /** Ask the server for its sessions; one without a folder has none to show. */
  async look() {
    let told;
    try {
      told = await (await ask("sessions", this.key())).json();
    } catch {
      return; // the next request says what is wrong
    }
    const { enabled, data: listed } = told;
    $("sessions").hidden = !enabled;
    this._names = new Set(listed.map((each) => each.filename));
    $("saved").replaceChildren(...listed.map((each) => this._item(each)));
    this.show();
  }

  /** Let be pressed what can be done now. */
  show() {
    const current = this.current();
    $("save").disabled = this._busy || !current?.slot;
    $("save").textContent = this._names.has($("session").value.trim()) ? "Replace" : "Save";
    for (const button of $("saved").querySelectorAll("button")) {
      button.disabled = this._busy || current === null;
    }
  }

  _item({ filename, tokens, disk_bytes: size }) {
    const item = element("li");
    const open = element("button", "", "Open");
    open.type = "button";
    open.setAttribute("aria-label", `Open ${filename}`);
    open.addEventListener("click", () => this._do(() => this._restore(filename)));
    const head = element("div", "row");
    head.append(element("strong", "", filename), open);
    item.append(head, element("p", "hint", `${counted(tokens, "token")}, ${bytes(size)}`));
    return item;
  }

  async _do(work) {
    if (this._busy) return;
    this._busy = true;
    this.show();
    try {
      await work();
    } catch (error) {
      $("session-told").textContent = "";
      this.onProblem(error);
    }
    this._busy = false;
    await this.look();
  }

  async _save(filename) {
    const current = this.current();
    if (!current?.slot) return;
    $("session-told").textContent = "Saving …";
    const { slot, messages } = current;
    const told = await this._act(slot, "save", { filename, messages });
    $("session-told").textContent = `Saved: ${counted(told.n_saved, "token")}.`;
  }

  async _restore(filename) {
    $("session-told").textContent = `Opening ${filename} …`;
    const told = await this._act("0", "restore", { filename });
    $("session-told").textContent = "";
    $("session").value = filename;
    const { messages, id_slot: slot, n_restored: tokens } = told;
    this.restored({ messages, slot, tokens, name: filename });
  }

  async _act(slot, action, body) {
    const response = await ask(`slots/${encodeURIComponent(slot)}?action=${action}`, this.key(), {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(body),
    });
    return response.json();
  }
}
