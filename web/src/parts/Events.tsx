// What happened, the newest first.

import type { Event } from "../gen/shanty/v1/status_pb";
import { clock, count, NONE, shortId } from "../text/format";
import { Table, type Column } from "./Table";

const columns: Column<Event>[] = [
  { name: "Time", cell: ({ unixMs }) => <Moment unixMs={unixMs} /> },
  { name: "Step", number: true, cell: ({ step }) => count(step) },
  { name: "Event", cell: ({ kind }) => kind.replaceAll("_", " ") },
  { name: "What", wide: true, cell: ({ text }) => text },
  { name: "Worker", cell: ({ workerId }) => (workerId ? <code title={workerId}>{shortId(workerId)}</code> : NONE) },
];

export function Moment({ unixMs }: { unixMs: bigint }) {
  const moment = new Date(Number(unixMs));
  return (
    <time dateTime={moment.toISOString()} title={moment.toString()}>
      {clock(unixMs)}
    </time>
  );
}

export function Events({ events }: { events: readonly Event[] }) {
  const numbered = events.map((event, index) => ({ event, index })).toReversed();
  const rows = numbered.map(({ event, index }) => ({ ...event, key: `${event.unixMs}-${index}` }));
  return <Table caption="Events" columns={columns} rows={rows} rowKey={({ key }) => key} empty="Nothing has happened yet." />;
}
