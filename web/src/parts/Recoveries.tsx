// Breaks, and how the crew came back: cause, detection, stall, what was lost.

import { JobState } from "../gen/shanty/v1/common_pb";
import type { CrewHealth, Event, JobStatus, Recovery } from "../gen/shanty/v1/status_pb";
import { count, duration, NONE, shortId } from "../text/format";
import { Moment } from "./Events";
import { Table, type Column } from "./Table";

const seconds = (milliseconds: number | undefined): string => duration(milliseconds === undefined ? undefined : milliseconds / 1000);

/** A recovery that is over, or the break that is not. */
interface Row {
  key: string;
  unixMs: bigint;
  cause: string;
  text: string;
  worker: string;
  recovery: Recovery | null;
  detectionMs: number | undefined;
}

const columns: Column<Row>[] = [
  { name: "Time", cell: ({ unixMs }) => <Moment unixMs={unixMs} /> },
  { name: "Cause", cell: ({ cause, recovery }) => (recovery ? cause : <strong class="warn-text">{cause}</strong>) },
  { name: "What", wide: true, cell: ({ text }) => text },
  { name: "Worker", cell: ({ worker }) => (worker ? <code title={worker}>{shortId(worker)}</code> : NONE) },
  { name: "Noticed after", number: true, cell: ({ detectionMs }) => seconds(detectionMs) },
  { name: "Stalled for", number: true, cell: ({ recovery }) => (recovery ? seconds(recovery.stallMs) : "goes on") },
  { name: "Steps lost", number: true, cell: ({ recovery }) => (recovery ? count(recovery.stepsLost) : NONE) },
  { name: "Rows requeued", number: true, cell: ({ recovery }) => (recovery ? count(recovery.rowsRequeued) : NONE) },
  { name: "Then", cell: ({ recovery }) => (recovery ? `step ${count(recovery.step)}, generation ${count(recovery.generation)}` : "recovers") },
];

export function Recoveries({ status, crew, events }: { status: JobStatus; crew: CrewHealth | null; events: readonly Event[] }) {
  const over = (crew?.recoveries ?? []).map((recovery): Row => {
    const { unixMs, generation, cause, text, workerId, detectionMs } = recovery;
    return { key: `${generation}-${unixMs}`, unixMs, cause: cause.replaceAll("_", " "), text, worker: workerId, recovery, detectionMs };
  });
  const lost = status.state === JobState.RECOVERING ? events.findLast(({ kind }) => kind === "member_lost" || kind === "broken" || kind === "hung") : undefined;
  const going: Row[] = status.state !== JobState.RECOVERING ? [] : [
    { key: "now", unixMs: lost?.unixMs ?? BigInt(Date.now()), cause: "under way", text: status.reason, worker: lost?.workerId ?? "", recovery: null, detectionMs: lost?.detectionMs },
  ];
  return <Table caption="Recoveries" columns={columns} rows={[...going, ...over]} rowKey={({ key }) => key} empty="No generation has ended early." />;
}
