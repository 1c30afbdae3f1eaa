/* The text of one prompt, coloured by what became of the next token after each of its tokens. */

const STRONGEST = 45;
const KL = "KL(base‖fine-tuned)";

const percent = (share) => `${(100 * share).toFixed(share < 0.0995 ? 1 : 0)} %`;

/** What both models would say after a token, as a table. */
function choicesTable(output, row) {
  const lines = ["base", "fine-tuned"].map((name, side) => {
    const said = output.choices[side][row].map(([token, share]) => element("td", {}, element("bdi", { className: "token", textContent: oneLine(spaced(token)) }), ` ${percent(share)}`));
    return element("tr", {}, header(name, "row"), ...said);
  });
  const caption = `The next token after it; ${KL} ${formatted(output.kl[row])} nats`;
  return element("table", { className: "choices" }, element("caption", { textContent: caption }), element("tbody", {}, ...lines));
}

/** The same in a line. */
function choicesLine(output, row) {
  const side = (name, at) => [`; ${name} `, ...output.choices[at][row].flatMap(([token, share]) => [element("bdi", { className: "token", textContent: oneLine(spaced(token)) }), ` ${percent(share)} `])];
  return [`${KL} `, element("b", { textContent: formatted(output.kl[row]) }), ...side("base", 0), ...side("fine-tuned", 1)];
}

function partingLine({ parting }) {
  if (!parting) return "Both models’ first choices are the same after every token here.";
  const cause = {
    noise: "a near-tie, which noise alone can turn",
    change: "more than noise explains",
  }[parting.cause] || "whether noise explains it was not measured";
  const margin = absent(parting.margin_base) ? "" : `; base prefers its own by ${formatted(parting.margin_base)} logits`;
  return `The two part after token ${parting.position}: base says ${JSON.stringify(parting.token_base)}, fine-tuned ${JSON.stringify(parting.token_finetuned)} (${cause}${margin}).`;
}

class TokenText {
  constructor(pick) {
    [this.text, this.key, this.after, this.parting] = ["text", "key", "after", "parting"].map((part) => document.getElementById(`tokens-${part}`));
    this.hint = this.after.firstElementChild;
    const rowOf = (event) => event.target.dataset && event.target.dataset.row;
    this.text.addEventListener("pointerover", (event) => rowOf(event) && this.show(Number(rowOf(event))));
    this.text.addEventListener("pointerleave", () => this.after.replaceChildren(this.hint));
    this.text.addEventListener("click", (event) => rowOf(event) && pick(Number(rowOf(event))));
  }

  setTrace(trace) {
    this.output = trace.output;
    document.getElementById("tokens-output").hidden = !trace.output;
    if (!trace.output) return;
    const values = trace.output.kl.map((value) => (absent(value) ? NaN : value));
    const scale = colourScale(values, skewed(values));
    this.text.replaceChildren(...trace.tokens.map((token, row) => this.token(trace, scale, token, row)));
    const said = (text) => element("span", { textContent: text });
    const ramp = element("span", { className: "ramp" });
    ramp.style.background = `linear-gradient(to right, ${this.colour(0)}, ${this.colour(1)})`;
    this.key.replaceChildren(said(formatted(scale.least)), ramp, said(formatted(scale.most)), said(`${KL}, nats${scale.least > 0 ? ", log" : ""}`));
    this.parting.textContent = visible(partingLine(trace.output));
  }

  token(trace, scale, token, row) {
    const span = element("span", { textContent: visible(token) });
    span.dataset.row = row;
    const step = scale.step(absent(trace.output.kl[row]) ? NaN : trace.output.kl[row]);
    if (step > 0) span.style.background = this.colour(step / (STEPS - 1));
    const { parting } = trace.output;
    if (parting && parting.position === trace.positions[row]) span.className = "parting";
    return span;
  }

  colour(share) {
    return `color-mix(in srgb, var(--flag) ${(STRONGEST * share).toFixed(1)}%, transparent)`;
  }

  show(row) {
    this.after.replaceChildren(...choicesLine(this.output, row));
  }
}
