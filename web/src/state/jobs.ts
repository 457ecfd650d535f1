// The list of jobs, asked for again and again while somebody looks.

import { signal } from "@preact/signals";

import { jobs as service, mayPass, messageOf } from "../api/clients";
import { refused } from "../api/session";
import { wait, type Connection } from "../api/stream";
import type { JobSummary } from "../gen/shanty/v1/job_pb";

const PAUSE_MS = 1_500;

export const list = signal<readonly JobSummary[] | null>(null);
export const connection = signal<Connection>({ state: "connecting", reason: "" });

/** Keeps the list fresh until the returned function is called. */
export function keepFresh(): () => void {
  const stopping = new AbortController();
  void run(stopping.signal);
  return () => stopping.abort();
}

async function run(stop: AbortSignal): Promise<void> {
  while (!stop.aborted) {
    if (!document.hidden && refused.peek() === null) {
      try {
        const answer = await service.listJobs({}, { signal: stop });
        // The newest first.
        list.value = answer.jobs.toSorted((one, other) => Number(other.submittedUnixMs - one.submittedUnixMs));
        connection.value = { state: "live", reason: "" };
      } catch (error) {
        if (stop.aborted) return;
        connection.value = { state: mayPass(error) ? "lost" : "refused", reason: messageOf(error) };
      }
    }
    await wait(PAUSE_MS, stop);
  }
}
