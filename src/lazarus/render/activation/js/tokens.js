/* Tokens by layers, one prompt at a time. */

/** A token that is nothing but spaces would not be seen. */
const spaced = (token) => (/[^ ]/.test(token) ? token : token.replace(/ /g, "␣"));

function tokenSource(trace) {
  return {
    what: "token",
    count: trace.tokens.length,
    matrix: matrixOf(trace.divergence),
    words: DIVERGENCES,
    text: (row) => spaced(trace.tokens[row]),
    name: (row) => `Token ${trace.positions[row]}`,
    group: () => null,
    lead: [["Position", (row) => element("td", { textContent: trace.positions[row] })], ...(trace.output ? [["KL, nats", (row) => numberCell(trace.output.kl[row])]] : [])],
    told: (row) => [element("pre", { textContent: visible(trace.tokens[row]), dir: "auto" }), ...(trace.output ? [choicesTable(trace.output, row)] : [])],
  };
}

/** What the choice of prompts says of one: its number and the beginning of its text. */
function promptOption(trace, i) {
  const row = data.prompts.index.indexOf(trace.prompt_index);
  const text = row < 0 ? trace.tokens.join("") : data.prompts.text[row];
  return element("option", { value: String(i), textContent: `${trace.prompt_index}: ${oneLine(text.slice(0, MOST_LABEL))}` });
}

function startTokens() {
  const select = document.getElementById("tokens-prompt");
  select.replaceChildren(...data.tokens.map(promptOption));
  const explorer = new Explorer("tokens", tokenSource(data.tokens[0]));
  const text = document.getElementById("tokens-output") && new TokenText((row) => explorer.pick(row));
  const show = (trace) => text && text.setTrace(trace);
  show(data.tokens[0]);
  select.addEventListener("change", () => {
    const trace = data.tokens[Number(select.value)];
    explorer.setSource(tokenSource(trace));
    show(trace);
  });
}
