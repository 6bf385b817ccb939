// How long the rest of a prompt takes, and how numbers are written.

/**
 * Guess the seconds until a prompt is read.
 *
 * Each token attends to those before it, so tokens from c to n take a (n - c) + b (n² - c²): both
 * are fitted to all points by least squares. An average speed would be off by several times.
 *
 * @param {Array<[number, number]>} points tokens done, those in the cache included, and seconds
 * @param {number} cached tokens that need not be read
 * @param {number} total tokens of the prompt
 * @returns {number | null} null while there is nothing to go by
 */
export function secondsLeft(points, cached, total) {
  if (!points.length || total <= cached) return null;
  const terms = (tokens) => {
    const [n, c] = [tokens / total, cached / total]; // plain counts would lose digits
    return [n - c, n * n - c * c];
  };
  let [xx, xy, yy, xt, yt] = [0, 0, 0, 0, 0];
  for (const [tokens, seconds] of points) {
    const [x, y] = terms(tokens);
    xx += x * x;
    xy += x * y;
    yy += y * y;
    xt += x * seconds;
    yt += y * seconds;
  }
  let [linear, square] = [xt / xx, 0];
  const determinant = xx * yy - xy * xy;
  if (determinant > 1e-12 * xx * yy) {
    const fitted = [(xt * yy - yt * xy) / determinant, (yt * xx - xt * xy) / determinant];
    if (fitted[0] < 0) [linear, square] = [0, yt / yy];
    else if (fitted[1] > 0) [linear, square] = fitted;
  }
  const [done, all] = [terms(points[points.length - 1][0]), terms(total)];
  return Math.max(linear * (all[0] - done[0]) + square * (all[1] - done[1]), 0);
}

/** Write a duration, such as 1:05. */
export function duration(seconds) {
  const whole = Math.round(seconds);
  const [hours, minutes, rest] = [whole / 3600, (whole / 60) % 60, whole % 60].map(Math.floor);
  const end = String(rest).padStart(2, "0");
  return hours ? `${hours}:${String(minutes).padStart(2, "0")}:${end}` : `${minutes}:${end}`;
}

/** Write how long something took: short times with a part of a second. */
export function took(seconds) {
  return seconds < 60 ? `${seconds.toFixed(1)} s` : duration(seconds);
}

/** Write a count with marks between thousands. */
export function count(number) {
  return Number(number).toLocaleString("en-US");
}

/** Write a count with the word for what is counted. */
export function counted(number, word) {
  return `${count(number)} ${word}${number === 1 ? "" : "s"}`;
}

/** Write a size; GiB are 2**30 bytes. */
export function bytes(number) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let size = Number(number) || 0;
  let unit = 0;
  while (size >= 1024 && unit < units.length - 1) {
    size /= 1024;
    unit += 1;
  }
  return `${size >= 100 || unit === 0 ? Math.round(size) : size.toFixed(1)} ${units[unit]}`;
}
