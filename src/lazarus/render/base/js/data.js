/* The page's data: JSON, in which matrices are float64 in base64, and how numbers are written. */

const data = JSON.parse(document.getElementById("data").textContent);
const MISSING = "–";

/** A matrix [rows, columns] of the result's own numbers; NaN where nothing was measured. */
function matrixOf({ rows, columns, base64 }) {
  const bytes = Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
  const view = new DataView(bytes.buffer);
  const values = new Float64Array(rows * columns);
  for (let i = 0; i < values.length; i += 1) values[i] = view.getFloat64(8 * i, true);
  return { rows, columns, values, at: (row, column) => values[row * columns + column] };
}

/** The largest finite value of a row, or -Infinity. */
function largest(matrix, row) {
  let most = -Infinity;
  for (let column = 0; column < matrix.columns; column += 1) {
    const value = matrix.at(row, column);
    if (value > most) most = value;
  }
  return most;
}

const absent = (value) => value === null || value === undefined || Number.isNaN(value);
const present = (value) => !absent(value);

/** The format of the number that the page is about: the first of its formats. */
const MAIN_FORMAT = Object.values(data.formats)[0];

/** A number in a Python format such as .4f; never 0 for what is not 0. */
function formatted(value, format = MAIN_FORMAT) {
  if (absent(value)) return MISSING;
  const digits = Number(format.slice(1, -1));
  const text = format.endsWith("e") ? exponential(value, digits) : value.toFixed(digits);
  return value !== 0 && Number(text) === 0 ? exponential(value, 1) : text;
}

function exponential(value, digits) {
  return value.toExponential(digits).replace(/e([+-])(\d)$/, "e$10$2");
}

/** A text on which no control character can act: it shows as its own picture. */
function visible(text) {
  return text.replace(/[\u0000-\u001f\u007f]/g, (character) =>
    character === "\n" || character === "\t"
      ? character
      : String.fromCharCode(character === "\u007f" ? 0x2421 : 0x2400 + character.charCodeAt(0)),
  );
}

/** The same on one line. */
const oneLine = (text) => visible(text).replace(/\n/g, "↵").replace(/\t/g, "→");

const counted = (number, noun) => `${number.toLocaleString("en")} ${noun}${number === 1 ? "" : "s"}`;
