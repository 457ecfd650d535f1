// Who is signed in. The token lives as long as the browser's tab and goes nowhere but into requests to this origin.

import { computed, signal } from "@preact/signals";

const KEY = "shanty-token";

const stored = signal<string | null>(null);

/** The token that requests carry; null where none is needed or given. */
export const token = computed(() => stored.value);

/** Set when the coordinator wants a token, or another one. */
export const refused = signal<string | null>(null);

/** The token of an address that `shanty` printed: `#token=…`. A fragment is not sent to any server. */
export function tokenOf(fragment: string): string | null {
  const value = new URLSearchParams(fragment.replace(/^#/, "")).get("token")?.trim();
  return value ? value : null;
}

/** Takes the token from the address, and the address clean again, before anything else looks at it; else the one of this tab. */
export function start(): void {
  const given = tokenOf(location.hash);
  if (given) {
    history.replaceState(history.state, "", location.pathname + location.search);
    keep(given);
  }
  stored.value = given ?? read();
}

export function signIn(value: string): void {
  const given = value.trim();
  keep(given);
  stored.value = given;
  refused.value = null;
}

export function signOut(): void {
  try {
    sessionStorage.removeItem(KEY);
  } catch {
    // There was none to remove.
  }
  stored.value = null;
  refused.value = "Signed out.";
}

function keep(value: string): void {
  try {
    sessionStorage.setItem(KEY, value);
  } catch {
    // Without storage the token lasts until the page is left.
  }
}

function read(): string | null {
  try {
    return sessionStorage.getItem(KEY);
  } catch {
    return null;
  }
}
