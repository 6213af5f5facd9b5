// Elements by id, and new ones. Text goes in as text only.

export function byId(id) {
  return document.getElementById(id);
}

/** A new element with a class and children: elements or text. */
export function element(name, className = "", ...children) {
  const made = document.createElement(name);
  if (className) made.className = className;
  made.append(...children);
  return made;
}

/** Set text only if it changed, so that nothing is announced twice. */
export function say(target, text) {
  const node = typeof target === "string" ? byId(target) : target;
  if (node.textContent !== text) node.textContent = text;
}
