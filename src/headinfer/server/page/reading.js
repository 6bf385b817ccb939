// The progress of a prompt that is being read.

import { count, counted, duration, secondsLeft } from "./estimate.js";

const SPOKEN_MS = 15000; // a screen reader is told of progress no more often

const $ = (id) => document.getElementById(id);

/** What is shown between sending a message and the first word of the answer. */
export class Reading {
  constructor() {
    this._points = [];
    this._began = null;
    this._spoken = 0;
    $("reading").hidden = false;
    $("reading-left").textContent = $("reading-detail").textContent = "";
    $("reading-bar").removeAttribute("value");
    this._say("Sending");
  }

  /** Show the place in the server's queue. */
  queued(position) {
    this._say(position ? `Waiting behind ${counted(position, "other")}` : "Waiting, next in turn");
  }

  /** Show the tokens that are done; told again each second while a chunk takes its time. */
  progress({ total, cache, processed, time_ms: timeMs }) {
    this._began ??= timeMs;
    const seconds = (timeMs - this._began) / 1000;
    const last = this._points.at(-1);
    if (processed > cache && processed !== last?.[0]) this._points.push([processed, seconds]);
    const percent = Math.floor((100 * processed) / Math.max(total, 1));
    this._say(`Reading, ${percent}%`, percent);
    $("reading-bar").max = total;
    $("reading-bar").value = processed;
    $("reading-left").textContent = this._left(cache, total, seconds);
    const known = cache ? `, ${count(cache)} of them known` : "";
    $("reading-detail").textContent = `${count(processed)} of ${counted(total, "token")}${known}`;
  }

  _left(cache, total, seconds) {
    const left = secondsLeft(this._points, cache, total);
    if (left === null) return `since ${duration(seconds)}`;
    const since = seconds - this._points.at(-1)[1]; // the chunk that is under way
    return `about ${duration(Math.max(left - since, 0))} left`;
  }

  _say(what, percent = null) {
    $("reading-what").textContent = what;
    document.title = percent === null ? "HeadInfer" : `${percent}% read · HeadInfer`;
    const now = Date.now();
    if (percent !== null && now - this._spoken < SPOKEN_MS) return;
    this._spoken = now;
    $("status").textContent = what;
  }

  end() {
    $("reading").hidden = true;
    document.title = "HeadInfer";
  }
}
