// What happened, the newest first; losses of members and how the crew came back.

import type { Event } from "../gen/shanty/v1/status_pb";
import { clock, count, duration, NONE, shortId } from "../text/format";
import { Table, type Column } from "./Table";

const seconds = (milliseconds: number | undefined): string => duration(milliseconds === undefined ? undefined : milliseconds / 1000);

const all: Column<Event>[] = [
  { name: "Time", cell: ({ unixMs }) => <time dateTime={new Date(Number(unixMs)).toISOString()}>{clock(unixMs)}</time> },
  { name: "Step", number: true, cell: ({ step }) => count(step) },
  { name: "Event", cell: ({ kind }) => kind.replaceAll("_", " ") },
  { name: "What", cell: ({ text }) => text },
  { name: "Worker", cell: ({ workerId }) => (workerId ? <code title={workerId}>{shortId(workerId)}</code> : NONE) },
];

const recoveries: Column<Event>[] = [
  ...all.filter(({ name }) => name === "Time" || name === "Step" || name === "Worker"),
  { name: "Cause", cell: ({ text }) => text },
  { name: "Noticed after", number: true, cell: ({ detectionMs }) => seconds(detectionMs) },
  { name: "Stalled for", number: true, cell: ({ stallMs }) => seconds(stallMs) },
];

const isRecovery = ({ kind, detectionMs, stallMs }: Event): boolean => kind === "member_lost" || kind === "recovered" || detectionMs !== undefined || stallMs !== undefined;

const rowKey = ({ unixMs, kind, workerId, step }: Event): string => `${unixMs}-${kind}-${workerId}-${step}`;

export function Events({ events }: { events: readonly Event[] }) {
  return <Table caption="Events" columns={all} rows={events.toReversed()} rowKey={rowKey} empty="Nothing has happened yet." />;
}

export function Recoveries({ events }: { events: readonly Event[] }) {
  return <Table caption="Recoveries" columns={recoveries} rows={events.filter(isRecovery).toReversed()} rowKey={rowKey} empty="No worker was lost." />;
}
