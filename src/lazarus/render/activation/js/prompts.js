/* Prompts by layers. */

const DIVERGENCES = { columns: data.series.layers, axis: "Layer", value: "divergence" };

function startPrompts() {
  const prompts = data.prompts;
  const matrix = prompts.divergence && matrixOf(prompts.divergence);
  const groupName = (row) => (prompts.group[row] === null ? MISSING : oneLine(prompts.groups[prompts.group[row]]));
  const plain = (text, name = "") => element("td", { textContent: text, className: name });
  const lead = [["Number", (row) => plain(prompts.index[row])], ["Tokens", (row) => plain(prompts.n_tokens[row])]];
  if (prompts.groups.length) lead.splice(1, 0, ["Group", (row) => plain(groupName(row), "text")]);
  return new Explorer("prompts", {
    what: "prompt",
    count: prompts.index.length,
    matrix,
    words: DIVERGENCES,
    text: (row) => prompts.text[row],
    name: (row) => `Prompt ${prompts.index[row]}`,
    group: (row) => prompts.group[row],
    lead,
    told: (row) => promptTold(prompts, row, groupName(row)),
  });
}

/** A prompt's facts and its whole text. */
function promptTold(prompts, row, group) {
  const facts = [counted(prompts.n_tokens[row], "token")];
  if (prompts.groups.length) facts.push(`group ${group}`);
  const length = prompts.characters[row];
  if (length) facts.push(`cut here after ${prompts.text[row].length.toLocaleString("en")} of ${length.toLocaleString("en")} characters`);
  return [
    element("p", { className: "meta", textContent: facts.join(" · ") }),
    element("pre", { textContent: visible(prompts.text[row]), dir: "auto", tabIndex: 0, attributes: { role: "region", "aria-label": "Text of the prompt" } }),
  ];
}
