// Text files that come before the next message: picked, dropped onto the page, or pasted.

import { counted } from "./estimate.js";
import { element } from "./memory.js";

const $ = (id) => document.getElementById(id);

/** The files that wait for the next message, shown as a list from which each can be taken. */
export class Files {
  /** @param {(message: string) => void} onProblem told of files that are no text */
  constructor(onProblem) {
    this.held = [];
    this._onProblem = onProblem;
    $("add").addEventListener("click", () => $("picker").click());
    $("picker").addEventListener("change", () => {
      this.add([...$("picker").files]);
      $("picker").value = ""; // so that the same file can be picked again
    });
    for (const kind of ["dragenter", "dragover"]) {
      addEventListener(kind, (event) => this._drag(event, true));
    }
    addEventListener("dragleave", (event) => event.relatedTarget || this._drag(event, false));
    addEventListener("drop", (event) => {
      this._drag(event, false);
      this.add([...(event.dataTransfer?.files ?? [])]);
    });
    $("message").addEventListener("paste", (event) => {
      const files = [...event.clipboardData.files];
      if (!files.length) return;
      event.preventDefault();
      this.add(files);
    });
  }

  /** Read files and add their texts. */
  async add(files) {
    for (const file of files) {
      const text = await this._read(file);
      if (text !== null) this.held.push({ name: file.name, text });
    }
    this._show();
  }

  /** Return the files and hold none any more. */
  take() {
    const taken = this.held;
    this.put([]);
    return taken;
  }

  /** Hold these files. */
  put(files) {
    this.held = files;
    this._show();
  }

  async _read(file) {
    let text;
    try {
      text = new TextDecoder("utf-8", { fatal: true }).decode(await file.arrayBuffer());
    } catch (error) {
      const why = error instanceof TypeError ? "is not UTF-8 text" : "cannot be read";
      this._onProblem(`${file.name} ${why}, so it was left out.`);
      return null;
    }
    if (text.trim()) return text.replace(/[\r\n]+$/, "");
    this._onProblem(`${file.name} is empty, so it was left out.`);
    return null;
  }

  _drag(event, over) {
    if (event.dataTransfer && ![...event.dataTransfer.types].includes("Files")) return;
    event.preventDefault();
    document.body.classList.toggle("dropping", over);
  }

  _show() {
    $("files").replaceChildren(
      ...this.held.map((file, place) => {
        const item = element("li", "file");
        const remove = element("button", "", "×");
        remove.type = "button";
        remove.setAttribute("aria-label", `Leave out ${file.name}`);
        remove.addEventListener("click", () => {
          this.put(this.held.filter((_, other) => other !== place));
          $("message").focus();
        });
        item.append(element("span", "name", file.name));
        item.append(element("span", "hint", counted(file.text.length, "character")), remove);
        return item;
      }),
    );
  }
}

/** Return a message with the files before it, as `headinfer generate` puts them together. */
export function withFiles(files, message) {
  const texts = files.map((file) => file.text).join("\n");
  return [texts, message].filter(Boolean).join("\n\n");
}
