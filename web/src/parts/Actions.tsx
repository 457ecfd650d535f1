// What can be done to a job from here. Each asks once more before it acts.

import { useState } from "preact/hooks";

import { jobs, messageOf } from "../api/clients";
import type { JobStatus } from "../gen/shanty/v1/status_pb";
import { isFinal } from "../state/job";

export function Actions({ status }: { status: JobStatus }) {
  const [asking, setAsking] = useState(false);
  const [answer, setAnswer] = useState<string | null>(null);
  if (isFinal(status.state)) return null;

  async function cancel(): Promise<void> {
    setAsking(false);
    try {
      await jobs.cancelJob({ jobId: status.jobId });
      setAnswer(null);
    } catch (error) {
      setAnswer(messageOf(error));
    }
  }

  return (
    <div class="actions">
      {asking ? (
        <>
          <span>Stop this job? Its checkpoints stay.</span>
          <button type="button" class="bad" onClick={() => void cancel()}>
            Stop it
          </button>
          <button type="button" onClick={() => setAsking(false)}>
            Go on
          </button>
        </>
      ) : (
        <button type="button" onClick={() => setAsking(true)}>
          Cancel job…
        </button>
      )}
      {answer ? (
        <span class="bad-text" role="alert">
          {answer}
        </span>
      ) : null}
    </div>
  );
}
