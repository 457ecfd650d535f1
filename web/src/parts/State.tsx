// States in words and colours. The word carries the meaning, the colour only helps.

import { JobState, MemberPhase } from "../gen/shanty/v1/common_pb";
import type { Connection } from "../api/stream";

const JOB: Record<JobState, [string, string]> = {
  [JobState.UNSPECIFIED]: ["unknown", "plain"],
  [JobState.QUEUED]: ["queued", "plain"],
  [JobState.PREPARING]: ["preparing", "busy"],
  [JobState.FORMING]: ["forming", "busy"],
  [JobState.RUNNING]: ["running", "good"],
  [JobState.RECOVERING]: ["recovering", "warn"],
  [JobState.SUCCEEDED]: ["succeeded", "done"],
  [JobState.FAILED]: ["failed", "bad"],
  [JobState.CANCELLED]: ["cancelled", "plain"],
};

const MEMBER: Record<MemberPhase, [string, string]> = {
  [MemberPhase.UNSPECIFIED]: ["unknown", "plain"],
  [MemberPhase.IDLE]: ["idle", "plain"],
  [MemberPhase.LOADING]: ["loading", "busy"],
  [MemberPhase.READY]: ["ready", "plain"],
  [MemberPhase.FORMING]: ["forming", "busy"],
  [MemberPhase.COMPUTING]: ["computing", "good"],
  [MemberPhase.REDUCING]: ["reducing", "good"],
  [MemberPhase.EVALUATING]: ["evaluating", "good"],
  [MemberPhase.WAITING]: ["waiting", "warn"],
  [MemberPhase.LOST]: ["lost", "bad"],
  [MemberPhase.WRITING]: ["writing", "busy"],
};

export const jobWord = (state: JobState): string => JOB[state]?.[0] ?? "unknown";

export function JobBadge({ state }: { state: JobState }) {
  const [word, tone] = JOB[state] ?? JOB[JobState.UNSPECIFIED];
  return <span class={`badge ${tone}`}>{word}</span>;
}

export function MemberBadge({ phase, also = "" }: { phase: MemberPhase; also?: string }) {
  const [word, tone] = MEMBER[phase] ?? MEMBER[MemberPhase.UNSPECIFIED];
  return (
    <>
      <span class={`badge ${tone}`}>{word}</span>
      {also ? <span class="badge warn">{also}</span> : null}
    </>
  );
}

/** Says aloud that what is shown is old. */
export function Freshness({ connection }: { connection: Connection }) {
  if (connection.state === "live" || connection.state === "ended") return null;
  const text = connection.state === "connecting" ? "Connecting…" : connection.state === "refused" ? connection.reason : `Connection lost: ${connection.reason}. Trying again.`;
  return (
    <p class={`banner ${connection.state === "connecting" ? "plain" : "warn"}`} role="status">
      {text}
    </p>
  );
}
