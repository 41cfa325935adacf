// What all parts of the page use to make its elements.

export const byId = (id) => document.getElementById(id);

export function element(tag, className, ...content) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  node.append(...content);
  return node;
}

// An element of a drawing.
export function shape(tag, attributes, text = "") {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.textContent = text;
  return node;
}

export function button(text, action) {
  const node = element("button", "", text);
  node.type = "button";
  node.addEventListener("click", action);
  return node;
}

// A reward with its sign, in the colour of good or bad.
export function signed(reward, digits) {
  return element("span", reward < 0 ? "bad" : "good", withSign(reward, digits));
}

export const withSign = (reward, digits) => (reward < 0 ? "−" : "+") + Math.abs(reward).toFixed(digits);

// The letter by which a column is known, in the form and in the results.
export const letter = (column) => "ABCD"[column];
