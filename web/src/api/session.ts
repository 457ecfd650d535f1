// Who is signed in. The token lives as long as the browser's tab and goes nowhere but into requests to this origin.

import { computed, signal } from "@preact/signals";

const KEY = "shanty-token";

const stored = signal<string | null>(read());

/** The token that requests carry; null where none is needed or given. */
export const token = computed(() => stored.value);

/** Set when the coordinator wants a token, or another one. */
export const refused = signal<string | null>(null);

export function signIn(value: string): void {
  stored.value = value.trim();
  refused.value = null;
  try {
    sessionStorage.setItem(KEY, value.trim());
  } catch {
    // Without storage the token lasts until the page is left.
  }
}

export function signOut(): void {
  stored.value = null;
  try {
    sessionStorage.removeItem(KEY);
  } catch {
    // There was none to remove.
  }
  refused.value = "Signed out.";
}

function read(): string | null {
  try {
    return sessionStorage.getItem(KEY);
  } catch {
    return null;
  }
}
