// What can be done to a job from here, by whoever may do it.

import { jobs } from "../api/clients";
import { may } from "../api/who";
import { JobState } from "../gen/shanty/v1/common_pb";
import type { JobStatus } from "../gen/shanty/v1/status_pb";
import { isFinal } from "../state/job";
import { Confirm } from "./Confirm";

export function Actions({ status }: { status: JobStatus }) {
  const { jobId, state } = status;
  if (isFinal(state)) return null;
  const isAtWork = state === JobState.RUNNING || state === JobState.RECOVERING;
  return (
    <div class="actions">
      {isAtWork && may("JobService/CheckpointNow") ? (
        <Confirm name="Checkpoint now…" question="Write a checkpoint after the step that is made now? The job goes on meanwhile." yes="Write it" act={checkpoint} />
      ) : null}
      {may("JobService/CancelJob") ? <Confirm name="Cancel job…" question={`Stop ${jobId}? Its checkpoints stay, and it can be resumed.`} yes="Stop it" act={cancel} grave /> : null}
    </div>
  );

  async function checkpoint(): Promise<string> {
    const { afterStep } = await jobs.checkpointNow({ jobId });
    return `Asked for, beyond step ${afterStep}.`;
  }

  async function cancel(): Promise<string> {
    await jobs.cancelJob({ jobId });
    return "";
  }
}

/** Asks a worker to hand back what it holds and to end. */
export function Drain({ worker }: { worker: string }) {
  return (
    <Confirm
      name="Drain…"
      about={worker}
      question={`Ask ${worker} to hand back what it holds and to end? The job goes on without it.`}
      yes="Drain it"
      act={async () => (await jobs.drainWorker({ workerId: worker }), "Asked.")}
    />
  );
}
