// Light, dark, or what the system says. The choice is remembered in this browser.

import { effect, signal } from "@preact/signals";

export type Theme = "system" | "light" | "dark";

const KEY = "shanty-theme";

function read(): Theme {
  try {
    const value = localStorage.getItem(KEY);
    return value === "light" || value === "dark" ? value : "system";
  } catch {
    return "system";
  }
}

export const theme = signal<Theme>(read());

const dark = matchMedia("(prefers-color-scheme: dark)");

/** Counts changes of colours, so that drawings follow. */
export const colours = signal(0);

export function start(): void {
  dark.addEventListener("change", () => colours.value++);
  effect(() => {
    document.documentElement.dataset.theme = theme.value;
    try {
      localStorage.setItem(KEY, theme.value);
    } catch {
      // It lasts until the page is left.
    }
    colours.value = colours.peek() + 1;
  });
}

export function next(): void {
  theme.value = theme.value === "system" ? "dark" : theme.value === "dark" ? "light" : "system";
}

/** A colour of the style sheet, as it is now. */
export function colour(name: string): string {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
}
