// Helpers for DOM elements. Text is always inserted as text, never as HTML.

export function byId(id) {
  return document.getElementById(id);
}

/** Create an element with a class and children: elements or text. */
export function element(name, className = "", ...children) {
  const made = document.createElement(name);
  if (className) made.className = className;
  made.append(...children);
  return made;
}

/** Set text only if it changed, so that screen readers do not announce it twice. */
export function say(target, text) {
  const node = typeof target === "string" ? byId(target) : target;
  if (node.textContent !== text) node.textContent = text;
}
