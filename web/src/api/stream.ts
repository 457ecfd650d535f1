// A stream that begins again when it breaks, with growing pauses, until it is told to stop.

import { signal, type ReadonlySignal } from "@preact/signals";

import { mayPass, messageOf, noteRefusal } from "./clients";

/** How a stream is doing, for people. */
export type Connection = { state: "connecting" | "live" | "lost" | "ended" | "refused"; reason: string };

export interface Following {
  readonly connection: ReadonlySignal<Connection>;
  stop(): void;
}

const FIRST_PAUSE_MS = 250;
const LONGEST_PAUSE_MS = 5_000;

/**
 * Follows `open` and hands each message to `take`. A stream that ends by itself ends the following when `done` says so, else it is
 * opened again: the coordinator restarts, and the page recovers.
 */
export function follow<T>(open: (signal: AbortSignal) => AsyncIterable<T>, take: (message: T) => void, done: () => boolean): Following {
  const connection = signal<Connection>({ state: "connecting", reason: "" });
  const stopping = new AbortController();
  void run();
  return { connection, stop: () => stopping.abort() };

  async function run(): Promise<void> {
    let pause = FIRST_PAUSE_MS;
    while (!stopping.signal.aborted) {
      try {
        for await (const message of open(stopping.signal)) {
          if (stopping.signal.aborted) return;
          take(message);
          pause = FIRST_PAUSE_MS;
          if (connection.peek().state !== "live") connection.value = { state: "live", reason: "" };
        }
        if (done()) {
          connection.value = { state: "ended", reason: "" };
          return;
        }
        connection.value = { state: "lost", reason: "the coordinator closed the stream" };
      } catch (error) {
        if (stopping.signal.aborted) return;
        noteRefusal(error);
        if (!mayPass(error)) {
          connection.value = { state: "refused", reason: messageOf(error) };
          return;
        }
        connection.value = { state: "lost", reason: messageOf(error) };
      }
      await wait(pause * (0.75 + Math.random() / 2), stopping.signal);
      pause = Math.min(pause * 2, LONGEST_PAUSE_MS);
    }
  }
}

/** Waits, or until the signal is given. */
export function wait(milliseconds: number, signal: AbortSignal): Promise<void> {
  return new Promise((resolve) => {
    const timer = setTimeout(resolve, milliseconds);
    signal.addEventListener("abort", () => (clearTimeout(timer), resolve()), { once: true });
  });
}
