// Who trains, and who is late: state, pace and the parts of a step, per worker.

import { may } from "../api/who";
import { MemberPhase } from "../gen/shanty/v1/common_pb";
import type { Member } from "../gen/shanty/v1/status_pb";
import { count, duration, NONE, shortId } from "../text/format";
import { Drain } from "./Actions";
import { MemberBadge } from "./State";
import { Table, type Column } from "./Table";

/** A beat that is older than this is worth a look; workers beat four times a second. */
const OLD_BEAT_SECONDS = 1.5;

const PARTS = [
  ["data", "dataSeconds"],
  ["compute", "computeSeconds"],
  ["reduce", "reduceSeconds"],
  ["update", "updateSeconds"],
] as const;

export function Members({ members, ended }: { members: readonly Member[]; ended: boolean }) {
  const drains = !ended && may("JobService/DrainWorker");
  const longest = Math.max(...members.map(total), 1e-9);
  const columns: Column<Member>[] = [
    { name: "Rank", number: true, cell: ({ rank }) => rank ?? NONE },
    { name: "Worker", cell: ({ workerId }) => <code title={workerId}>{shortId(workerId)}</code> },
    { name: "Host", cell: ({ host, pid }) => <span title={`process ${pid}`}>{host}</span> },
    { name: "Device", cell: ({ device }) => device },
    { name: "State", cell: ({ phase, spare, draining }) => <MemberBadge phase={phase} also={draining ? "draining" : spare ? "spare" : ""} /> },
    { name: "Step", number: true, cell: ({ step }) => count(step) },
    { name: "Last beat", number: true, cell: ({ beatAgeSeconds: age }) => <span class={age > OLD_BEAT_SECONDS ? "warn-text" : undefined}>{duration(age)}</span> },
    { name: "Returns", number: true, cell: ({ restarts }) => count(restarts) },
    { name: "Its step in parts", cell: (member) => <Parts member={member} longest={longest} /> },
    { name: "Why", wide: true, cell: ({ reason }) => reason || NONE },
  ];
  if (drains) columns.push({ name: "Action", cell: ({ workerId, phase, draining }) => (phase === MemberPhase.LOST || draining ? NONE : <Drain worker={workerId} />) });
  return <Table caption="Members" columns={columns} rows={members} rowKey={({ workerId }) => workerId} empty="No worker has joined yet." />;
}

function total({ timings }: Member): number {
  return timings ? PARTS.reduce((sum, [, part]) => sum + timings[part], 0) : 0;
}

/** A worker's step in parts, all on one scale: who computes longest keeps the others in `reduce`. */
function Parts({ member, longest }: { member: Member; longest: number }) {
  const { timings } = member;
  if (!timings) return <>{NONE}</>;
  const text = PARTS.map(([name, part]) => `${name} ${duration(timings[part])}`).join(", ");
  return (
    <span class="parts" role="img" aria-label={text} title={text}>
      {PARTS.map(([name, part]) => (
        <span key={name} class={`part ${name}`} style={{ width: `${(timings[part] / longest) * 100}%` }} />
      ))}
    </span>
  );
}

export function PartsLegend() {
  return (
    <p class="legend muted">
      {PARTS.map(([name]) => (
        <span key={name}>
          <span class={`swatch ${name}`} /> {name}
        </span>
      ))}
    </p>
  );
}
