// Who the coordinator takes this page for, so that it offers only what will not be refused.

import { computed, effect, signal } from "@preact/signals";

import { Role } from "../gen/shanty/v1/access_pb";
import type { WhoAmIResponse } from "../gen/shanty/v1/access_pb";
import { access, mayPass, messageOf } from "./clients";
import { refused, token } from "./session";
import { wait } from "./stream";

export const who = signal<WhoAmIResponse | null>(null);

const ROLES: Record<Role, string> = {
  [Role.UNSPECIFIED]: "nobody",
  [Role.READ]: "may look",
  [Role.SUBMIT]: "may submit and cancel",
  [Role.WORKER]: "worker",
  [Role.ADMIN]: "may do everything",
};

export const roleWord = computed(() => (who.value ? ROLES[who.value.role] : ""));

const calls = computed(() => new Set(who.value?.calls ?? []));

/** Whether a call would be let in, by the name of its service and its own. */
export const may = (call: string): boolean => calls.value.has(`/shanty.v1.${call}`);

/** Asks anew whenever another token is used. */
export function start(): void {
  effect(() => {
    void token.value;
    const stopping = new AbortController();
    who.value = null;
    void ask(stopping.signal);
    return () => stopping.abort();
  });
}

async function ask(stop: AbortSignal): Promise<void> {
  for (let pause = 250; !stop.aborted; pause = Math.min(pause * 2, 5_000)) {
    try {
      who.value = await access.whoAmI({}, { signal: stop });
      return;
    } catch (error) {
      if (stop.aborted) return;
      if (!mayPass(error)) {
        // A token that may not even ask who it is (a worker's) shows nothing here.
        refused.value ??= messageOf(error);
        return;
      }
    }
    await wait(pause, stop);
  }
}
